"""How much of a pipeline's time is the schedule's own: stages that sleep, against the formula.

Real stages of a tiny model on real ranks over gloo, each of which sleeps for FORWARD and BACKWARD seconds besides. With
m micro-batches on p ranks of v stages each a step takes (m v + p - 1) (FORWARD + BACKWARD) where nothing else costs
time. The median of the steps is compared with that. On a machine that does other things run it with a high priority
(``nice -n -18``): a rank that wakes up late is the machine's doing.

    python benchmarks/pipeline.py [--ranks 2 4] [--virtual 1 2] [--micro-batches 8] [--steps 5]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import meet
from torch import Tensor

from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.model.llama import Stage
from megatron_hammer.parallel.context import build_parallel_context
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.step import loss_and_gradients

FORWARD, BACKWARD = 0.05, 0.1
TOKENS = 8


class Slow(torch.autograd.Function):
    """The same values, later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(FORWARD)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        time.sleep(BACKWARD)
        return grads[0]


def slowed(stage: Stage) -> Callable[..., Tensor]:
    """The stage's forward with a sleep before the head's stage and behind all others."""
    real = stage.forward

    def forward(tokens: Tensor, labels: Tensor, documents: Any, objective: Any, received: Tensor | None) -> Tensor:
        if stage.placement.has_head:
            assert received is not None
            return real(tokens, labels, documents, objective, Slow.apply(received))  # type: ignore[no-untyped-call]
        return Slow.apply(real(tokens, labels, documents, objective, received))  # type: ignore[no-untyped-call, no-any-return]

    return forward


def config_of(ranks: int, virtual: int, micro_batches: int) -> Config:
    """One layer a stage."""
    return config_from_tree(
        {
            "model": dict(hidden_size=16, ffn_hidden_size=16, num_layers=ranks * virtual, num_attention_heads=2,
                          vocab_size=32),
            "data": dict(seq_length=TOKENS),
            "train": dict(precision="fp32", global_batch_size=micro_batches, micro_batch_size=1),
            "parallel": dict(pipeline_model_parallel_size=ranks, virtual_pipeline_stages=virtual,
                             pipeline_split=[1] * ranks * virtual),
        }
    )  # fmt: skip


def rank_main(rank: int, store: str, config: Config, steps: int, results: Any) -> None:
    """One rank: seconds of each step, between barriers."""
    ranks = config.parallel.pipeline_model_parallel_size
    meet(rank, ranks, store)
    ctx = build_parallel_context(config.grid(ranks), torch.device("cpu"))
    stages, optimizer = build_stages(config, ctx)
    for stage in stages:
        stage.forward = slowed(stage)  # type: ignore[method-assign]
    windows = torch.arange(TOKENS + 1).view(1, -1)
    batches = [Batch.from_windows(windows) for _ in range(config.grad_accum(ranks))]
    seconds = []
    for _ in range(steps + 1):  # the first is a warm-up
        dist.barrier()
        start = time.perf_counter()
        loss_and_gradients(stages, optimizer, batches, config, ctx)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        optimizer.clip_grad_norm(1.0)
    if rank == 0:
        results.put(seconds[1:])
    dist.destroy_process_group()


def measure(ranks: int, virtual: int, micro_batches: int, steps: int) -> float:
    """Median seconds of a step."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (os.path.join(folder, "store"), config_of(ranks, virtual, micro_batches), steps, results)
        mp.spawn(rank_main, arguments, nprocs=ranks)
    return statistics.median(results.get())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--virtual", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"each stage {FORWARD * 1e3:.0f} + {BACKWARD * 1e3:.0f} ms, {options.micro_batches} micro-batches; {load}")
    print("| PP | stages a rank | step, ms | formula, ms | more |\n|---|---|---|---|---|")
    for ranks in options.ranks:
        for virtual in options.virtual:
            seconds = measure(ranks, virtual, options.micro_batches, options.steps)
            formula = (options.micro_batches * virtual + ranks - 1) * (FORWARD + BACKWARD)
            print(f"| {ranks} | {virtual} | {seconds * 1e3:.0f} | {formula * 1e3:.0f} | {seconds / formula - 1:+.1%} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
