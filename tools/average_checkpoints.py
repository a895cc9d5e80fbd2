#!/usr/bin/env python3
"""Average the weights of checkpoints: the last ones of a run, or any of one model.

    python tools/average_checkpoints.py RUN --last 5 --output averaged/
    python tools/average_checkpoints.py RUN/checkpoints/step-00001000 RUN/checkpoints/step-00002000 --output averaged/
    python tools/average_checkpoints.py RUN --last 10 --ema 0.9 --output averaged/

DIR becomes a checkpoint of step 0 with weights alone, as an imported model: export it with checkpoint_to_hf.py, or
begin a run from it with checkpoint.init_from=DIR. Sums are made in fp64 and rounded once.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.progress import Activity


def main() -> None:
    parser = ArgumentParser(prog="average_checkpoints.py", description=__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoints, oldest first; or one run")
    parser.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints of one run")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="weight of each checkpoint (default: all equal)"
    )
    parser.add_argument("--ema", type=float, metavar="D", help="exponential moving average with decay D, oldest first")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    args = parser.parse_args()

    from megatron_hammer.checkpoint.average import average_checkpoints, choose_checkpoints, shares_of

    chosen = choose_checkpoints(args.checkpoints, args.last)
    shares = shares_of(len(chosen), args.weights, args.ema)
    with Activity("averaging"):
        target = average_checkpoints(chosen, shares, args.output)
    for checkpoint, share in zip(chosen, shares, strict=True):
        print(f"{share:8.4f}  {checkpoint.folder} (step {checkpoint.step:,})")
    print(f"wrote {target}; export it: python tools/checkpoint_to_hf.py --load {args.output} --output DIR")


if __name__ == "__main__":
    run(main)
