#!/usr/bin/env python3
"""Begin a child run from a checkpoint of another: an annealing, another mix, a longer context. The parent is untouched.

    python tools/branch.py RUN --step 40000 --output NEW --tokens 20e9 'data.train={data/zh: 1, data/en: 3}'
    python tools/branch.py RUN --output NEW --tokens 5e9 data.seq_length=32768 model.rope_theta=1000000
    bash NEW/branch.sh

NEW gets a copy of the checkpoint, the metrics up to it, branch.yaml and branch.sh, which trains it. Another mix, length
or RoPE becomes a further phase (docs/data.md), in which each source goes on where the parent has left it. With --tokens
the learning rate goes from that of the checkpoint straight to optimizer.min_lr over this budget; without, the schedule
is what the overrides make of the parent's.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.characters import number_meant
from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Activity


def main() -> None:
    parser = ArgumentParser(prog="branch.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the parent run, or one of its checkpoints")
    parser.add_argument(
        "overrides", nargs="*", metavar="group.field=value", help="settings of the child that differ from the parent's"
    )
    parser.add_argument("--step", type=int, metavar="N", help="step of the parent's checkpoint (default: its newest)")
    parser.add_argument("--output", required=True, metavar="NEW", help="a new folder: train.output of the child")
    parser.add_argument(
        "--tokens", metavar="T", help="length of the child in tokens, over which the learning rate falls"
    )
    args = parser.parse_intermixed_args()
    try:
        tokens = None if args.tokens is None else int(float(args.tokens))
    except (ValueError, OverflowError):
        meant = number_meant(args.tokens, whole=True)
        remedy = f"write {meant}" if meant else "write it as 20e9"
        raise ConfigError(1, f"--tokens {args.tokens}", "is no number", remedy) from None

    from megatron_hammer.train.branch import make_branch

    with Activity("copying the parent's checkpoint"):
        branch = make_branch(args.run, args.step, args.output, args.overrides, tokens)
    print(*branch.describe(), sep="\n")


if __name__ == "__main__":
    run(main)
