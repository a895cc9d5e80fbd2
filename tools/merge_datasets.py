"""Join indexed datasets into one.

    python tools/merge_datasets.py P1 P2 [...] --output P [--dtype int32]

P1, P2, ... are prefixes of .bin and .idx files, of this project or of Megatron-LM. The result holds the documents of
the first, then those of the second, and so on, byte for byte as Megatron-LM would join them. Datasets of different
tokenizers are refused.
"""

from __future__ import annotations

import sys

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run

DTYPES = ("uint8", "int8", "int16", "uint16", "int32", "int64", "float32", "float64")


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="merge_datasets.py", description=__doc__)
    parser.add_argument("prefixes", nargs="+", metavar="P", help="datasets to join, in this order")
    parser.add_argument("--output", "--output-prefix", required=True, metavar="P", help="prefix of the result")
    parser.add_argument("--dtype", choices=DTYPES, help="token type of the result, where the datasets differ in theirs")
    return parser


def main() -> None:
    args = parser().parse_args()
    from megatron_hammer.dataset.make.merge import merge_datasets

    summary = merge_datasets(args.prefixes, args.output, args.dtype)
    for note in summary.notes:
        print(note, file=sys.stderr)
    print(summary)


if __name__ == "__main__":
    run(main)
