r"""Text + tokenizer -> indexed dataset in Megatron-LM's format.

    python tools/preprocess_data.py --input zh.jsonl --tokenizer-model tokenizer.model --output-prefix data/zh \
        --append-eod --prepend-bos --workers 8

writes data/zh_text_document.bin, .idx and .meta.json (what made them, and checksums). Documents keep their order and
the files are the same for any number of workers. What the output's name held before stays until the new files are
complete.

Inputs are files, folders (all corpora in them, sorted) or quoted patterns: JSON lines (.jsonl and any other name; .gz
and .zst are decompressed), parquet (.parquet: the keys are columns), plain text (.txt, also .gz, .zst).

A malformed document ends the program with its file, line and byte; --on-error skip or quarantine leaves it out and
counts it. A program that was killed or stopped goes on when the same command is given again.
"""

from __future__ import annotations

import os
import sys

from megatron_hammer.cli import ArgumentParser, StopOnSignal, run


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="preprocess_data.py", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, folders or quoted patterns")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY",
                        help="fields or columns that hold text, each becomes a dataset (default: text)")  # fmt: skip
    parser.add_argument("--text-documents", choices=("file", "line", "blank-line"), default="file",
                        help="a document of a .txt file is: all of it, each line that is not empty, or what stands "
                        "between empty lines (default: file)")  # fmt: skip
    parser.add_argument("--tokenizer-model", required=True, metavar="PATH",
                        help="sentencepiece .model, tokenizer.json or Hugging Face folder")  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.{bin,idx,meta.json}")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the tokenizer's eos id")
    parser.add_argument("--prepend-bos", action="store_true", help="begin every document with its bos id")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="threads that parse and encode (default: all cores of this process)")  # fmt: skip
    parser.add_argument("--on-error", choices=("stop", "skip", "quarantine"), default="stop",
                        help="a malformed document: end, leave it out, or also write it to "
                        "P_KEY_document.rejected.jsonl, KEY being the first (default: stop)")  # fmt: skip
    parser.add_argument("--shard-mb", type=float, default=1024, metavar="MB",
                        help="text between two points to go on from after a kill (default: 1024)")  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="begin again, whatever an interrupted run has left")
    return parser


def main() -> int:
    args = parser().parse_args()
    from megatron_hammer.data.build import Stopped, build_datasets

    with StopOnSignal() as signals:
        try:
            summaries = build_datasets(
                args.input,
                args.json_keys,
                args.tokenizer_model,
                args.output_prefix,
                append_eod=args.append_eod,
                prepend_bos=args.prepend_bos,
                workers=args.workers,
                on_error=args.on_error,
                text_documents=args.text_documents,
                shard_bytes=int(args.shard_mb * 1e6),
                restart=args.restart,
                stop=signals.stop,
            )
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return signals.exit_code
    for summary in summaries:
        print(summary)
    return 0


if __name__ == "__main__":
    run(main)
