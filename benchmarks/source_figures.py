"""What the figures of each source cost a step: sums by source against one sum over all tokens.

    python benchmarks/source_figures.py [quick|mid] [--pairs 20] [--sources 16]

One process, all its threads, bf16, presets of ``shapes.py``, 16 sources of which a step draws samples, a tokenizer's
sizes. Steps with and without alternate, whichever begins. Without: the losses of all tokens are added up
once, and the loop reads that number. With: ``train/source_sums.py`` as the loop uses it, the table read, the figures of
each source written as JSON. Since steps differ by more than the figures cost, what differs is also timed alone.

The limit counts the operations that the sums dispatch (on a GPU each is a kernel, at 5 us a launch) and the bytes that
they read and write, views left out, against those of one sum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from shapes import SHAPES, TOY, WARM_UP_STEPS, Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hammer.config import config_from_tree
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train import step
from megatron_hammer.train.build import build
from megatron_hammer.train.source_sums import Sources, mean_loss, source_figures, sum_by_source

LAUNCH_US = 5.0  # of a kernel by torch, in the order of what an H100's host takes; assumed
ALONE = 300  # times


class _Counted(TorchDispatchMode):
    """Counts what is dispatched, and the bytes of what it reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.operations, self.bytes = self.operations + 1, self.bytes + sum(t.nbytes for t in tensors)
        return result


def one_sum(batches: Sequence[Batch[Tensor]], losses: Sequence[Tensor], sources: Sources, device: Any) -> Tensor:
    """In the place of ``sum_by_source``: the sum of all losses, and how many they are."""
    total = torch.stack(list(losses)).sum()
    return total / sum(found.numel() for found in losses)


def batches_of(shape: Shape, number: int, sources: int) -> list[Batch[Tensor]]:
    """The micro-batches of a step."""
    generator = torch.Generator().manual_seed(number)
    size = (shape.micro_batch, shape.sequence + 1)
    return [
        Batch.from_windows(
            torch.randint(0, shape.vocabulary, size, generator=generator),
            sources=torch.randint(0, sources, size[:1], generator=generator),
        )
        for _ in range(shape.accumulation)
    ]


def written(table: list[list[float]], names: Sequence[str]) -> str:
    """What the loop makes of the table."""
    return json.dumps(source_figures(names, table, dict.fromkeys(range(len(names)), 10**9)))


def compare(shape: Shape, pairs: int, count: int) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds, and seconds of CPU time, of steps without and of steps with."""
    config = config_from_tree({
        "model": shape.model_fields, "data": {"seq_length": shape.sequence},
        "train": {"micro_batch_size": shape.micro_batch, "global_batch_size": shape.micro_batch * shape.accumulation,
                  "precision": "bf16"},
    })  # fmt: skip
    ctx, sources = ParallelContext.single(), sources_of(shape, count)
    model, optimizer = build(config, ctx)
    names = [f"source_{i}" for i in range(count)]
    walls, cpus = [list[float](), list[float]()], [list[float](), list[float]()]
    for number in range(WARM_UP_STEPS + pairs):
        for side in (0, 1) if number % 2 else (1, 0):
            batches = batches_of(shape, number, count)
            began = time.perf_counter(), time.process_time()
            if side:
                report = step.train_step(model, optimizer, batches, config, number + 1, ctx, sources=sources)
                report.loss.item()
                written(report.by_source.tolist(), names)
            else:
                with patch.object(step, "sum_by_source", one_sum), patch.object(step, "mean_loss", lambda t: t):
                    step.train_step(model, optimizer, batches, config, number + 1, ctx).loss.item()
            if number >= WARM_UP_STEPS:
                walls[side].append(time.perf_counter() - began[0])
                cpus[side].append(time.process_time() - began[1])
    return walls, cpus


def sources_of(shape: Shape, count: int) -> Sources:
    """With an id's bytes and characters, as of a tokenizer."""
    return Sources(count, torch.arange(shape.vocabulary) % 7 << 32 | torch.arange(shape.vocabulary) % 3)


def alone(shape: Shape, count: int) -> tuple[list[float], list[_Counted]]:
    """Median seconds of the one sum and of the sums by source with what is written of them; what they dispatch."""
    batches, sources, device = batches_of(shape, 0, count), sources_of(shape, count), torch.device("cpu")
    losses = [torch.rand(shape.micro_batch, shape.sequence) * 12 for _ in batches]
    names = [f"source_{i}" for i in range(count)]

    def plain() -> None:
        one_sum(batches, losses, sources, device).item()

    def by_source() -> None:
        table = sum_by_source(batches, losses, sources, device)
        mean_loss(table).item()
        written(table.tolist(), names)

    medians, counts = [], []
    sides: list[Callable[[], None]] = [plain, by_source]
    for side in sides:
        with _Counted() as counted:
            side()
        counts.append(counted)
        seconds = []
        for _ in range(ALONE):
            began = time.process_time()
            side()
            seconds.append(time.process_time() - began)
        medians.append(statistics.median(seconds))
    return medians, counts


def main() -> None:
    """Print both comparisons and the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", choices=[*SHAPES, "toy"], default="quick")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--sources", type=int, default=16)
    arguments = parser.parse_args()
    shape = (SHAPES | {"toy": TOY})[arguments.size]
    measured = compare(shape, arguments.pairs, arguments.sources)
    (one, many), (few, more) = alone(shape, arguments.sources)
    print(f"{arguments.size}, {shape.tokens:,} tokens a step, {arguments.sources} sources, {arguments.pairs} pairs")
    for what, (without, with_them) in zip(("wall", "CPU"), measured, strict=True):
        plain, by_source = statistics.median(without), statistics.median(with_them)
        differences = sorted(b - a for a, b in zip(without, with_them, strict=True))
        spread = differences[len(differences) // 4], differences[-1 - len(differences) // 4]
        print(f"  {what} s of a step: {plain:.4f} without, {by_source:.4f} with ({by_source / plain - 1:+.2%}); pairs "
              f"differ by {statistics.median(differences) / plain:+.2%} "
              f"(half of them {spread[0] / plain:+.2%} to {spread[1] / plain:+.2%})")  # fmt: skip
    cpu = statistics.median(measured[1][0])
    print(f"  alone, CPU ms: one sum {one * 1e3:.3f}, by source and written {many * 1e3:.3f}: "
          f"{(many - one) / cpu:.3%} of a step")  # fmt: skip
    launches, moved = more.operations - few.operations, more.bytes - few.bytes
    print(f"  limit: {more.operations} operations against {few.operations}, {more.bytes / 1e6:.2f} MB against "
          f"{few.bytes / 1e6:.2f}; on a GPU {launches * LAUNCH_US / 1e3:.2f} ms of launches a step, "
          f"{moved / shape.tokens:.0f} bytes a token")  # fmt: skip


if __name__ == "__main__":
    main()
