#!/usr/bin/env python3
"""Sample text to train a tokenizer on, and other text to judge it by.

    python tools/sample_corpus.py zh.jsonl en.jsonl.zst --output sample/ --train-mb 2000 --valid-mb 20 --seed 3407
    python tools/train_tokenizer.py --input sample/train.jsonl --output tokenizer/ --vocab-size 32000

writes DIR/train.jsonl, DIR/valid.jsonl (each a {"text": ...} a line) and DIR/manifest.json. The sample is uniform over
the distinct texts of all inputs; the parts share none. It depends on the seed and the texts alone, not on the order of
lines and files, and valid.jsonl stays the same when --train-mb changes. MB are 10^6 UTF-8 bytes of text; a part ends
with the document that reaches its size. To sample each source with a share of its own, run this once for each source.

(The corpus of the quick start is another thing: tools/make_sample_corpus.py.)
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.corpus.arguments import add_json_key, add_on_error
from megatron_hammer.corpus.sample import sample_corpus


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "inputs", nargs="+", metavar="F.jsonl", help="also .gz, .zst, .parquet, .txt; folders, patterns"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the sample")
    parser.add_argument("--train-mb", required=True, type=float, metavar="N")
    parser.add_argument(
        "--valid-mb", required=True, type=float, metavar="M", help="10^6 bytes of held-out text; 0: none"
    )
    parser.add_argument("--seed", required=True, type=int, help="any integer")
    add_json_key(parser)
    add_on_error(parser, "DIR/rejected.jsonl")
    args = parser.parse_args()
    train, valid = round(args.train_mb * 1e6), round(args.valid_mb * 1e6)
    print(sample_corpus(args.inputs, args.output, train, valid, args.seed, key=args.json_key, on_error=args.on_error))


if __name__ == "__main__":
    run(main)
