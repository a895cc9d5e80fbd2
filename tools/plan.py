"""Rank the layouts in which a model can be trained on given GPUs, by predicted speed, memory and cost; needs no GPU.

    python tools/plan.py CONFIG.yaml --gpus 8 --gpu h100 [--memory GiB] [--tokens T] [--price P] [group.field=value ...]
    python tools/plan.py CONFIG.yaml --gpus 64 --gpu h800 --write plan.yaml --picture plan.png

All tensor, pipeline and context parallel sizes that the settings allow are tried, with each way of sharding
(parallel.shard), micro-batch size and recompute; the batch, the model and the data stay as they are. Layouts that fit
are ranked by predicted speed, with the memory of a rank and the time of a step by part; for the others the reason is
given. Memory is computed by formulas, which tests compare with what verify_parallel.py --world counts; speed by a
roofline whose assumptions are printed and can be replaced: --efficiency products=0.7, --node-link, --network.

--write puts the config in layout --choose (default: 1, the fastest) into a new file that training takes:
    python -m megatron_hammer.launch --nproc 8 plan.yaml

Exit codes: 0 a layout fits; 2 bad usage or configuration; 3 the tokenizer cannot be read; 10 no layout fits: the
closest is named, and what is missing (docs/errors.md).
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import require_package  # noqa: F401

from megatron_hammer.base.cli import ArgumentParser, as_commands, print_json, run
from megatron_hammer.base.errors import ConfigError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="plan.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the config of the run")
    parser.add_argument("overrides", metavar="group.field=value", nargs="*", help="settings that replace the file's")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs, of all nodes together")
    parser.add_argument("--gpu", required=True, metavar="NAME", help="h200, h100, h800, a100, 4090, ...")
    parser.add_argument("--memory", type=float, metavar="GiB", help="memory of one GPU (default: as published)")
    parser.add_argument("--headroom", type=float, metavar="SHARE",
                        help="share of memory left to CUDA, NCCL and fragmentation (default: 0.08)")  # fmt: skip
    parser.add_argument("--tokens", type=float, metavar="T", help="tokens to train on (default: the config's steps)")
    parser.add_argument("--price", type=float, metavar="P", help="price of a GPU hour, in any currency (default: none)")
    parser.add_argument(
        "--precision", metavar="P[,P...]", help="precisions to try: bf16, fp8, fp16, fp32 (default: the config's)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs a node (default: %(default)s)")
    parser.add_argument("--node-link", type=float, metavar="GB/s",
                        help="bandwidth of a GPU within a node, one direction (default: as published)")  # fmt: skip
    parser.add_argument("--network", type=float, default=50.0, metavar="GB/s",
                        help="bandwidth of a GPU between nodes, one direction (default: %(default)s)")  # fmt: skip
    parser.add_argument("--efficiency", action="append", default=[], metavar="NAME=SHARE",
                        help="share of the published rate that is reached by products, attention, memory, links or "
                        "fp8; or share of gaps; may be repeated")  # fmt: skip
    parser.add_argument(
        "--show", type=int, default=8, metavar="N", help="number of layouts in the table (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="all layouts as one JSON document instead of a table")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw memory and time as stacked bars")
    parser.add_language("the picture")
    parser.add_argument("--write", type=Path, metavar="FILE.yaml", help="write the config in the chosen layout")
    parser.add_argument(
        "--choose", type=int, default=1, metavar="N", help="row of the table that --write takes (default: %(default)s)"
    )
    return parser


def main() -> int:
    parser = build_parser()
    arguments = parser.parse_intermixed_args()
    if arguments.write is None:
        parser.refuse_idle("without --write FILE.yaml", "--choose")
    if arguments.json and arguments.picture is None:
        parser.refuse_idle("with --json, which has all layouts", "--show")
    from megatron_hammer.base.files import replace_file
    from megatron_hammer.base.pictures import check_png
    from megatron_hammer.base.progress import Progress
    from megatron_hammer.config import load_config, to_yaml
    from megatron_hammer.costs.plan_report import draw_plan, plan_table
    from megatron_hammer.costs.planner import PlanRequest, chosen_config, plan_layouts, plan_to_tree

    config = load_config(arguments.config, arguments.overrides)
    if arguments.picture is not None:
        check_png(arguments.picture)
    if arguments.write is not None and arguments.write.resolve() == Path(arguments.config).resolve():
        raise ConfigError(88, f"--write {arguments.write}", "is the config that is read", "name another file")
    if arguments.write is not None and os.path.lexists(arguments.write):
        remedy = "name a new file, or move that away"
        raise ConfigError(88, f"--write {arguments.write}", "is there, and would be replaced", remedy)
    names = {field.name for field in dataclasses.fields(PlanRequest)}
    request = PlanRequest(**{name: value for name, value in vars(arguments).items() if name in names})
    with Progress("trying layouts", None, "families") as progress:

        def tried_one(of_all: int) -> None:
            progress.expect(of_all)
            progress.advance(1)

        plan = plan_layouts(config, request, tried_one)
    if arguments.json:
        print_json(plan_to_tree(plan))
    else:
        print(*map(as_commands, plan_table(plan, arguments.show)), sep="\n")
    if arguments.picture is not None:
        draw_plan(plan, arguments.picture, arguments.show, arguments.language)
    if arguments.write is not None:
        replace_file(arguments.write, to_yaml(chosen_config(plan, config, arguments.choose)).encode())
    return 0


if __name__ == "__main__":
    run(main)
