#!/usr/bin/env python3
"""Hold out documents by a hash of their text.

    python tools/split_corpus.py zh.jsonl --output-prefix data/zh --valid-fraction 0.001 --seed 3407
    python tools/split_corpus.py zh.jsonl.zst --output-prefix data/zh --valid-documents 5000 --seed 3407
    python tools/split_corpus.py my_texts/ --output-prefix data/mine --valid-fraction 0.01 --seed 3407

writes P.train.jsonl, P.valid.jsonl (lines as they are, in their order; plain text as lines {"text": ...}) and
P.split.json (settings, sources, hashes).
With --valid-fraction the same text falls on the same side in every file and every run of one seed: copies of a held-out
text do not stay in the training set, and a corpus that grows keeps its held-out texts. --valid-documents holds out
exactly N distinct texts and their copies; P.split.json then says the fraction that this is.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.corpus.arguments import add_json_key, add_on_error, add_text_documents
from megatron_hammer.corpus.split import split_corpus


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("inputs", nargs="+", metavar="FILE",
                        help=".jsonl, .txt or .md, also .gz, .zst; folders, patterns")  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="P", help="prefix of the three files")
    parser.add_argument("--seed", required=True, type=int, help="any integer: another one holds out other texts")
    add_json_key(parser, "the field that holds the text")
    held_out = parser.add_mutually_exclusive_group(required=True)
    held_out.add_argument("--valid-fraction", type=float, metavar="F", help="expected share of texts held out")
    held_out.add_argument("--valid-documents", type=int, metavar="N", help="distinct texts held out")
    add_text_documents(parser)
    add_on_error(parser, "P.rejected.jsonl")
    args = parser.parse_args()
    summary = split_corpus(
        args.inputs,
        args.output_prefix,
        args.seed,
        valid_fraction=args.valid_fraction,
        valid_documents=args.valid_documents,
        key=args.json_key,
        on_error=args.on_error,
        text_documents=args.text_documents,
    )
    print(summary)


if __name__ == "__main__":
    run(main)
