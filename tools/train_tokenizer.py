#!/usr/bin/env python3
"""Train a sentencepiece tokenizer, BPE or unigram, on JSON lines, parquet or plain text.

    python tools/train_tokenizer.py --input zh.jsonl en.jsonl --output tokenizer/ --vocab-size 32000

The settings that are not options are HammerLLM's: byte fallback, digits split, pieces of white space alone allowed, no
normalisation, no dummy prefix; unk 0, bos 1, eos 2. Line breaks inside documents are learned. The same text gives the
same model, whatever the order of the files and the number of threads. Beside it a manifest says what it was made of:
inputs with their hashes, settings, sizes.

Unigram models can be used wherever a .model can, but not converted to a tokenizer.json: an export holds the .model, and
transformers loads it in a class that calls sentencepiece.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import get_args

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.corpus.arguments import add_json_key, add_on_error, add_text_documents
from megatron_hammer.corpus.documents import Skipped, TextCorpus
from megatron_hammer.tokenizer import train
from megatron_hammer.tokenizer.required_characters import TABLE_NAME, read_required
from megatron_hammer.tokenizer.symbols import read_symbols


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE",
        help=".jsonl, .parquet, .txt or .md, all but parquet also .gz and .zst; folders, patterns",
    )  # fmt: skip
    add_json_key(parser)
    add_text_documents(parser)
    parser.add_argument(
        "--output", required=True, metavar="DIR_OR_MODEL", help="a folder, or a name that ends in .model"
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="number of pieces, control and byte pieces included"
    )
    parser.add_argument("--allow-fewer", action="store_true",
                        help="train as many pieces as the text has where it cannot fill --vocab-size")  # fmt: skip
    parser.add_argument("--model-type", choices=get_args(train.ModelType), default="bpe",
                        help="the algorithm (default: bpe, HammerLLM's)")  # fmt: skip
    parser.add_argument("--character-coverage", type=float, default=0.9995,
                        help="share of characters with a piece; others use bytes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--user-defined-symbols", metavar="FILE", help="literal strings that stay whole, one a line")
    parser.add_argument("--required-characters", "--required-chars", metavar=f"FILE|{TABLE_NAME}",
                        help="characters that get a piece however rare: a file, or the 8,105 of the general standard "
                             "table")  # fmt: skip
    parser.add_argument("--max-sentence-bytes", type=int, default=train.MAX_SENTENCE_BYTES,
                        help="longest stretch of text seen at once (default: %(default)s)")  # fmt: skip
    parser.add_argument("--sample-bytes", type=int, default=train.SAMPLE_BYTES,
                        help="train on a sample of this size if there is more text (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", "--threads", type=int, default=1, metavar="N",
                        help="threads for counting, BPE only (default: 1)")  # fmt: skip
    add_on_error(parser, "OUTPUT.rejected.jsonl")
    args = parser.parse_args()

    started = time.monotonic()
    skipped = Skipped(args.on_error, Path(f"{args.output.rstrip('/')}.rejected.jsonl"))
    with skipped:
        tokenizer = train.train_tokenizer(
            TextCorpus(args.input, args.json_key, args.text_documents, skipped.on_bad),
            args.output,
            args.vocab_size,
            model_type=args.model_type,
            character_coverage=args.character_coverage,
            user_defined_symbols=read_symbols(args.user_defined_symbols) if args.user_defined_symbols else (),
            required_characters=read_required(args.required_characters).characters if args.required_characters else "",
            max_sentence_bytes=args.max_sentence_bytes,
            sample_bytes=args.sample_bytes,
            threads=args.workers,
            allow_fewer=args.allow_fewer,
            report=lambda line: print(line, file=sys.stderr, flush=True),
        )
    print(f"{tokenizer.path}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint}, "
          f"{time.monotonic() - started:.1f} s")  # fmt: skip
    print(*skipped.lines(), sep="\n", end="\n" if skipped.counts else "")


if __name__ == "__main__":
    run(main)
