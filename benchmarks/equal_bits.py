"""What it costs that ranks prove they hold equal bits: the drift check, against the step it belongs to.

    python benchmarks/equal_bits.py [quick|mid] [--layouts "TP 2" "DP 2"] [--rounds N]

Two ranks on the cores of this machine, over gloo, with the presets of cpu_step.py in bf16. Steps and checks alternate;
the figures are medians of rank 0. The share is that of one check every 100 steps, the default of
``train.drift_check_interval_steps``.
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
from shapes import SHAPES, Shape

from megatron_hammer.config import Config, config_from_tree
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


def config_of(shape: Shape, layout: str) -> Config:
    """The run of one layout: as many samples a step in each."""
    return config_from_tree(
        {
            "model": shape.model_fields,
            "data": {"seq_length": shape.sequence},
            "parallel": LAYOUTS[layout],
            "train": {"micro_batch_size": shape.micro_batch, "global_batch_size": shape.micro_batch * RANKS},
        }
    )


def measure(rank: int, size: str, layout: str, rounds: int, folder: str) -> None:
    """One rank: print the medians on rank 0."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS)
    shape = SHAPES[size]
    config = config_of(shape, layout)
    ctx = build_parallel_context(config.grid(RANKS), torch.device("cpu"))
    model, optimizer = build(config, ctx)
    drift = DriftCheck(config, optimizer, ctx)
    steps: list[float] = []
    checks: list[float] = []
    for step in range(1, rounds + 4):
        generator = torch.Generator().manual_seed(step + ctx.dp.rank)
        windows = torch.randint(0, shape.vocabulary, (shape.micro_batch, shape.sequence + 1), generator=generator)
        batches = [Batch.from_windows(windows)] * config.grad_accum(RANKS)
        start = time.perf_counter()
        train_step(model, optimizer, batches, config, step, ctx).loss.item()
        middle = time.perf_counter()
        drift.raise_on(drift.check(step))
        steps.append(middle - start)
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
    arguments = parser.parse_args()
    for layout in arguments.layouts:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (arguments.size, layout, arguments.rounds, str(Path(folder))), nprocs=RANKS)


if __name__ == "__main__":
    main()
