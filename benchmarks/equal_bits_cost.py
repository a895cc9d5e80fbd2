"""What equal bits cost: the drift check and sums in a fixed tree, against the step they belong to.

    python benchmarks/equal_bits_cost.py [quick|mid] [--layouts "TP 2" "DP 2"] [--tree] [--rounds N]

Two ranks on the cores of this machine, over gloo, with the presets of cpu_step.py in bf16. Steps and checks alternate;
the figures are medians of rank 0. The share is that of one check every 100 steps, the default of
``train.drift_check_interval_steps``. With --tree, steps of ``train.deterministic_reduction=tree`` alternate with plain
ones instead, on DP 2 with 4 micro-batches accumulated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import meet
from shapes import SHAPES, Shape
from torch import Tensor

from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.costs.rank_costs import state_bytes
from megatron_hammer.parallel.context import build_parallel_context
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.drift import DriftCheck
from megatron_hammer.train.step import train_step

RANKS = 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "DP 2": {},
}
INTERVAL = 100  # steps
ACCUMULATED = 4


def config_of(shape: Shape, layout: str, accumulated: int = 1, reduction: str = "off") -> Config:
    """The run of one layout."""
    dp = RANKS // LAYOUTS[layout].get("tensor_model_parallel_size", 1)
    return config_from_tree(
        {
            "model": shape.model_fields,
            "data": {"seq_length": shape.sequence},
            "parallel": LAYOUTS[layout],
            "train": {
                "micro_batch_size": shape.micro_batch,
                "global_batch_size": shape.micro_batch * dp * accumulated,
                "deterministic_reduction": reduction,
            },
        }
    )


def random_batches(shape: Shape, config: Config, step: int, dp_rank: int) -> list[Batch[Tensor]]:
    """A rank's micro-batches of a step."""
    generator = torch.Generator().manual_seed(step + dp_rank)
    windows = torch.randint(0, shape.vocabulary, (shape.micro_batch, shape.sequence + 1), generator=generator)
    return [Batch.from_windows(windows)] * config.grad_accum(RANKS)


def measure_tree(rank: int, size: str, rounds: int, folder: str) -> None:
    """One rank: plain steps and those with a tree; print the medians on rank 0."""
    meet(rank, RANKS, f"{folder}/store")
    shape, seconds = SHAPES[size], {"off": list[float](), "tree": list[float]()}
    configs = {kind: config_of(shape, "DP 2", ACCUMULATED, kind) for kind in seconds}
    ctx = build_parallel_context(configs["off"].grid(RANKS), torch.device("cpu"))
    built = {kind: build(config, ctx) for kind, config in configs.items()}
    for step in range(1, rounds + 4):
        for kind, (model, optimizer) in built.items():
            batches = random_batches(shape, configs[kind], step, ctx.dp.rank)
            began = time.perf_counter()
            train_step(model, optimizer, batches, configs[kind], step, ctx).loss.item()
            seconds[kind].append(time.perf_counter() - began)
    if rank == 0:
        off, tree = (statistics.median(times[3:]) for times in seconds.values())
        bytes_off, bytes_tree = (state_bytes(config, RANKS)["gradients"] for config in configs.values())
        print(
            f"{size}, DP 2, {ACCUMULATED} accumulated: step {off * 1e3:.0f} ms, in a tree {tree * 1e3:.0f} ms "
            f"({tree / off - 1:+.1%}); gradients {bytes_off / 1e6:.1f} MB, in a tree {bytes_tree / 1e6:.1f} MB",
            flush=True,
        )
    dist.destroy_process_group()


def measure(rank: int, size: str, layout: str, rounds: int, folder: str) -> None:
    """One rank: steps and checks; print the medians on rank 0."""
    meet(rank, RANKS, f"{folder}/store")
    shape = SHAPES[size]
    config = config_of(shape, layout)
    ctx = build_parallel_context(config.grid(RANKS), torch.device("cpu"))
    model, optimizer = build(config, ctx)
    drift = DriftCheck(config, optimizer, ctx)
    steps: list[float] = []
    checks: list[float] = []
    for step in range(1, rounds + 4):
        batches = random_batches(shape, config, step, ctx.dp.rank)
        began = time.perf_counter()
        train_step(model, optimizer, batches, config, step, ctx).loss.item()
        middle = time.perf_counter()
        drift.raise_on(drift.check(step))
        steps.append(middle - began)
        checks.append(time.perf_counter() - middle)
    if rank == 0:
        step_s, check_s = (statistics.median(times[3:]) for times in (steps, checks))
        print(
            f"{size}, {layout}, {config.train.precision}: step {step_s * 1e3:.0f} ms, check {check_s * 1e3:.1f} ms, "
            f"every {INTERVAL} steps {check_s / step_s / INTERVAL:.3%}",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    """Every layout in turn, each in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=SHAPES, default="quick")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tree", action="store_true", help="steps with sums in a tree, and no checks")
    arguments = parser.parse_args()
    if arguments.tree:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure_tree, (arguments.size, arguments.rounds, str(Path(folder))), nprocs=RANKS)
        return
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (arguments.size, layout, arguments.rounds, str(Path(folder))), nprocs=RANKS)


if __name__ == "__main__":
    main()
