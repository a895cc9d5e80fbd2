"""The real training loop on a dataset made here: how even its steps are, and whether the GPU waits for data.

Tokens come the way they do in a run: an indexed dataset on the disk, with none of it left in the page cache, its
shuffled order, the thread that reads ahead, pinned copies; losses are read and written as in a run. Only the checkpoint
at the end is left out.

A step's time is that between the ends of two steps on the device. The wait for data is the time on the device from the
end of a step to the arrival of the next step's tokens, counted from when the loop asks for them: a loop that comes late
for another reason is not the loader's fault, and the copy itself counts as a wait.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import p99

from gpu.contestants import our_config
from gpu.measure import Bench, Item, Result
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.loop import TrainLoop
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.training import train

WARM_UP, TIMED = 5, 20
DOCUMENTS, MEAN_LENGTH = 100_000, 500  # 50 million tokens: 38 times what the steps read, 200 MB


class Points:
    """Points in time on the device: events of its stream, the clock on a CPU."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.found = bench, list[Any]()

    def add(self) -> None:
        if self.bench.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.found.append(event)
        else:
            self.found.append(time.perf_counter())

    def seconds(self, since: Any, until: Any) -> float:
        return since.elapsed_time(until) / 1e3 if self.bench.cuda else until - since  # type: ignore[no-any-return]


class MeasuredRun(TrainLoop):
    """A run that notes when a step's tokens are asked for and when they are there, and keeps no checkpoint."""

    points: Points

    def next_batches(self) -> Any:
        self.points.add()
        batches = super().next_batches()
        self.points.add()
        return batches

    def _save(self, last: bool) -> None:
        """Its time is measured elsewhere."""


def write_dataset(prefix: Path, vocabulary: int, documents: int, mean_length: int) -> None:
    """Documents of random ids and lengths, on the disk and not in the page cache."""
    rng = np.random.default_rng(1)
    lengths = 1 + rng.exponential(mean_length, documents).astype(np.int64)
    with IndexedWriter(prefix, vocab_size=vocabulary) as writer:
        for some in np.array_split(lengths, max(1, documents // 1000)):
            writer.add(rng.integers(0, vocabulary, int(some.sum())), some)
    for path in prefix.parent.glob(f"{prefix.name}*"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def real_loop(bench: Bench) -> Result:
    warm_up, timed = (1, 3) if bench.small else (WARM_UP, TIMED)
    documents, length = (200, 100) if bench.small else (DOCUMENTS, MEAN_LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "random"
        config = our_config(
            bench.shape,
            data={"train": str(prefix)},
            train={"num_steps": warm_up + timed + 1, "output": f"{folder}/run"},
            log={"tensorboard": False},
        )
        write_dataset(prefix, bench.shape.vocabulary, documents, length)
        run = MeasuredRun(prepare(config, 1, check_data=False), ParallelContext.single(bench.device))
        run.points = Points(bench)
        train(run.prepared, run.ctx, lambda prepared, ctx: run)
        bench.synchronise()
    asked, there = run.points.found[::2], run.points.found[1::2]
    steps = [run.points.seconds(a, b) for a, b in zip(asked[warm_up:], asked[warm_up + 1 :])]
    waits = [run.points.seconds(a, b) for a, b in zip(asked[warm_up + 1 :], there[warm_up + 1 :])]
    return {
        "step_s": statistics.median(steps),
        "step_s_p99": p99(steps),
        "step_s_each": steps,
        "tokens_per_second": bench.shape.tokens / statistics.median(steps),
        "wait_ms": 1e3 * statistics.median(waits),
        "wait_ms_p99": 1e3 * p99(waits),
        "wait_percent": 100 * sum(waits) / sum(steps),
    }


def items(bench: Bench) -> dict[str, Item]:
    return {"ours": lambda: real_loop(bench)}
