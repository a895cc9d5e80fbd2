"""Build the indices that a run needs before it starts: on a login node, say, or once for a cluster's shared disk.

    python tools/build_index.py CONFIG.yaml [group.field=value ...] [--epochs E]
    python tools/build_index.py --prefix P [--prefix W=P ...] --seq-length S --seed N --samples M
                                [--order independent|megatron] [--index-folder FOLDER] [--epochs E]

Training builds what it lacks by itself, one process of each file system while the others wait; this is never needed.
Indices lie in P.index beside each dataset P, or in data.index_folder. With --epochs (order "independent") those of the
first E passes over every source are built, else those that the run's samples reach.
"""

from __future__ import annotations

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, run
from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Activity


def parser() -> ArgumentParser:
    parser = ArgumentParser(prog="build_index.py", description=__doc__)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="as given to the training program")
    parser.add_argument("--prefix", action="append", metavar="[W=]P", help="a dataset and its weight (default: 1)")
    parser.add_argument("--seq-length", type=int, metavar="S", help="data.seq_length of the run")
    parser.add_argument("--seed", type=int, metavar="N", help="train.seed of the run")
    parser.add_argument("--samples", type=int, metavar="M", help="train.num_steps times train.global_batch_size")
    parser.add_argument("--order", choices=["independent", "megatron"], default="independent", help="data.order")
    parser.add_argument("--index-folder", metavar="FOLDER", help="data.index_folder")
    parser.add_argument("--epochs", type=int, metavar="E", help="build the indices of E passes over every source")
    return parser


OF_PREFIXES = ("--seq-length", "--seed", "--samples", "--order", "--index-folder")
"""What a config says of its own."""


def main() -> None:
    words = parser()
    args = words.parse_args()
    from megatron_hammer.config import load_config
    from megatron_hammer.sampling.prebuild import IndexPlan, build_indices, plan_of
    from megatron_hammer.train.prepare import in_progress

    if (args.config is None) == (args.prefix is None):
        raise ConfigError(85, "build_index.py", "needs a config or --prefix, and not both", "see build_index.py --help")
    if args.config is not None:
        words.refuse_idle("with a config, which says it", *OF_PREFIXES)
        config = load_config(args.config, args.overrides)
        plan = plan_of(*in_progress(config)) if config.data.mixes else plan_of(config)
    else:
        if None in (args.seq_length, args.seed, args.samples):
            raise ConfigError(85, "build_index.py --prefix", "needs --seq-length, --seed and --samples",
                              "give those of the run, or its config")  # fmt: skip
        plan = IndexPlan(
            phases=dict(_weighted(text) for text in args.prefix),
            seq_length=args.seq_length,
            seed=args.seed,
            num_samples=args.samples,
            order=args.order,
            index_folder=args.index_folder,
        )
    with Activity("looking for indices") as activity:
        for line in build_indices(plan, args.epochs, activity.begin):
            print(line)


def _weighted(text: str) -> tuple[str, float]:
    weight, equals, prefix = text.partition("=")
    try:
        return (prefix, float(weight)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0  # a prefix with an equals sign in it


if __name__ == "__main__":
    run(main)
