#!/usr/bin/env python3
"""Compare tokenizers side by side: compression, coverage of Chinese characters, make-up and price of the vocabulary.

    python tools/analyze_tokenizer.py compression A.model B.model --texts zh=zh.jsonl en=en.jsonl --pictures out/
    python tools/analyze_tokenizer.py coverage A.model hf-folder/ --pictures out/
    python tools/analyze_tokenizer.py vocabulary A.model tokenizer.json --texts zh=zh.jsonl
    python tools/analyze_tokenizer.py price A.model B.model --config config.yaml --texts zh=zh.jsonl

A tokenizer is a sentencepiece .model, a tokenizer.json, a .tiktoken vocabulary or a Hugging Face folder; each is a row
of the table. A .tiktoken vocabulary does not say how it cuts texts into words: --tiktoken-pattern does, else its name.

compression: bytes per token, and tokens compared with the reference (lower is better), by domain and overall; MB/s.
coverage: share of the characters that are one piece, by level of the Table of General Standard Chinese Characters
(3,500 + 3,000 + 1,605), then of each Unicode block of Han characters without those of the table.
vocabulary: pieces by script and length; with --texts, pieces that no text uses and byte pieces among the tokens.
price: for a model's config, what the vocabulary costs (FLOPs of the head, logits, parameters), what it saves (tokens a
byte), and the size at which training reads most bytes a second, from smaller vocabularies cut out of each tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, print_json, run
from megatron_hammer.base.language import Language
from megatron_hammer.base.system import usable_cores
from megatron_hammer.tokenizer.tiktoken_backend import add_tiktoken_pattern


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="analyze_tokenizer.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="compression|coverage|vocabulary|price")
    for name, explanation in (
        ("compression", "bytes per token on texts"),
        ("coverage", "Chinese characters that are one piece"),
        ("vocabulary", "lengths, scripts and use of the pieces"),
        ("price", "what the vocabulary costs a model and saves it; the best size"),
    ):
        command = commands.add_parser(name, help=explanation)
        command.add_argument(
            "tokenizers",
            nargs="+",
            metavar="TOKENIZER",
            help=".model, tokenizer.json, .tiktoken or a folder",
        )
        add_tiktoken_pattern(command)
        if name != "coverage":
            command.add_argument("--texts", nargs="+", action="extend", metavar="name=F.jsonl",
                                 required=name in ("compression", "price"),
                                 help="text by domain; a name may have several files")  # fmt: skip
            command.add_argument("--workers", "--threads", type=int, default=usable_cores(), metavar="N",
                                 help="threads that encode (default: all cores of this process)")  # fmt: skip
        if name == "price":
            command.add_argument("--config", required=True, metavar="YAML",
                                 help="the model, its sequence length, micro-batch and precision; its vocab_size is "
                                      "not used")  # fmt: skip
            command.add_argument("--sample-bytes", type=int, metavar="N",
                                 help="text encoded at each size, of each domain (default: 8,000,000)")  # fmt: skip
        if name in ("compression", "price"):
            command.add_argument("--reference", metavar="TOKENIZER",
                                 help="what the others are compared with (default: the last TOKENIZER named; "
                                      "the published figures compare with Llama-2)")  # fmt: skip
        command.add_argument("--json", action="store_true", help="one JSON document instead of tables")
        command.add_argument("--pictures", metavar="DIR", type=Path, help="folder for a picture, COMMAND.png")
        command.add_argument("--report", metavar="HTML", type=Path, help="page with tables and picture in one file")
        command.add_language("the picture")
    return parser


class Analysis(NamedTuple):
    """What a command found."""

    facts: dict[str, Any]
    """For ``--json``."""
    tables: list[Any]
    draw: Callable[[Language], bytes]
    """Makes the picture."""
    notes: Sequence[str] = ()
    """Sentences below the tables."""


def count(args: argparse.Namespace, tokenizers: dict[str, Any], domains: dict[str, list[Path]]) -> Any:
    from megatron_hammer.base.progress import Progress
    from megatron_hammer.corpus.documents import TextCorpus
    from megatron_hammer.tokenizer.lab.analyze import count_usage

    texts = {name: TextCorpus(paths) for name, paths in domains.items()}
    with Progress("encoding", None) as shown:
        return count_usage(
            tokenizers, texts, args.workers, count_ids=args.command == "vocabulary", progress=shown.advance
        )


def load_compared(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The tokenizers, the reference among them, and its name."""
    from megatron_hammer.tokenizer.lab.arguments import load_named

    named = [Path(path).resolve() for path in args.tokenizers]
    if args.reference and Path(args.reference).resolve() not in named:
        args.tokenizers.append(args.reference)
        named.append(Path(args.reference).resolve())
    tokenizers = load_named(args.tokenizers, args.tiktoken_pattern)
    return tokenizers, list(tokenizers)[named.index(Path(args.reference).resolve()) if args.reference else -1]


def compression(args: argparse.Namespace) -> Analysis:
    from megatron_hammer.tokenizer.lab import analyze
    from megatron_hammer.tokenizer.lab import plots as analyze_plots
    from megatron_hammer.tokenizer.lab.arguments import parse_texts
    from megatron_hammer.tokenizer.lab.report import compression_table

    domains = parse_texts(args.texts)
    tokenizers, reference = load_compared(args)
    described = analyze.describe_compression(count(args, tokenizers, domains), reference)
    for name, tokenizer in tokenizers.items():
        described[name]["encoder"] = tokenizer.encoder
    facts = {"reference": reference, "threads": args.workers, "tokenizers": _rows(tokenizers, described)}
    tables = [compression_table(described, reference)]
    return Analysis(
        facts,
        tables,
        lambda language: analyze_plots.draw_compression(described, reference, language),
        tokenizer_assumptions(tokenizers),
    )


def coverage(args: argparse.Namespace) -> Analysis:
    from megatron_hammer.tokenizer.lab import analyze
    from megatron_hammer.tokenizer.lab import plots as analyze_plots
    from megatron_hammer.tokenizer.lab.arguments import load_named
    from megatron_hammer.tokenizer.lab.report import coverage_table
    from megatron_hammer.tokenizer.required_characters import load_table

    tokenizers = load_named(args.tokenizers, args.tiktoken_pattern)
    table = load_table()
    measured = {name: analyze.measure_coverage(tokenizer, table) for name, tokenizer in tokenizers.items()}
    described = {name: analyze.describe_coverage(of) for name, of in measured.items()}
    facts = {"tokenizers": _rows(tokenizers, described)}
    return Analysis(facts, [coverage_table(measured)], lambda language: analyze_plots.draw_coverage(measured, language))


def vocabulary(args: argparse.Namespace) -> Analysis:
    from megatron_hammer.tokenizer.lab import analyze
    from megatron_hammer.tokenizer.lab import plots as analyze_plots
    from megatron_hammer.tokenizer.lab.arguments import load_named, parse_texts
    from megatron_hammer.tokenizer.lab.report import vocabulary_tables

    domains = parse_texts(args.texts or [])
    tokenizers = load_named(args.tokenizers, args.tiktoken_pattern)
    usage = count(args, tokenizers, domains) if domains else {}
    measured = {name: analyze.describe_vocabulary(of, usage.get(name)) for name, of in tokenizers.items()}
    described = {
        name: {"mean_bytes": of.mean_bytes, "scripts": of.scripts, "lengths": of.lengths, "usage": of.usage}
        for name, of in measured.items()
    }
    facts = {"tokenizers": _rows(tokenizers, described)}
    notes = tokenizer_assumptions(tokenizers) if usage else []
    return Analysis(
        facts, vocabulary_tables(measured), lambda language: analyze_plots.draw_vocabulary(measured, language), notes
    )


def price(args: argparse.Namespace) -> Analysis:
    from megatron_hammer.base.progress import Progress
    from megatron_hammer.config import load_config
    from megatron_hammer.corpus.documents import TextCorpus
    from megatron_hammer.tokenizer.lab import plots as analyze_plots
    from megatron_hammer.tokenizer.lab import price
    from megatron_hammer.tokenizer.lab.arguments import parse_texts
    from megatron_hammer.tokenizer.lab.cost import check_priced_config
    from megatron_hammer.tokenizer.lab.curve import SAMPLE_BYTES, sample_texts

    config = load_config(args.config)
    check_priced_config(config)
    texts = {name: TextCorpus(paths) for name, paths in parse_texts(args.texts).items()}
    tokenizers, reference = load_compared(args)
    with Progress("reading", None) as shown:
        sample = sample_texts(texts, args.sample_bytes or SAMPLE_BYTES, shown.advance)
    with Progress("encoding", None) as shown:
        prices = price.price_tokenizers(tokenizers, config, sample, args.workers, shown.advance)
    facts = {
        "config": args.config,
        "reference": reference,
        "formula": price.FORMULA,
        "seq_length": config.data.seq_length,
        "micro_batch_size": config.train.micro_batch_size,
        "precision": config.train.precision,
        "sampled_bytes": sample.kept_bytes,
        "text_bytes": sample.seen_bytes,
        "tokenizers": _rows(tokenizers, price.describe_prices(prices, config, reference)),
    }
    tables = price.price_tables(prices, config, reference)
    notes = [*price.price_notes(prices, sample), *tokenizer_assumptions(tokenizers)]
    return Analysis(
        facts, tables, lambda language: analyze_plots.draw_price(prices, config, sample.kept_bytes, language), notes
    )


def tokenizer_assumptions(tokenizers: dict[str, Any]) -> list[str]:
    """What was assumed of the tokenizers that decides the ids of texts."""
    return [f"note: {of.assumption}" for of in tokenizers.values() if of.assumption]


def _rows(tokenizers: dict[str, Any], described: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "path": str(of.path), "vocab_size": of.vocab_size, "fingerprint": of.fingerprint}
        | described[name]
        for name, of in tokenizers.items()
    ]


def main() -> None:
    command_line = parser()
    args = command_line.parse_args()
    if getattr(args, "workers", 1) < 1:
        command_line.error(f"argument --workers: {args.workers} is less than 1")
    if getattr(args, "sample_bytes", None) is not None and args.sample_bytes < 1:
        command_line.error(f"argument --sample-bytes: {args.sample_bytes} is less than 1")
    from megatron_hammer.base.files import replace_file
    from megatron_hammer.tokenizer.lab.arguments import prepare_outputs
    from megatron_hammer.tokenizer.lab.report import format_table, html_report

    prepare_outputs(args.pictures, args.report)
    command = {"compression": compression, "coverage": coverage, "vocabulary": vocabulary, "price": price}[args.command]
    found = command(args)
    picture = found.draw(args.language) if args.pictures or args.report else b""
    if args.pictures:
        replace_file(args.pictures / f"{args.command}.png", picture)
    if args.report:
        page = html_report(f"Tokenizers: {args.command}", found.tables, picture, found.notes)
        replace_file(args.report, page)
    if args.json:
        print_json({"command": args.command, **found.facts})
    else:
        tables = [f"{table.title}:\n{format_table(table)}" for table in found.tables]
        print("\n\n".join([*tables, *(["\n".join(found.notes)] if found.notes else [])]))


if __name__ == "__main__":
    run(main)
