"""Look into indexed datasets and into the order in which a run reads them.

    python tools/inspect_dataset.py stats PREFIX ... [--json]
    python tools/inspect_dataset.py show PREFIX N ... [--tokenizer T] [--tokens A:B] [--pieces] [--json]
    python tools/inspect_dataset.py verify PREFIX [--tokenizer T] [--held-out F.jsonl|PREFIX ...] [--json]
    python tools/inspect_dataset.py find PREFIX TEXT --tokenizer T [--limit N] [--json]
    python tools/inspect_dataset.py order CONFIG.yaml [group.field=value ...] [--start I --count N | --step N]
                                          [--document SOURCE:N] [--json]
    python tools/inspect_dataset.py plan CONFIG.yaml [group.field=value ...] [--json]

stats: documents, tokens (of each source too), lengths, largest id, and who made the dataset.
show: documents by number: where they came from, their ids, and what these spell.
verify: every checksum, id and document; duplicates, scripts, overlap with held-out sets. Exit code 0: sound, 3: damaged
    or not what its header says, 5: it holds documents of a held-out set. Everything found is printed before.
find: the documents that hold a text, however the tokenizer cut it there.
order: for each sample number of the run, its source, epoch and window, and the documents, offsets and lengths it reads,
    without what its ledger leaves out (train.output/ledger.jsonl, or train.replay);
    which of them data.fim has rearranged (piece 0 PSM 10+4+7: tokens of prefix, middle and suffix);
    with --step those of one step; with --document the samples and steps that read that document.
plan: tokens, epochs and repeats of each source in the whole run.
Several answers with --json are one JSON document a line.

A tokenizer is a sentencepiece .model, tokenizer.json, .tiktoken or a folder with one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, print_json, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import say
from megatron_hammer.base.streams import only_list

if TYPE_CHECKING:
    from megatron_hammer.config import Config
    from megatron_hammer.sampling.ledger import Rewind

COMMANDS_ON_CONFIGS = ("order", "plan")


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="inspect_dataset.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="stats|show|verify|find|order|plan")
    stats = commands.add_parser("stats", help="counts, lengths and origin of datasets")
    stats.add_argument("prefixes", nargs="+", metavar="PREFIX", help="P of P.bin and P.idx")

    show = commands.add_parser("show", help="documents by number")
    show.add_argument("prefix", metavar="PREFIX", help="P of P.bin and P.idx")
    show.add_argument("documents", type=int, nargs="+", metavar="N", help="number of a document, from 0")
    show.add_argument("--tokens", metavar="A:B", help="tokens A to B of each document, B not included (default: 0:400)")
    show.add_argument("--pieces", action="store_true", help="spell the pieces one by one, a mark between them")

    verify = commands.add_parser("verify", help="read everything, report everything")
    verify.add_argument("prefix", metavar="PREFIX", help="P of P.bin and P.idx")
    verify.add_argument("--held-out", nargs="+", default=[], metavar="SET",
                        help="JSON lines or prefixes that must share no document with PREFIX")  # fmt: skip
    verify.add_argument("--scratch", metavar="DIR",
                        help="folder for digests beyond 8 million documents (default: the system's)")  # fmt: skip

    find = commands.add_parser("find", help="the documents that hold a text")
    find.add_argument("prefix", metavar="PREFIX", help="P of P.bin and P.idx")
    find.add_argument("text", metavar="TEXT", help="what to look for, exactly as written")
    find.add_argument("--limit", type=int, default=10, metavar="N", help="stop after so many places (default: 10)")

    for command, required in ((show, False), (verify, False), (find, True)):
        command.add_argument(
            "--tokenizer",
            "--tokenizer-model",
            required=required,
            metavar="T",
            help="the one that made the dataset",
        )

    order = commands.add_parser("order", help="what samples of a run read")
    order.add_argument("--start", type=int, metavar="I", help="first sample number, from 0 (default: 0)")
    order.add_argument("--count", type=int, metavar="N",
                       help="how many samples (default: 8; with --document to the end of the run)")  # fmt: skip
    order.add_argument("--step", type=int, metavar="N",
                       help="the samples of step N, from 1; of one that was done, those that it read")  # fmt: skip
    order.add_argument("--document", metavar="SOURCE:N", help="when document N of this source of data.train is read")
    plan = commands.add_parser("plan", help="what a run draws from each source")
    for command in (order, plan):
        command.add_argument("config", metavar="CONFIG", help="the run's YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="group.field=value", help="as given to the training program"
        )
    for command in (stats, show, verify, find, order, plan):
        command.add_argument("--json", action="store_true", help="JSON instead of text")
    return parser


def parse_arguments() -> argparse.Namespace:
    """argparse takes overrides only directly after CONFIG; those that follow an option are picked up here."""
    command_line = parser()
    args: argparse.Namespace
    args, rest = command_line.parse_known_args()
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and args.command not in COMMANDS_ON_CONFIGS):
        command_line.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late) or late[0]}")
    if late:
        args.overrides += late
    return args


def show_stats(args: argparse.Namespace) -> None:
    from megatron_hammer.dataset.look.inspect import describe_dataset, format_stats
    from megatron_hammer.dataset.reader import IndexedDataset

    for number, prefix in enumerate(args.prefixes):
        facts = describe_dataset(IndexedDataset(prefix))
        if args.json:
            print_json(facts)
        else:
            print("\n" * (number > 0) + format_stats(facts), flush=True)


def show_documents(args: argparse.Namespace) -> None:
    from megatron_hammer.dataset.look.inspect import SHOWN_TOKENS, describe_document, format_document
    from megatron_hammer.dataset.look.matching import load_matching
    from megatron_hammer.dataset.reader import IndexedDataset
    from megatron_hammer.tokenizer.spelling import Speller

    if args.pieces and args.tokenizer is None:
        raise ConfigError(1, "--pieces", "needs --tokenizer", "name the tokenizer that made the dataset")
    span = (0, SHOWN_TOKENS) if args.tokens is None else parse_span(args.tokens)
    dataset = IndexedDataset(args.prefix)
    speller = None if args.tokenizer is None else Speller(load_matching(dataset, args.tokenizer))
    for number, document in enumerate(args.documents):
        facts = describe_document(dataset, document, span, speller, args.pieces)
        if args.json:
            print_json(facts)
        else:
            print("\n" * (number > 0) + format_document(args.prefix, facts))
    if speller is None and not args.json:
        print("note: ids only; --tokenizer T shows the text")


def parse_span(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ConfigError(1, f"--tokens {text}", "is not A:B", "write two numbers, as in 0:400")
    return int(first), int(last)


def verify(args: argparse.Namespace) -> None:
    from megatron_hammer.dataset.look.verify import verify_dataset
    from megatron_hammer.dataset.look.verify_report import format_report
    from megatron_hammer.tokenizer.load import load_tokenizer

    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    report = verify_dataset(args.prefix, tokenizer, args.held_out, args.scratch)
    if args.json:
        print_json(report.describe())
    else:
        print(format_report(report), flush=True)
    report.raise_if_unsound()


def find_text(args: argparse.Namespace) -> None:
    from megatron_hammer.base.progress import Progress
    from megatron_hammer.dataset.look.find import TextSearch, describe_match, format_match
    from megatron_hammer.dataset.look.matching import load_matching
    from megatron_hammer.dataset.reader import IndexedDataset
    from megatron_hammer.tokenizer.spelling import Speller

    if args.limit < 1:
        raise ConfigError(1, f"--limit {args.limit}", "must be at least 1", "raise it, or leave it out for 10")
    dataset = IndexedDataset(args.prefix)
    speller = Speller(load_matching(dataset, args.tokenizer))
    search = TextSearch(args.text, speller)
    size = dataset.num_tokens * dataset.dtype.itemsize
    found, started = 0, time.monotonic()
    with Progress(f"searching {dataset.bin_path}", size) as progress:
        for match in search.matches(dataset, progress):
            facts = describe_match(dataset, match, speller)
            if args.json:
                print_json(facts)
            else:
                print(format_match(facts), flush=True)
            found += 1
            if found == args.limit:
                break
    if not args.json:
        seconds = max(time.monotonic() - started, 1e-9)
        done = size if found < args.limit else progress.done
        rate = f"{done / 1e6:,.1f} of {size / 1e6:,.1f} MB of ids in {seconds:,.2f} s, {done / seconds / 1e6:,.0f} MB/s"
        print(f"{found} found{' (--limit)' if found == args.limit else ''}: {rate}")


def read_config(args: argparse.Namespace) -> Config:
    from megatron_hammer.config import load_config

    config = load_config(args.config, args.overrides)
    if not config.data.mixes:
        raise ConfigError(73, "data.train", "is absent, so there is no order", "add data.train=PREFIX")
    config.data.check()
    config.train.check()
    return config


def ledger_of(config: Config) -> tuple[Rewind, ...]:
    """What the run leaves out: by the ledger in its folder, else by the one that a new run would begin with."""
    from megatron_hammer.sampling.ledger import LEDGER, read_ledger
    from megatron_hammer.train.prepare import replayed

    ledger = read_ledger(Path(config.train.output) / LEDGER)
    return replayed(config) if ledger is None else ledger


def describe_ledger(ledger: tuple[Rewind, ...]) -> str:
    samples = sum(rewind.samples for rewind in ledger)
    return f"note: the run leaves out {samples:,} samples of its order, by the {len(ledger)} lines of its ledger"


def show_order(args: argparse.Namespace) -> None:
    from megatron_hammer.sampling.samples import describe_samples, open_train_data
    from megatron_hammer.train.past_sources import absent_sources, past_sources
    from megatron_hammer.train.prepare import in_progress

    config, course = in_progress(read_config(args))
    start, count = args.start, args.count
    if args.step is not None:
        if start is not None or count is not None:
            raise ConfigError(1, "--step", "excludes --start and --count", "give the one or the others")
        if args.step < 1:
            raise ConfigError(73, f"--step {args.step}", "must be at least 1", "count steps from 1")
        if args.step > config.train.num_steps:
            say(f"note: step {args.step:,} lies beyond train.num_steps={config.train.num_steps:,}, where the run ends")
        start = course.samples(args.step - 1)
        count = course.samples(args.step) - start
    start = 0 if start is None else start
    ledger = ledger_of(config)
    data = open_train_data(config, ledger=ledger, absent=absent_sources(past_sources(config)), course=course)
    if ledger and not args.json:
        print(describe_ledger(ledger))
    if args.document is not None:
        show_reads(args, data, start, course.num_samples if count is None else start + count, course)
        return
    samples = describe_samples(data, start, 8 if count is None else count)
    if args.json:
        print_json(samples)
        return
    print(f"{'sample':>10} {'epoch':>5} {'window':>10}  source: document[offset : offset + length] ...")
    for sample in samples:
        print(
            f"{sample['sample']:>10} {sample['epoch']:>5} {sample['window']:>10}  {sample['source']}: "
            f"{format_pieces(sample['pieces'])}{format_infills(sample.get('infills', []))}"
        )


def show_reads(args: argparse.Namespace, data: Any, start: int, end: int, course: Any) -> None:
    from megatron_hammer.sampling.reads import describe_read, document_reads, find_source

    name, colon, number = args.document.rpartition(":")
    if not (colon and name and number.isdecimal()):
        raise ConfigError(1, f"--document {args.document}", "is not SOURCE:N", "write it as P_text_document:17")
    reads = document_reads(data, find_source(data, name), int(number), start, end)
    described = [describe_read(read, course) for read in reads]
    if args.json:
        print_json(described)
        return
    print(f"{'step':>8} {'sample':>10} {'epoch':>5} {'window':>10}  document[offset : offset + length] ...")
    for read in described:
        pieces = format_pieces(read["pieces"])
        print(f"{read['step']:>8} {read['sample']:>10} {read['epoch']:>5} {read['window']:>10}  {pieces}")
    print(f"read by {len(described)} of the samples {start} to {end - 1}")


def format_pieces(pieces: list[dict[str, Any]]) -> str:
    return " ".join(f"{piece['document']}[{piece['offset']}:{piece['offset'] + piece['length']}]" for piece in pieces)


def format_infills(infills: list[dict[str, Any]]) -> str:
    """Which pieces, counted from 0, fill-in-the-middle has rearranged, with the tokens of prefix, middle, suffix."""
    each = (f"{x['piece']} {x['form']} {x['prefix']}+{x['middle']}+{x['suffix']}" for x in infills)
    return "".join(f"; piece {text}" for text in each)


def show_plan(args: argparse.Namespace) -> None:
    from megatron_hammer.sampling.plan import format_run_plan
    from megatron_hammer.train.prepare import plan_in_progress

    config, plan = plan_in_progress(read_config(args))
    if args.json:
        print_json(plan.describe())
    else:
        print(format_run_plan(plan))
        if ledger := ledger_of(config):
            print(describe_ledger(ledger))


def main() -> None:
    args = parse_arguments()
    if args.command != "verify":
        only_list()
    {
        "stats": show_stats,
        "show": show_documents,
        "verify": verify,
        "find": find_text,
        "order": show_order,
        "plan": show_plan,
    }[args.command](args)


if __name__ == "__main__":
    run(main)
