"""Start the ranks of one node, watch them, and end with one line and one exit code.

::

    launcher --- reads and validates the config once, before any rank exists
       |-------- hosts the rendezvous store on a socket bound to 127.0.0.1 (more nodes: node 0, on the master address)
       |-------- rank 0 .. rank N-1   spawned by torch.multiprocessing; each hands its error back through a pipe
       '-------- waits: forwards signals, ends the others when one fails, names the cause, returns the exit code

    every rank 0 -> 0      one 75 and no failure -> 75      a failure -> its exit code (errors.py), one line on stderr

Why not torchrun: it listens on every interface, shows a traceback for a user's typing mistake, has exit codes of its
own, and its ranks go on training when it is killed. Here ranks die with their launcher (the kernel's
parent-death signal: Linux only), so that two runs never write to one folder.

Signals: TERM, INT, HUP and USR1 are passed on to every rank and mean "save and stop" (exit code 75). A rank is born
with them blocked and unblocks them once its handlers stand (``train`` does), so that none is lost and none kills it
while it starts. Repeating a signal changes nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_hammer.base.cli import ArgumentParser, report
from megatron_hammer.base.errors import (
    EXIT_STOPPED_BY_SIGNAL,
    ConfigError,
    HammerError,
    ParallelError,
    from_exception,
    from_fields,
    to_fields,
)
from megatron_hammer.config import Config, help_text, load_config

if TYPE_CHECKING:
    import torch.distributed as dist

# (config, rank, local_rank, world_size, store, check_data) -> 0 or 75
RANK_ENTRY = "megatron_hammer.train.run:run_rank"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # USR1: Slurm's early warning
GRACE_SECONDS = 2.0  # after a failure: for the other ranks to report the same one; a dead peer is noticed in 0.0 s
POLL_SECONDS = 0.5  # longest sleep of the watching loop: bounds how late a deadline or another node's failure is seen
FAILURE_KEY, ENDED_KEY = "launcher/failure", "launcher/ended"  # in the store: what launchers of several nodes tell


@dataclass(frozen=True)
class Node:
    """Which ranks this launcher starts and where they all meet."""

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0: any free port (one node only)."""

    @property
    def world_size(self) -> int:
        """Ranks over all nodes."""
        return self.nproc * self.nnodes


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
    return parser


def main() -> int:
    """Parse, validate, launch."""
    args = build_parser().parse_intermixed_args()
    _on_stop_signals(_stop_early)
    from megatron_hammer.sampling.plan import format_plan
    from megatron_hammer.train.prepare import prepare

    node = _node(args.nproc, args.nnodes, args.node_rank, args.master_addr, args.master_port)
    config = load_config(args.config, args.overrides)
    prepared = prepare(config, node.world_size)
    for note in prepared.data_notes:  # rank 0 says the rest; it does not read the data again
        print(f"note: {note}", flush=True)
    if prepared.plan is not None and not prepared.is_finished and node.node_rank == 0:
        print(format_plan(prepared.plan), flush=True)
    _check_gpus(config, node.nproc)
    return launch(config, node)


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


def _stop_early(signum: int, frame: object) -> NoReturn:
    """Until ranks exist a stop signal simply ends the launcher, with the code that means "run me again"."""
    name = signal.Signals(signum).name
    print(f"stopped by {name} before any rank started; run the same command again", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_STOPPED_BY_SIGNAL)


def _on_stop_signals(handler: Callable[[int, Any], None]) -> None:
    """Install ``handler`` for the stop signals; one that is ignored (``nohup``) stays ignored."""
    for signum in STOP_SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------------------------------
# The launcher's side
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _Rank:
    """One started rank, as the launcher sees it."""

    rank: int
    process: Any  # multiprocessing's SpawnProcess
    pipe: Connection
    report: dict | None = None
    """What a failing rank said: error fields, or a traceback."""
    ended_at: float | None = None
    ended_by_us: bool = False

    @property
    def code(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        return self.process.exitcode

    @property
    def failed(self) -> bool:
        return self.report is not None or self.code not in (None, 0, EXIT_STOPPED_BY_SIGNAL)


@dataclass(frozen=True, order=True)
class _Failure:
    """A candidate for the one error line; the smallest is the cause, the others mostly its consequences."""

    severity: int
    order: float
    error: HammerError = field(compare=False)
    traceback: str = field(default="", compare=False)


def launch(config: Config, node: Node, entry: str = RANK_ENTRY) -> int:
    """Run ``entry`` on every rank of ``node`` and return the exit code of the whole.

    Args:
        config: handed to each rank as it is; validate it first.
        node: the ranks to start.
        entry: ``module:function`` with the signature of ``RANK_ENTRY``; tests put small functions here.

    Returns:
        0, 75, or the exit code of the failure whose line was printed to stderr.
    """
    import torch.multiprocessing  # one import for all: the ranks find the files in the page cache

    _set_environment(node)
    store, port = _open_store(node, config.parallel.timeout_seconds)
    spawn = torch.multiprocessing.get_context("spawn")
    ranks: list[_Rank] = []
    _start_resource_tracker()  # its start would unblock the signals that are blocked next
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited by the ranks
    try:
        for local_rank in range(node.nproc):
            rank = node.node_rank * node.nproc + local_rank
            pipe, rank_end = spawn.Pipe(duplex=False)
            arguments = (entry, config, rank, local_rank, node, port, os.getpid(), rank_end)
            process = spawn.Process(target=_rank_main, args=arguments, name=f"rank {rank}")
            process.start()
            rank_end.close()  # the rank's copy is the only one left: its death closes the pipe
            ranks.append(_Rank(rank, process, pipe))
        _on_stop_signals(lambda signum, _: _forward(ranks, signum))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        failure = _watch(ranks, store if node.nnodes > 1 else None, config.parallel.timeout_seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # for good: the outcome stands, nothing is left to stop
        _kill(ranks)
    if node.nnodes > 1:
        failure = _agree_with_other_nodes(store, node, failure)
    if failure is None:
        return EXIT_STOPPED_BY_SIGNAL if any(r.code for r in ranks) else 0
    if failure.traceback:
        print(failure.traceback, file=sys.stderr, flush=True)
    return report(failure.error)


def _set_environment(node: Node) -> None:
    """What the ranks inherit: loopback only on one node, and threads that do not fight for the cores."""
    if node.nnodes == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // node.nproc)))


def _open_store(node: Node, timeout_seconds: int) -> tuple[dist.Store | None, int]:
    """The store through which the ranks find each other, and its port. One rank alone needs none.

    torch would bind a port on every interface; it takes a socket that is already bound instead.
    """
    if node.world_size == 1:
        return None, 0
    import datetime

    import torch.distributed as dist

    timeout = datetime.timedelta(seconds=timeout_seconds)
    if node.node_rank > 0:
        return _connect(node, node.master_port, timeout_seconds), node.master_port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            node.master_addr, node.master_port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for TIME_WAIT to pass
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            44,
            f"--master-addr={node.master_addr} --master-port={node.master_port}",
            f"could not be bound on node 0 ({error.strerror})",
            "give an address of node 0 and a free port",
        ) from None
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        node.master_addr,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return store, port


def _connect(node: Node, port: int, timeout_seconds: int) -> dist.Store:
    """Join the store as a client."""
    import datetime

    import torch.distributed as dist

    try:
        return dist.TCPStore(
            node.master_addr,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
    except dist.DistError as error:
        raise ParallelError(
            5,
            f"{node.master_addr}:{port}",
            f"could not be reached within {timeout_seconds} s ({str(error).splitlines()[0]})",
            "start node 0 too; check address, port and firewall",
        ) from None


def _start_resource_tracker() -> None:
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()


def _forward(ranks: list[_Rank], signum: int) -> None:
    for rank in ranks:
        if rank.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid, signum)


def _watch(ranks: list[_Rank], other_nodes: dist.Store | None, timeout_seconds: float) -> _Failure | None:
    """Wait until every rank has ended; return why the run failed, or None.

    The first failure starts the grace period, the first clean end a longer one: ranks end together or not at all.
    """
    deadline: float | None = None
    failing = False
    while living := [r for r in ranks if r.ended_at is None]:
        pipes = [r.pipe for r in living if not r.pipe.closed]
        timeout = POLL_SECONDS if deadline is None else min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
        wait([*pipes, *(r.process.sentinel for r in living)], timeout)
        for rank in living:
            _listen(rank)
        now = time.monotonic()
        if not failing and (any(r.failed for r in ranks) or _failed_elsewhere(other_nodes)):
            failing, deadline = True, now + GRACE_SECONDS
        if deadline is None and any(r.ended_at is not None for r in ranks):
            deadline = now + timeout_seconds
        if deadline is not None and now >= deadline:
            late = [r for r in ranks if r.ended_at is None]
            _kill(ranks)
            if late and not failing:
                numbers = ", ".join(str(r.rank) for r in late)
                error = ParallelError(
                    4,
                    f"rank {numbers}",
                    f"did not end within {timeout_seconds:g} s of the others",
                    "look for what it waits for; the last committed checkpoint is safe",
                )
                return _Failure(0, 0, error)
    return min((f for r in ranks if (f := _failure(r)) is not None), default=None)


def _listen(rank: _Rank) -> None:
    """Take the rank's report, if there is one, and note its end."""
    if not rank.pipe.closed and rank.pipe.poll():
        try:
            rank.report = json.loads(rank.pipe.recv_bytes())
        except (EOFError, OSError):  # it ended without a report
            rank.pipe.close()
    if rank.code is not None and (rank.pipe.closed or not rank.pipe.poll()):
        rank.ended_at = time.monotonic()


def _failure(rank: _Rank) -> _Failure | None:
    """What this rank contributes to the search for the cause.

    0: a user's mistake, said by the rank itself. 1: killed from outside or by a bad access. 2: an exception nobody
    expected; ranks whose peer has just died raise one too. 3: ended in any other way; libraries abort when a peer dies.
    """
    name = f"rank {rank.rank}"
    if rank.report is not None:
        when = rank.report["time"]
        if rank.report["error"] is None:
            error: HammerError = ParallelError(
                2,
                name,
                f"raised {rank.report['exception']}",
                "its traceback is above; the last committed checkpoint is safe",
            )
            return _Failure(2, when, error, rank.report["traceback"])
        error = from_fields(rank.report["error"])
        return _Failure(2, when, error) if isinstance(error, ParallelError) else _Failure(0, rank.rank, error)
    if rank.ended_by_us or not rank.failed:
        return None
    assert rank.code is not None and rank.ended_at is not None, f"{name} has not ended"
    if rank.code < 0:
        remedy = "run the same command again: it resumes from the last checkpoint"
        if -rank.code == signal.SIGKILL:
            remedy += "; where nobody killed it, the kernel may have for want of memory (see dmesg)"
        number = -rank.code
        died = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        severity = 3 if number == signal.SIGABRT else 1
        return _Failure(severity, rank.ended_at, ParallelError(1, name, f"died of {died}", remedy))
    error = ParallelError(3, name, f"ended with exit code {rank.code} and no report", "see its last output above")
    return _Failure(3, rank.ended_at, error)


def _kill(ranks: list[_Rank]) -> None:
    """End what still lives, at once and for certain. Checkpoints are safe: they are committed by a rename."""
    for rank in ranks:
        if rank.process.is_alive():
            rank.ended_by_us = True
            rank.process.kill()
    for rank in ranks:
        rank.process.join()
        _listen(rank)


def _failed_elsewhere(store: dist.Store | None) -> bool:
    """Whether another node's launcher has reported a failure, or node 0's is gone. Communicates with the store."""
    if store is None:
        return False
    try:
        return store.check([FAILURE_KEY])
    except RuntimeError:
        return True


def _agree_with_other_nodes(store: dist.Store | None, node: Node, failure: _Failure | None) -> _Failure | None:
    """Print the same cause on every node; node 0 keeps the store open until all launchers have read it.

    A consequence (severity 2 and 3: a peer's death seen from here) gives way to a cause that another node reports.
    """
    assert store is not None, f"{node.nnodes} nodes have a store"
    try:
        if failure is not None and failure.severity >= 2:
            _wait_until(lambda: store.check([FAILURE_KEY]), 2 * GRACE_SECONDS)
        if store.check([FAILURE_KEY]):
            failure = _Failure(0, 0, from_fields(json.loads(store.get(FAILURE_KEY))))
        elif failure is not None:
            store.set(FAILURE_KEY, json.dumps(to_fields(failure.error)))
        store.add(ENDED_KEY, 1)
        if node.node_rank == 0:
            _wait_until(lambda: store.add(ENDED_KEY, 0) >= node.nnodes, 10 * GRACE_SECONDS)
    except RuntimeError:
        lost = ParallelError(
            6, "the launcher of node 0", "is gone", "see its output; run the same command on every node"
        )
        return failure or _Failure(3, 0, lost)
    return failure


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The rank's side
# ---------------------------------------------------------------------------------------------------------------------


def _rank_main(
    entry: str, config: Config, rank: int, local_rank: int, node: Node, port: int, launcher: int, pipe: Connection
) -> None:
    """First function of a new process: run ``entry``, hand any error to the launcher, exit with its code."""
    _die_with(launcher)
    _on_stop_signals(lambda *_: None)  # what the training loop gives back at its end: a late signal changes nothing
    try:
        store = _connect(node, port, config.parallel.timeout_seconds) if node.world_size > 1 else None
        module, _, function = entry.partition(":")
        run_rank = getattr(importlib.import_module(module), function)
        code = run_rank(config, rank, local_rank, node.world_size, store, False)  # the launcher has checked the data
    except BaseException as error:
        known = from_exception(error, f"rank {rank}")
        pipe.send_bytes(
            json.dumps(
                {
                    "time": time.monotonic(),  # one clock for all processes of a machine
                    "error": None if known is None else to_fields(known),
                    "exception": " ".join(traceback.format_exception_only(error)).strip(),
                    "traceback": "".join(traceback.format_exception(error))[-20_000:].rstrip(),
                }
            ).encode()
        )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(known.exit_code if known is not None else ParallelError.exit_code)  # no teardown with a broken peer
    sys.exit(code)


def _die_with(launcher: int) -> None:
    """Have the kernel kill this process when its launcher dies, however that happens. Linux only."""
    import ctypes

    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the line above
        os._exit(ParallelError.exit_code)
