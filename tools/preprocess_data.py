r"""JSON lines + tokenizer -> indexed dataset in Megatron-LM's format.

    python tools/preprocess_data.py --input zh.jsonl --tokenizer-model tokenizer.model --output-prefix data/zh \
        --append-eod --prepend-bos --workers 8

writes data/zh_text_document.bin, .idx and .meta.json (what made them, and checksums). Documents keep their order and
the files are the same for any number of workers. A malformed line ends the program with file and line; what the
output's name held before stays until the new files are complete.
"""

from __future__ import annotations

import os

from megatron_hammer.cli import ArgumentParser, run


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="preprocess_data.py", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help=".jsonl, .jsonl.gz or .jsonl.zst")
    parser.add_argument("--json-keys", nargs="+", default=["text"], metavar="KEY",
                        help="fields that hold text, each becomes a dataset (default: text)")  # fmt: skip
    parser.add_argument("--tokenizer-model", required=True, metavar="PATH",
                        help="sentencepiece .model, tokenizer.json or Hugging Face folder")  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.{bin,idx,meta.json}")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the tokenizer's eos id")
    parser.add_argument("--prepend-bos", action="store_true", help="begin every document with its bos id")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="threads that encode (default: all cores of this process)")  # fmt: skip
    return parser


def main() -> None:
    args = parser().parse_args()
    from megatron_hammer.data.build import build_datasets

    summaries = build_datasets(
        args.input,
        args.json_keys,
        args.tokenizer_model,
        args.output_prefix,
        append_eod=args.append_eod,
        prepend_bos=args.prepend_bos,
        workers=args.workers,
    )
    for summary in summaries:
        print(summary)


if __name__ == "__main__":
    run(main)
