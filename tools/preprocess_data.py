r"""Tokenize text into an indexed dataset in Megatron-LM's format.

    python tools/preprocess_data.py --input zh.jsonl --tokenizer-model tokenizer.model --output-prefix data/zh \
        --append-eod --prepend-bos --workers 8

writes data/zh_text_document.bin, .idx and .meta.json (what made them, and checksums). Documents keep their order and
the files are the same for any number of workers. What the output's name held before stays until the new files are
complete.

Inputs are files, folders (all corpora in them, sorted) or quoted patterns: JSON lines (.jsonl and any other name; .gz
and .zst are decompressed), parquet (.parquet: the keys are columns), plain text (.txt, .md, also .gz, .zst).

A malformed document ends the program with its file, line and byte; --on-error skip or quarantine leaves it out and
counts it. A program that was killed or stopped goes on when the same command is given again.

The command lines of Megatron-LM's and GPT-NeoX's programs of this name run here as they are.

    python tools/preprocess_data.py ... --engine ray --address auto

makes the same files on a Ray cluster. Every node needs megatron_hammer[ray] of one version, and sees inputs, tokenizer
and output under the same paths; the output's file system needs room for the tokens twice. Plain .jsonl and parquet
files are cut into shards, which become the tasks; a compressed file is one. Without --address a cluster of this machine
is started for the run.
"""

from __future__ import annotations

import functools
import signal
import sys

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.paths import check_output_prefix
from megatron_hammer.base.progress import say
from megatron_hammer.base.signals import Stopped, StopRequest
from megatron_hammer.base.system import usable_cores
from megatron_hammer.corpus.arguments import add_on_error, add_text_documents
from megatron_hammer.dataset.make import megatron


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="preprocess_data.py", description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="files, folders or quoted patterns")
    parser.add_argument("--json-keys", "--json-key", "--jsonl-keys", nargs="+", default=["text"], metavar="KEY",
                        help="fields or columns that hold text; each becomes a dataset (default: text)")  # fmt: skip
    add_text_documents(parser)
    parser.add_argument("--tokenizer-model", "--tokenizer", metavar="PATH",
                        help="sentencepiece .model, tokenizer.json, .tiktoken or a folder with one; "
                        "required")  # fmt: skip
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.{bin,idx,meta.json}")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the tokenizer's eos id")
    parser.add_argument("--prepend-bos", action="store_true", help="begin every document with its bos id")
    parser.add_argument("--workers", "--threads", type=int, metavar="N",
                        help="threads that parse and encode, on a cluster in all (default: all cores of this process, "
                        "with --address all of the cluster)")  # fmt: skip
    add_on_error(parser, "P_KEY_document.rejected.jsonl, KEY being the first", "a malformed document")
    parser.add_argument("--shard-mb", type=float, default=1024, metavar="MB",
                        help="text between two points from which a killed run can resume; with --engine ray, text of a "
                        "task (default: 1024)")  # fmt: skip
    parser.add_argument("--restart", action="store_true", help="begin again, whatever an interrupted run has left")
    parser.add_argument("--engine", choices=("local", "ray"), default="local",
                        help="work in threads of this process, or on a Ray cluster (default: local)")  # fmt: skip
    parser.add_argument("--address", metavar="A",
                        help="with --engine ray: a running cluster, host:port, or auto for this machine's")  # fmt: skip
    parser.add_argument("--workers-per-task", type=int, metavar="N",
                        help="with --engine ray: threads of a task, which takes as many CPUs (default: 1)")  # fmt: skip
    megatron.add_options(parser)
    return parser


def main() -> int:
    arguments = parser()
    args = arguments.parse_args()
    if args.engine == "local":
        arguments.refuse_idle("without --engine ray", "--address", "--workers-per-task")
    command = megatron.translate(args)
    check_output_prefix("--output-prefix", args.output_prefix, f"_{args.json_keys[0]}_document.idx")
    from megatron_hammer.dataset.make.job import prepare_job, remarks

    if args.engine == "ray":
        from megatron_hammer.dataset.make.ray import build_datasets_on_ray

        tasks = 1 if args.workers_per_task is None else args.workers_per_task
        build = functools.partial(build_datasets_on_ray, workers=args.workers, address=args.address, task_workers=tasks)
    else:
        from megatron_hammer.dataset.make.local import build_datasets

        workers = usable_cores() if args.workers is None else args.workers
        build = functools.partial(build_datasets, workers=workers)
    with StopRequest((signal.SIGINT, signal.SIGTERM), once=True) as signals:
        try:
            job = prepare_job(
                command.inputs,
                args.json_keys,
                command.tokenizer,
                args.append_eod,
                args.prepend_bos,
                args.on_error,
                args.text_documents,
            )
            notes: list[str] = []
            if command.type_name is not None:
                job, notes = megatron.fit_job(command, job)
            for note in (*notes, *command.notes, *remarks(job)):
                say(f"note: {note}")
            summaries = build(
                job,
                args.output_prefix,
                shard_bytes=int(args.shard_mb * 1e6),
                restart=args.restart,
                stop=signals.event,
            )
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return signals.exit_code
    for summary in summaries:
        print(summary)
    return 0


if __name__ == "__main__":
    run(main)
