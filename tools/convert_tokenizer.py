#!/usr/bin/env python3
"""Convert a tokenizer to a Hugging Face folder whose ids equal its own on every text, or refuse.

    python tools/convert_tokenizer.py tokenizer.model hf_tokenizer/

    python tools/convert_tokenizer.py qwen.tiktoken hf_qwen/ --special-tokens '<|endoftext|>' '<|im_start|>'

From a sentencepiece .model or a .tiktoken vocabulary, tokenizer.json is derived; where none can give the ids of a
.model (unigram, word, models that normalise characters), the folder holds that, and AutoTokenizer loads a class that
calls sentencepiece. A given tokenizer.json (or a folder with one) is copied and its settings are completed. The folder
appears under its name only after AutoTokenizer has loaded it and given equal ids, and with a tokenizer.json equal text,
on all that the proof compares; otherwise nothing is left. More texts are compared by tools/verify_tokenizer.py.
"""

from __future__ import annotations

import time

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.progress import Activity
from megatron_hammer.tokenizer.convert import form_line, publish_tokenizer
from megatron_hammer.tokenizer.tiktoken_backend import add_tiktoken_pattern


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", metavar="TOKENIZER", help=".model, tokenizer.json, .tiktoken or a folder")
    parser.add_argument("output", metavar="DIR", help="a new or empty folder")
    add_tiktoken_pattern(parser)
    parser.add_argument("--special-tokens", nargs="+", default=[], metavar="NAME",
                        help="special tokens of a .tiktoken vocabulary, which its file leaves out, in the order of "
                        "their ids, which follow the last rank; <|endoftext|>, if named, ends documents")  # fmt: skip
    args = parser.parse_args()

    started = time.monotonic()
    with Activity("converting, and proving that the ids are equal"):
        tokenizer, why = publish_tokenizer(args.tokenizer, args.output, args.tiktoken_pattern, args.special_tokens)
    if tokenizer.assumption:
        print(f"note: {tokenizer.assumption}")
    print(f"{args.output}: {tokenizer.vocab_size:,} ids, proved equal to {tokenizer.path}, "
          f"{time.monotonic() - started:.1f} s")  # fmt: skip
    print(f"form: {form_line(why)}")


if __name__ == "__main__":
    run(main)
