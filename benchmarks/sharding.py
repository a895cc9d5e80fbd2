"""Peak memory of a rank and time of a step with sharded optimizer, gradients and weights, against the formula.

    python benchmarks/sharding.py [--steps 6] [--rounds 2] [--precision fp32]

Two data-parallel ranks on gloo, one thread each, width 1024, in bf16 or fp32; each mode in fresh processes, in turn.
The ratio of CPU seconds says what a mode costs on a machine that does other things, too. Memory is the peak of the
resident set (VmHWM) above what a rank had before it built the model, and stands beside the formula of
``costs/rank_peak.py``. What libraries keep besides is the same in all modes, so that the differences between modes are
what can be held against the formula's to the percent.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ranks import meet
from sides import memory_mb

from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.costs.rank_peak import rank_peak
from megatron_hammer.kernels.selection import kernel_requirements, select_backends
from megatron_hammer.parallel.context import build_parallel_context
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.step import train_step

MODES, RANKS, MIB = ("optimizer", "gradients", "weights"), 2, 2**20


def config_of(mode: str, precision: str) -> Config:
    """84 million parameters in 6 layers."""
    return config_from_tree({
        "model": dict(hidden_size=1024, ffn_hidden_size=2816, num_layers=6, num_attention_heads=16, num_query_groups=4,
                      vocab_size=8192),
        "data": dict(seq_length=256),
        "train": dict(num_steps=100, micro_batch_size=1, global_batch_size=2, precision=precision, device="cpu"),
        "parallel": dict(shard=mode, gradient_bucket_bytes=16 * 2**20),
    })  # fmt: skip


def rank_main(rank: int, mode: str, precision: str, steps: int, store: str, results: Any) -> None:
    meet(rank, RANKS, store)
    config = config_of(mode, precision)
    ctx, before = build_parallel_context(config.grid(RANKS), torch.device("cpu")), memory_mb("VmRSS")
    model, optimizer = build(config, ctx)
    windows = torch.randint(0, 8192, (1, 257), generator=torch.Generator().manual_seed(rank))
    times, busy = [], []
    for step in range(1, steps + 1):
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        train_step(model, optimizer, [Batch.from_windows(windows)], config, step, ctx)
        times.append(time.perf_counter() - start)
        busy.append(time.process_time() - used)
    quarter = len(times) // 4
    results.put((rank, memory_mb("VmHWM") - before, sorted(times)[quarter], sorted(busy)[quarter]))
    dist.barrier()


def measure(mode: str, precision: str, steps: int) -> tuple[float, float, float]:
    """Peak MiB of the rank with most, seconds of a step, and CPU seconds of a rank's step (the lower quartiles)."""
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_main, (mode, precision, steps, f"{folder}/store", results), RANKS, start_method="spawn")
    found = [results.get() for _ in range(RANKS)]
    peaks, seconds, busy = (max(of_ranks) for of_ranks in list(zip(*found, strict=True))[1:])
    return peaks, seconds, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in MODES}
    for _ in range(arguments.rounds):
        for mode in MODES:
            found[mode].append(measure(mode, arguments.precision, arguments.steps))
    print(
        "| parallel.shard | formula MiB | measured MiB | difference to optimizer: formula, measured | step s | ratio "
        "| CPU s | ratio |"
    )
    print("|---|---|---|---|---|---|---|---|")
    first: tuple[float, float, float, float] | None = None
    for mode in MODES:
        config = config_of(mode, arguments.precision)
        required = kernel_requirements(config, torch.device("cpu"))
        backends = select_backends(config.kernels, required)
        stated = sum(rank_peak(config, RANKS, 0, backends, "cpu").values()) / MIB
        peak, seconds, busy = (min(of_rounds) for of_rounds in zip(*found[mode], strict=True))
        first = first or (stated, peak, seconds, busy)
        less = f"{first[0] - stated:.0f}, {first[1] - peak:.0f}"
        times = f"{seconds:.2f} | {seconds / first[2]:.2f} | {busy:.2f} | {busy / first[3]:.2f}"
        print(f"| {mode} | {stated:.0f} | {peak:.0f} | {less} | {times} |")


if __name__ == "__main__":
    main()
