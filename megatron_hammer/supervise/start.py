"""The launcher: read and check what the user asks for, start the ranks of one node, and end with one line and one code.

::

    launcher --- reads and validates the config once, before any rank exists
       |-------- hosts the rendezvous store on a socket bound to 127.0.0.1 (more nodes: node 0, on the master address)
       |-------- rank 0 .. rank N-1   spawned (attempt.py); each hands its error back through a pipe
       |                              and notes what it does on a board in shared memory (parallel/board.py)
       '-------- waits: forwards signals, ends the others when one fails or hangs, names the cause, returns the code

    every rank 0 -> 0      one 75 and no failure -> 75      a failure -> its exit code (errors.py), one line on stderr

Why not torchrun: it listens on every interface, shows a traceback for a user's typing mistake, has exit codes of its
own, and its ranks go on training when it is killed. Here ranks die with their launcher (the kernel's
parent-death signal: Linux only), so that two runs never write to one folder.

Signals: TERM, INT, HUP and USR1 are passed on to every rank and mean "save and stop" (exit code 75). A rank starts
with them blocked and unblocks them once its handlers are installed (by ``train``), so that none is lost and none kills
it while it starts; before the first step there is nothing to save, and the launcher ends the ranks at once. Repeating a
signal changes nothing. USR2 has the launcher print what all ranks do, with their Python stacks. Needs no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_hammer.base.cli import ArgumentParser, keep_torch_quiet, report_error
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import say
from megatron_hammer.base.streams import flush_streams
from megatron_hammer.base.system import usable_cores
from megatron_hammer.config import Config, add_accept, help_text, load_config
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.restart import Restarts, make_restarts

if TYPE_CHECKING:
    from megatron_hammer.supervise.attempt import Ended

# (config, rank, local_rank, world_size, store, check_data, **options) -> 0 or 75
RANK_ENTRY = "megatron_hammer.train.run:run_rank"
CORES_A_RANK = 2  # the fewest that let reading, saving and launching kernels go on beside each other


def build_parser() -> ArgumentParser:
    """The command line; every config field is part of ``--help``."""
    parser = ArgumentParser(
        prog="python -m megatron_hammer.launch",
        description="Train on N processes of this machine (and of others, started the same way).",
        epilog=help_text(),
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="a preset, for example examples/configs/tiny.yaml")
    parser.add_argument("overrides", metavar="group.field=value", nargs="*", help="settings that replace the file's")
    parser.add_argument("--nproc", type=int, required=True, metavar="N", help="ranks on this node (one GPU each)")
    parser.add_argument("--nnodes", type=int, default=1, metavar="M", help="nodes, each with N ranks (default: 1)")
    parser.add_argument(
        "--node-rank", type=int, default=0, metavar="R", help="this node's number, 0 to M-1 (default: 0)"
    )
    parser.add_argument("--master-addr", metavar="A", help="address of node 0, as the others reach it")
    parser.add_argument("--master-port", type=int, metavar="P", help="free port of node 0")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again from the last checkpoint, N times at most, when a rank has died or hung (default: 0); "
        "the same on all nodes",
    )
    parser.add_argument(
        "--min-nproc",
        type=int,
        metavar="N",
        help="restart with fewer ranks, down to N, where the same rank fails twice in a row (default: --nproc)",
    )
    add_accept(parser)
    return parser


def main() -> int:
    """Parse, validate, launch."""
    args = build_parser().parse_intermixed_args()
    keep_torch_quiet()
    from megatron_hammer.sampling.plan import format_run_plan
    from megatron_hammer.train.prepare import prepare

    _check_slurm_step()
    node = _node(args.nproc, args.nnodes, args.node_rank, args.master_addr, args.master_port)
    config = load_config(args.config, args.overrides)
    restarts = make_restarts(config, node, args.max_restarts, args.min_nproc)
    accepted = tuple(args.accept)
    prepared = prepare(config, node.world_size, accepted=accepted, first_node=node.node_rank == 0)
    for note in prepared.data_notes:  # rank 0 says the rest; it does not read the data again
        print(f"note: {note}", flush=True)
    if prepared.plan is not None and not prepared.is_finished and node.node_rank == 0:
        print(format_run_plan(prepared.plan), flush=True)
    _check_gpus(config, node.nproc)
    _note_few_cores(config, node.nproc)
    return launch(config, node, options={"accepted": accepted}, restarts=restarts)


def _node(nproc: int, nnodes: int, node_rank: int, addr: str | None, port: int | None) -> Node:
    """The arguments about ranks and nodes, checked."""
    for name, value in (("--nproc", nproc), ("--nnodes", nnodes)):
        if value < 1:
            raise ConfigError(40, f"{name}={value}", "must be at least 1", f"raise {name}")
    if not 0 <= node_rank < nnodes:
        raise ConfigError(41, f"--node-rank={node_rank}", f"must lie in 0 to --nnodes={nnodes} minus 1", "count from 0")
    if nnodes == 1:
        return Node(nproc)  # one node always meets on loopback, whatever address the environment suggests
    if addr is None or port is None or not 0 < port < 65536:
        raise ConfigError(
            42,
            f"--nnodes={nnodes}",
            "needs --master-addr and --master-port (1 to 65535)",
            "give the address of node 0 and a free port there",
        )
    return Node(nproc, nnodes, node_rank, addr, port)


def _check_gpus(config: Config, nproc: int) -> None:
    """Refuse more ranks than GPUs, before any of them starts. A dry run may describe a larger machine than this."""
    if config.train.device == "cpu" or config.train.dry_run:
        return
    import torch

    gpus = torch.cuda.device_count()
    if gpus < nproc and (gpus > 0 or config.train.device == "cuda"):
        remedy = f"use --nproc {gpus} or train.device=cpu" if gpus else "use train.device=cpu or a CUDA build of torch"
        raise ConfigError(43, f"--nproc={nproc}", f"must not exceed the {gpus} GPUs that torch sees", remedy)


def launch(
    config: Config,
    node: Node,
    entry: str = RANK_ENTRY,
    options: Mapping[str, Any] | None = None,
    restarts: Restarts | None = None,
) -> int:
    """Run ``entry`` on every rank of ``node`` and return the exit code of the whole.

    Args:
        config: handed to each rank as it is; validate it first.
        node: the ranks to start.
        entry: ``module:function`` with the signature of ``RANK_ENTRY``; tests put small functions here.
        options: further arguments of it, by name.
        restarts: how often to start again when a rank has died or hung; None: never.

    Returns:
        0, 75, or the exit code of the failure whose line was printed to stderr.
    """
    from megatron_hammer.supervise.attempt import run_ranks
    from megatron_hammer.train.prepare import check_system

    check_system(config, node.world_size)
    while True:
        ended = run_ranks(config, node, entry, options or {}, restarts)
        if ended.left:
            _leave_them(ended)
        if ended.failure is None:
            return ended.code
        if ended.failure.traceback:
            print(ended.failure.traceback, file=sys.stderr, flush=True)
        if restarts is None or ended.asked_to_stop:
            return report_error(ended.failure.error)
        again = restarts.after(ended.failure, node) if node.nnodes == 1 else ended.again
        if again is None:
            return report_error(ended.failure.error)
        say(str(ended.failure.error))
        ranks = f"{again.nproc} ranks" if again.nnodes == 1 else f"{again.nproc} ranks on each of {again.nnodes} nodes"
        say(f"restart {restarts.done} of {restarts.most}: {ranks} go on from the last checkpoint")
        node = again


def _leave_them(ended: Ended) -> NoReturn:
    """Exit without waiting for a process that cannot be ended, as Python would; and start nothing beside it."""
    for line in ended.left:
        say(line)
    code = ended.code if ended.failure is None else report_error(ended.failure.error)
    flush_streams()
    os._exit(code)


def _note_few_cores(config: Config, nproc: int) -> None:
    """A GPU waits for a rank that has less than two cores: one computes, one reads and saves."""
    cores = usable_cores()
    if config.train.device == "cpu" or cores >= CORES_A_RANK * nproc:
        return
    import torch

    if torch.cuda.device_count():
        say(
            f"note: {cores} cores for {nproc} ranks: host work will slow the GPUs down; give each rank "
            f"{CORES_A_RANK} or more (Slurm: --cpus-per-task={CORES_A_RANK * nproc} with one task a node)"
        )


def _check_slurm_step() -> None:
    """Refuse to be one of several launchers that one srun starts on a node: each would start all ranks of it."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # such as "8", or "8(x2),4"
    if any(part.partition("(")[0] != "1" for part in tasks.split(",")):
        raise ConfigError(
            41,
            f"SLURM_STEP_TASKS_PER_NODE={tasks}",
            "starts several launchers on a node, and each starts all its ranks",
            "use srun --ntasks-per-node=1, or one rank a task as in examples/slurm/one_task_a_rank.sbatch",
        )
