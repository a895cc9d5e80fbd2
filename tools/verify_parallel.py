"""Prove that a parallel layout computes what one process computes, on your own config, in a minute on two cores.

    python tools/verify_parallel.py CONFIG.yaml --nproc 8 [group.field=value ...]

The config is shrunk (widths, layers, vocabulary, length, batch; never what the ranks share: heads and groups, padding,
mask, tying, recompute, clipping), all ranks run two steps on CPUs, and loss, gradient norm, every parameter's gradient,
weights and moments after the steps and the checkpoint's tensors are compared with one process in fp64 and fp32, and
with transformers and a plain AdamW in fp64. The table shows the largest difference of each; below it stands what is
beyond its bound: the first tensor that differs, on which ranks, by how much, and what the pattern says of the cause.
Above it stands the likely cause by all differences together (whose tokens, which sum, which update), found by trying
known faults.

With --gpu the ranks run on GPUs in the precision and with the kernels of the config, against one process in fp32 on the
CPU: the bound is then that of 16-bit rounding, and finds swapped rows, factors and missing sums, no last bits.

    python tools/verify_parallel.py CONFIG.yaml --world 4096 [--rank 77] [group.field=value ...]

checks a layout of any size without its machines, and the config as it is: one rank is built and takes a step on tensors
that have no memory, and no other rank exists. The table shows the bytes of its weights, gradients,
optimizer and activations and every collective of a step, counted in the program and by the formulas of the forecast.

Exit code 0: equal within the bounds; 5: something differs.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Activity

if TYPE_CHECKING:
    from megatron_hammer.config import Config

SHOWN = 12


def main() -> int:
    parser = ArgumentParser(prog="verify_parallel.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the run")
    parser.add_argument("overrides", metavar="group.field=value", nargs="*", help="settings that replace the file's")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--nproc", type=int, metavar="N", help="ranks of the layout (all nodes together), each of which runs"
    )
    size.add_argument(
        "--world", type=int, metavar="N", help="ranks of the layout, of which only one is built and counted"
    )
    parser.add_argument(
        "--rank", type=int, default=0, metavar="R", help="with --world: the rank that is built (default: 0)"
    )
    parser.add_argument(
        "--gpu",
        action="store_true",
        help="run on the GPUs of this machine, with the config's precision and kernels; --nproc is their number",
    )
    arguments = parser.parse_intermixed_args()
    if arguments.world is None:
        parser.refuse_idle("without --world N", "--rank")
    name, ranks = ("nproc", arguments.nproc) if arguments.world is None else ("world", arguments.world)
    if ranks < 1:
        raise ConfigError(40, f"--{name}={ranks}", "must be at least 1", f"raise --{name}")
    if not 0 <= arguments.rank < ranks:
        raise ConfigError(40, f"--rank={arguments.rank}", f"must be from 0 to {ranks - 1}", "choose one of the ranks")
    from megatron_hammer.config import load_config
    from megatron_hammer.train.prepare import prepare

    written = load_config(arguments.config, [*arguments.overrides, "train.dry_run=true"])
    config = prepare(written, ranks).config  # checked, with the tokenizer's vocabulary
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return count(config, ranks, arguments.rank) if name == "world" else prove(config, ranks, arguments.gpu)


def count(config: Config, world_size: int, rank: int) -> int:
    """One rank, by the program and by formulas."""
    from megatron_hammer.verify.one_rank import compare_rank

    with Activity("counting") as note:
        note(f"rank {rank} of {world_size}: a step without memory")
        comparison = compare_rank(config, world_size, rank)
    print(*comparison.table(), *comparison.summary(), sep="\n")
    if comparison.left_out:
        print(f"not part of the count: {', '.join(comparison.left_out)}")
    print("DIFFERENT" if comparison.differs else f"equal: rank {rank} needs what the formulas say")
    return 5 if comparison.differs else 0


def prove(config: Config, world_size: int, on_gpus: bool) -> int:
    """All ranks against one process."""
    from megatron_hammer.verify.parallel import Proof, prove_layout

    with Activity("the proof", in_place=False) as note:
        proof = prove_layout(config, world_size, note, on_gpus=on_gpus)
    if not isinstance(proof, Proof):
        return proof
    print(*proof.table(), sep="\n")
    if proof.left_out:
        print(f"not part of the proof: {', '.join(proof.left_out)}")
    if not proof.findings:
        print(f"equal: {world_size} ranks compute what one process computes")
        return 0
    for cause in proof.causes:
        print(f"likely cause: {cause}")
    print(f"DIFFERENT in {len(proof.findings)} places; the first:")
    for finding in proof.findings[:SHOWN]:
        ranks = f" on ranks {', '.join(map(str, finding.ranks))}" if finding.ranks else ""
        cause = f": {finding.cause}" if finding.cause else ""
        print(f"  {finding.what}{ranks} by {finding.difference:.1e}{cause}")
    return 5


if __name__ == "__main__":
    run(main)
