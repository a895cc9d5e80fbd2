#!/usr/bin/env python3
"""Turn a published source into one document a line, {"text": "..."}.

    python tools/reformat_corpus.py chinesewebtext ChineseWebText/ --output zh.jsonl --max-gb 563
    python tools/reformat_corpus.py refinedweb falcon-refinedweb/data/ --output en.jsonl.zst --max-gb 504
    python tools/reformat_corpus.py pile pile/train/ --set ArXiv --output arxiv.jsonl
    python tools/reformat_corpus.py pile pile/train/ --output sets/
    python tools/reformat_corpus.py jsonl my/*.jsonl.gz --json-keys body --output my.jsonl
    python tools/reformat_corpus.py parquet my.parquet --json-keys content --keep url score --output my.jsonl
    python tools/reformat_corpus.py text novels/ --output novels.jsonl

chinesewebtext is jsonl with "text", refinedweb parquet with "content", pile jsonl with "text" and meta.pile_set_name
(without --set every set becomes a file in the folder --output); text is .txt or .md, whose documents stand between
empty lines (--text-documents). jsonl and text files may be .gz or .zst; a folder stands for all files of the kind's
format in and below it, sorted. Texts are not changed and keep their order; empty ones are left out and counted.

--max-gb counts 10^9 UTF-8 bytes of text in an output, which ends before the first document that does not fit.

Bad records end the program with file and line; --on-error skip leaves them out, with exact counts for each cause, and
quarantine writes them to OUT.rejected.jsonl too. A manifest beside the output (OUT.manifest.json) says sources, sizes,
hashes and counts.

Quality filters are your own program's: keep the fields that it needs and pipe the lines through it, for example
    python tools/reformat_corpus.py chinesewebtext in/ --keep score --output all.jsonl
    jq -c 'select(.score >= 0.9)' all.jsonl > good.jsonl
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.corpus import reformat
from megatron_hammer.corpus.arguments import ON_ERROR, add_text_documents


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=reformat.KINDS)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders or patterns")
    parser.add_argument("--output", required=True, metavar="F.jsonl", help="also .gz, .zst; a folder for pile sets")
    parser.add_argument("--json-keys", "--json-key", "--key", "--column", dest="key", metavar="KEY",
                        help="field or column that holds the text (default: text; refinedweb: content)")  # fmt: skip
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="NAME",
                        help="pile only, may be repeated: take this pile_set_name")  # fmt: skip
    parser.add_argument("--keep", nargs="+", default=[], metavar="FIELD", help="fields to copy beside the text")
    parser.add_argument("--max-gb", type=float, metavar="N", help="most text in an output (default: all)")
    add_text_documents(parser)
    parser.add_argument("--on-error", choices=ON_ERROR, default="stop", help="(default: stop)")
    args = parser.parse_args()
    if args.sets and args.kind != "pile":
        parser.error("--set is for pile")
    summary = reformat.reformat_corpus(
        args.kind,
        args.inputs,
        args.output,
        key=args.key,
        sets=args.sets,
        keep=args.keep,
        max_bytes=None if args.max_gb is None else round(args.max_gb * 1e9),
        on_error=args.on_error,
        text_documents=args.text_documents,
    )
    print("\n".join(summary.lines()))


if __name__ == "__main__":
    run(main)
