#!/usr/bin/env python3
"""Compare two tokenizers id by id, on given texts and on a seeded corpus of texts that tokenizers find hard.

    python tools/verify_tokenizer.py tokenizer.model hf_folder --texts valid.jsonl --fuzz 100000

Each is a sentencepiece .model, a tokenizer.json, or a Hugging Face folder. A folder is loaded as its users load it,
AutoTokenizer.from_pretrained(FOLDER), and asked with add_special_tokens=False; where its tokenizer_config.json says
what is added (at most bos), the default call tokenizer(text) must give the same ids too, behind bos. Vocabulary sizes
and special ids are compared as well.

The fuzz corpus holds simplified and traditional Chinese, English, code, emoji, control bytes, NUL, literal special
tokens, runs of spaces, U+2581, pieces of both vocabularies glued at random, and user-defined symbols whole and broken.
Two sentencepiece models are also given bytes that are no UTF-8.

Exit code 0: equal, with counts. Exit code 5: they differ, and the first difference is shown in context.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.progress import Activity
from megatron_hammer.corpus.arguments import add_json_key
from megatron_hammer.corpus.documents import read_texts
from megatron_hammer.corpus.readers import expand_inputs
from megatron_hammer.tokenizer.lab.verify import compare_tokenizers


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("a", metavar="A", help="sentencepiece .model, tokenizer.json or Hugging Face folder")
    parser.add_argument("b", metavar="B", help="the tokenizer to compare with it")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="texts: .jsonl, .parquet, .txt, folders, patterns",
    )
    add_json_key(parser)
    parser.add_argument(
        "--fuzz", type=int, default=10_000, metavar="N", help="number of fuzz texts (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=3407, help="seed of the fuzz texts (default: %(default)s)")
    args = parser.parse_args()

    texts = {
        str(path): (text for texts, _ in read_texts(path, args.json_key) for text in texts)
        for path in expand_inputs(args.texts)
    }
    with Activity("comparing"):
        comparison = compare_tokenizers(args.a, args.b, texts, args.fuzz, args.seed)
    print("\n".join(comparison.lines()), flush=True)
    if error := comparison.error():
        raise error


if __name__ == "__main__":
    run(main)
