"""Our training step on random tokens: our_step.py quick|mid eager|compile fp32|bf16 prints one JSON line."""

from __future__ import annotations

import sys
import time

import torch
from shapes import SHAPES, peak_mb, report

from megatron_hammer.config import config_from_tree
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.step import train_step


def main() -> None:
    """Time one configuration on one process and all its cores."""
    size, mode, precision = sys.argv[1:4]
    imported, shape = peak_mb(), SHAPES[size]
    config = config_from_tree(
        {
            "model": shape.model_fields,
            "data": {"seq_length": shape.sequence},
            "kernels": {"compile": "layers" if mode == "compile" else "none"},
            "train": {
                "num_steps": shape.steps,
                "micro_batch_size": shape.micro_batch,
                "global_batch_size": shape.micro_batch * shape.accumulation,
                "precision": precision,
            },
        }
    )
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    seconds = []
    for step in range(1, shape.steps + 1):
        generator = torch.Generator().manual_seed(step)
        size_of_batch = (shape.micro_batch, shape.sequence + 1)
        batches = [
            Batch.from_windows(torch.randint(0, shape.vocabulary, size_of_batch, generator=generator))
            for _ in range(shape.accumulation)
        ]
        start = time.perf_counter()
        report_of_step = train_step(model, optimizer, batches, config, step, ctx)
        report_of_step.loss.item()
        seconds.append(time.perf_counter() - start)
    report("ours", size, mode, precision, seconds, imported)


if __name__ == "__main__":
    main()
