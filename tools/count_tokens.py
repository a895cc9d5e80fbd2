#!/usr/bin/env python3
"""Count documents, bytes and tokens: the table that a corpus is published with, a row a source.

    python tools/count_tokens.py zh=data/zh_text_document en=data/en_text_document code=data/code_text_document
    python tools/count_tokens.py zh=zh.jsonl en=en/*.jsonl.zst --tokenizer tokenizer.model
    python tools/count_tokens.py zh=data/zh_text_document --tokenizer tokenizer.model --json

A source is NAME=PATH or PATH. PATH is the prefix P of a dataset where P.idx exists: its documents and tokens come from
the index, its .bin is not read. With --tokenizer it is, for the bytes of text that its ids stand for. Else PATH is text
(.jsonl, .gz, .zst, .parquet, .txt, a folder or a quoted pattern), whose tokens --tokenizer counts, on all cores. Equal
names add up. "-": not known from what was given.

A line is an entry of the corpus, a document one that has any text. Tokens of text do not include ids that mark a
document's beginning and end; those of a dataset do, where it was made with them.
"""

from __future__ import annotations

from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.streams import only_list
from megatron_hammer.base.system import usable_cores
from megatron_hammer.corpus.arguments import add_json_key


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+", metavar="[NAME=]PATH", help="dataset prefix or text")
    parser.add_argument(
        "--tokenizer",
        "--tokenizer-model",
        metavar="T",
        help="sentencepiece .model, tokenizer.json, .tiktoken or a folder with one",
    )
    add_json_key(parser)
    parser.add_argument("--workers", "--threads", type=int, default=usable_cores(), metavar="N",
                        help="threads that encode (default: all cores of this process)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    only_list()
    import orjson

    from megatron_hammer.dataset.look.count import count_tokens

    sources = []
    for item in args.sources:
        name, equals, path = item.partition("=")
        named = equals and name and path and "/" not in name  # else the "=" is part of a path
        sources.append((name, path) if named else (Path(item).name, item))
    table = count_tokens(sources, args.tokenizer, args.json_key, args.workers)
    print(orjson.dumps(table.to_json(), option=orjson.OPT_INDENT_2).decode() if args.json else table)


if __name__ == "__main__":
    run(main)
