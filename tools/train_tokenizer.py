#!/usr/bin/env python3
"""Train a sentencepiece BPE tokenizer on JSON lines.

    python tools/train_tokenizer.py --input zh.jsonl en.jsonl --output tokenizer/ --vocab-size 32000

The settings that are not options are HammerLLM's: byte fallback, digits split, pieces of white space alone allowed, no
normalisation, no dummy prefix; unk 0, bos 1, eos 2. Line breaks inside documents are learned. The same text gives the
same model, whatever the order of the files and the number of threads.
"""

from __future__ import annotations

import sys
import time

from megatron_hammer.cli import ArgumentParser, run
from megatron_hammer.corpus.jsonl import JsonlCorpus
from megatron_hammer.tokenizer import train
from megatron_hammer.tokenizer.characters import TABLE_NAME, read_required


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="F.jsonl", help="text (.jsonl, .jsonl.gz, .jsonl.zst)"
    )
    parser.add_argument("--json-key", default="text", help="the field that holds the text (default: text)")
    parser.add_argument(
        "--output", required=True, metavar="DIR_OR_MODEL", help="a folder, or a name that ends in .model"
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="number of pieces, control and byte pieces included"
    )
    parser.add_argument("--character-coverage", type=float, default=0.9995,
                        help="share of characters with a piece; others use bytes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--user-defined-symbols", metavar="FILE", help="literal strings that stay whole, one a line")
    parser.add_argument("--required-characters", "--required-chars", metavar=f"FILE|{TABLE_NAME}",
                        help="characters that get a piece however rare: a file, or the 8,105 of the general standard "
                             "table")  # fmt: skip
    parser.add_argument("--max-sentence-bytes", type=int, default=train.MAX_SENTENCE_BYTES,
                        help="longest stretch of text seen at once (default: %(default)s)")  # fmt: skip
    parser.add_argument("--sample-bytes", type=int, default=train.SAMPLE_BYTES,
                        help="of more text than this, a sample is used (default: %(default)s)")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="threads for counting (default: 1)")
    args = parser.parse_args()

    started = time.monotonic()
    tokenizer = train.train_tokenizer(
        JsonlCorpus(args.input, args.json_key),
        args.output,
        args.vocab_size,
        character_coverage=args.character_coverage,
        user_defined_symbols=train.read_symbols(args.user_defined_symbols) if args.user_defined_symbols else (),
        required_characters=read_required(args.required_characters).characters if args.required_characters else "",
        max_sentence_bytes=args.max_sentence_bytes,
        sample_bytes=args.sample_bytes,
        threads=args.threads,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"{tokenizer.path}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint}, "
          f"{time.monotonic() - started:.1f} s")  # fmt: skip


if __name__ == "__main__":
    run(main)
