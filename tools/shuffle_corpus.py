#!/usr/bin/env python3
"""Put the lines of text files of any size into random order, and merge several files on the way.

    python tools/shuffle_corpus.py zh.jsonl --output zh.shuffled.jsonl --seed 3407
    python tools/shuffle_corpus.py zh.jsonl en.jsonl.zst code.jsonl.gz --output mix.jsonl --seed 1 --memory-mb 8000

Every order is equally likely. Several inputs are merged at random in proportion to their lines: that is what a shuffle
of all their lines is, so no second shuffle is needed. The same inputs (in the same order) and seed give the same bytes,
whatever the memory and the compression. Lines are not parsed; they must not be empty and must end in a line break
(or --on-error leaves them out).

Text that does not fit into --memory-mb goes through temporary files of the same size beside the output: two reads and
two writes in all. They are removed at the end and after errors; those of a killed run are removed by the next run with
the same output, which begins anew. Up to about 1000 times the memory this way takes two passes, beyond that three.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.corpus import shuffle
from megatron_hammer.corpus.arguments import add_on_error


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="F.jsonl", help="plain, .gz or .zst")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="appears when it is complete")
    parser.add_argument("--seed", required=True, type=int, help="any integer")
    parser.add_argument("--memory-mb", type=int, default=shuffle.DEFAULT_MEMORY_BYTES // 1_000_000, metavar="M",
                        help="10^6 bytes of memory to use, beside the longest line (default: %(default)s)")  # fmt: skip
    parser.add_argument("--temporary", metavar="DIR", help="folder for temporary files (default: the output's)")
    add_on_error(parser, "OUT.rejected.jsonl", "an empty line, or a last one without a line break")
    args = parser.parse_args()
    memory = args.memory_mb * 1_000_000
    print(shuffle.shuffle_lines(args.inputs, args.output, args.seed, memory, args.temporary, args.on_error))


if __name__ == "__main__":
    run(main)
