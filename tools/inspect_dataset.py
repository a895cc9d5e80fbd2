"""Look into indexed datasets and into the order in which a run reads them.

    python tools/inspect_dataset.py stats PREFIX [--json]
    python tools/inspect_dataset.py order CONFIG.yaml [group.field=value ...] --start I --count N [--json]

stats: documents, tokens, largest id, and who made the dataset.
order: for each sample number of the run, its source, epoch and window, and the documents, offsets and lengths it reads.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_hammer.cli import ArgumentParser, run
from megatron_hammer.errors import ConfigError


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="inspect_dataset.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="stats|order")
    stats = commands.add_parser("stats", help="counts and origin of one dataset")
    stats.add_argument("prefix", metavar="PREFIX", help="P of P.bin and P.idx")
    order = commands.add_parser("order", help="what samples of a run read")
    order.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    order.add_argument("overrides", nargs="*", metavar="group.field=value", help="as given to the training program")
    order.add_argument("--start", type=int, default=0, metavar="I", help="first sample number, from 0 (default: 0)")
    order.add_argument("--count", type=int, default=8, metavar="N", help="how many samples (default: 8)")
    for command in (stats, order):
        command.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    return parser


def parse_arguments() -> argparse.Namespace:
    """argparse takes overrides only directly after CONFIG; those that follow an option are picked up here."""
    command_line = parser()
    args, rest = command_line.parse_known_args()
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(late) < len(rest) or (late and args.command != "order"):
        command_line.error(f"unrecognized arguments: {' '.join(word for word in rest if word not in late) or late[0]}")
    if late:
        args.overrides += late
    return args


def show_stats(args: argparse.Namespace) -> None:
    from megatron_hammer.data.indexed import IndexedDataset

    facts = IndexedDataset(args.prefix).describe()
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        if isinstance(value, list):
            for entry in value:
                print(f"{name:17} " + ", ".join(f"{k} {_plain(v)}" for k, v in entry.items()))
        elif isinstance(value, dict):
            print(f"{name:17} " + ", ".join(f"{k} {_plain(v)}" for k, v in value.items()))
        else:
            print(f"{name:17} {_plain(value)}")


def _plain(value: Any) -> str:
    if value is None:
        return "not recorded"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_order(args: argparse.Namespace) -> None:
    from megatron_hammer.config import load_config
    from megatron_hammer.data.samples import TrainData, describe_samples

    config = load_config(args.config, args.overrides)
    if not config.data.train:
        raise ConfigError(73, "data.train", "is absent, so there is no order", "add data.train=PREFIX")
    config.data.check()
    data = TrainData(
        config.data.train,
        config.data.seq_length,
        config.train.seed,
        config.data.order,
        config.train.num_steps * config.train.global_batch_size,
    )
    samples = describe_samples(data, args.start, args.count)
    if args.json:
        print(json.dumps(samples, ensure_ascii=False))
        return
    print(f"{'sample':>10} {'epoch':>5} {'window':>10}  source: document[offset : offset + length] ...")
    for sample in samples:
        pieces = " ".join(
            f"{piece['document']}[{piece['offset']}:{piece['offset'] + piece['length']}]" for piece in sample["pieces"]
        )
        print(f"{sample['sample']:>10} {sample['epoch']:>5} {sample['window']:>10}  {sample['source']}: {pieces}")


def main() -> None:
    args = parse_arguments()
    {"stats": show_stats, "order": show_order}[args.command](args)


if __name__ == "__main__":
    run(main)
