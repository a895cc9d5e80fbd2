"""Draw the loss curve of a run: training, validation sets and learning rate.

python tools/plot_loss.py runs/pretrain_1b4 --output loss.png
"""

from __future__ import annotations

from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run


def main() -> None:
    parser = ArgumentParser(prog="plot_loss.py", description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run, with its metrics.jsonl")
    parser.add_argument("--output", metavar="PNG", type=Path, help="picture to write (default: RUN/loss.png)")
    parser.add_language("the picture")
    args = parser.parse_args()
    from megatron_hammer.metrics.plot import plot_loss

    output = args.output or args.run / "loss.png"
    curves = plot_loss(args.run, output, args.language)
    print(f"{output}: {len(curves.steps)} steps, {len(curves.valid)} validation sets")


if __name__ == "__main__":
    run(main)
