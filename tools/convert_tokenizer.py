#!/usr/bin/env python3
"""Convert a tokenizer to a Hugging Face folder whose ids equal its own on every text, or refuse.

    python tools/convert_tokenizer.py tokenizer.model hf_tokenizer/

From a sentencepiece .model, tokenizer.json is derived; a given tokenizer.json (or a folder with one) is copied and its
settings are completed. The folder appears under its name only after AutoTokenizer has loaded it and given equal ids and
equal text on all that the proof compares; otherwise nothing is left. tools/verify_tokenizer.py compares more texts.
"""

from __future__ import annotations

import time

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.tokenizer.convert import publish_tokenizer


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="sentencepiece .model, tokenizer.json or a folder")
    parser.add_argument("output", metavar="DIR", help="a new or empty folder")
    args = parser.parse_args()

    started = time.monotonic()
    tokenizer = publish_tokenizer(args.tokenizer, args.output)
    print(f"{args.output}: {tokenizer.vocab_size:,} ids, proved equal to {tokenizer.path}, "
          f"{time.monotonic() - started:.1f} s")  # fmt: skip


if __name__ == "__main__":
    run(main)
