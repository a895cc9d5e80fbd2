"""One rank of a layout of any size, built and run without its machines, and what it keeps and sends counted.

The program's own build and step run on torch's meta device in a world of which only this rank exists
(``parallel/fake_world.py``), with kernels that compute nothing (``shapes.py``). Every new tensor and every collective
passes by a counter. The result is compared with the formulas of ``costs/rank_costs.py``, which predict runs.

Of the micro-batches of a step all but the first are equal, so steps of one and of two are run and the rest is computed;
of a pipeline, steps of so many that all its stages are at work; where sums are made in one tree, the step itself.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hammer.base.tables import align
from megatron_hammer.config import Config, KernelsConfig
from megatron_hammer.costs.rank_costs import GIB, collectives, kept_bytes, state_bytes
from megatron_hammer.costs.rank_peak import fused_backends
from megatron_hammer.kernels.linear_cross_entropy import CHUNK_TOKENS
from megatron_hammer.kernels.ranges import HEAD
from megatron_hammer.optim.buffers import Buffers
from megatron_hammer.parallel.context import ParallelContext, build_parallel_context
from megatron_hammer.parallel.fake_world import Collective, fake_world, find_collective
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.source_sums import Sources
from megatron_hammer.train.step import train_step
from megatron_hammer.verify.shapes import shape_kernels
from megatron_hammer.verify.shrink import chosen_kernels

OUTSIDE = "layers"
"""Where no range of the model is entered: sums of residuals, inputs of recomputed layers."""


@dataclass
class Counted:
    """What was counted of one rank: what it keeps and what it sends."""

    state: dict[str, int]
    """Bytes of weights, gradients and optimizer."""
    kept: dict[str, int]
    """Bytes of the activations that are kept when the head of the first micro-batch begins, by part of the model."""
    peak: int
    """Bytes beyond the state at the worst moment of a step, what is gathered and reduced included."""
    collectives: Counter[Collective]
    """Of a step."""


@dataclass(frozen=True)
class FormulaCheck:
    """What was counted on one rank, beside what the formulas say."""

    counted: Counted
    rows: list[tuple[str, str, str, str]]
    """Quantity, counted, by the formula, "" or that they differ."""
    left_out: list[str]
    """Settings that took no part."""

    @property
    def differs(self) -> bool:
        """Whether a formula is wrong, or the program."""
        return any(row[3] for row in self.rows)

    def table(self) -> list[str]:
        """What was counted and what formulas say, for people."""
        return align([("quantity", "counted", "formula", ""), *self.rows])

    def summary(self) -> list[str]:
        """Lines for people: memory, and what a rank receives in a step."""
        state, kept = self.counted.state, self.counted.kept
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in kept.items() if size >= GIB / 200)
        of_one = f"; kept of a micro-batch {sum(kept.values()) / GIB:.2f} GiB ({parts})" if kept else ""
        received: Counter[str] = Counter()
        for c, times in self.counted.collectives.items():
            received[c.axis] += c.bytes * times
        return [
            f"memory: {sum(state.values()) / GIB:.2f} GiB of state and {self.counted.peak / GIB:.2f} GiB at the worst "
            f"moment of a step{of_one}",
            "tensors communicated in a step, their whole size: "
            + (", ".join(f"{axis} {size / GIB:.2f} GiB" for axis, size in received.items()) or "none"),
        ]


class _Counter(TorchDispatchMode):
    """Sees every operator: new memory by the range in which it was made, and collectives."""

    def __init__(self, ctx: ParallelContext) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ctx, self.ranges, self.calls = ctx, [OUTSIDE], Counter[Collective]()
        self.alive, self.bytes, self.peak = Counter[str](), 0, 0
        self.buffers: list[Buffers] = []
        """Of the stores, whose rooms get and lose their memory without an operator."""
        self.kept: dict[str, int] | None = None
        self._known = weakref.WeakValueDictionary[int, torch.UntypedStorage]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if called := find_collective(func, args, self.ctx):
            self.calls[called] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        """Bytes that are there."""
        return self.bytes + sum(buffers.open_bytes for buffers in self.buffers)

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = storage
        size, part = storage.nbytes(), self.ranges[-1]
        self.alive[part] += size
        self.bytes += size
        weakref.finalize(storage, self._forget, part, size)

    def _forget(self, part: str, size: int) -> None:
        self.alive[part] -= size
        self.bytes -= size

    @contextmanager
    def range_of(self, name: str) -> Iterator[None]:
        """The model and the optimizer say which part runs."""
        if name == HEAD and self.kept is None:
            self.kept = {part: size for part, size in self.alive.items() if size}
        self.ranges.append(name)
        try:
            yield
        finally:
            self.ranges.pop()

    def begin(self) -> None:
        """What is there now belongs to nobody."""
        self.alive.clear()
        self.calls.clear()
        self.peak, self.kept = self.now, None


def count_rank(config: Config, world_size: int, rank: int) -> Counted:
    """Build and run ``rank`` of ``world_size``; the config is valid for them. Kernels are ours, whatever it chooses."""
    config = dataclasses.replace(config, kernels=KernelsConfig(loss_chunk_tokens=_chunk_tokens(config)))
    pipeline = config.pipeline()
    fewest = 1 if pipeline.stages_per_rank == 1 else pipeline.ranks  # micro-batches that come together
    accumulated = config.grad_accum(world_size)
    most = min(accumulated, 2 * pipeline.ranks)
    if config.train.deterministic_reduction == "tree":
        fewest = most = accumulated  # one tree is made of all
    with fake_world(rank, world_size) if world_size > 1 else nullcontext():
        ctx = build_parallel_context(config.grid(world_size), torch.device("meta"))
        with _Counter(ctx) as counter:
            stages, optimizer = build_stages(
                config, ctx, counter.range_of, initial=False, kernels=shape_kernels(_chunk_tokens(config))
            )
            for stage in stages:
                stage.rope(config.data.seq_length)  # made once
            stores, states = optimizer.store.of_stages, optimizer.rule.states
            counter.buffers = [buffers for store in stores for buffers in (store.weight_buffers, store.sum_buffers)]
            own = sum(s.own_bytes for s in states)
            state = {"weights": sum(store.params.nbytes for store in stores),
                     "gradients": sum(store.grads.nbytes for store in stores), "optimizer": own}  # fmt: skip
            sources, steps = Sources(max(1, len(config.data.train_prefixes))), []
            for micro_batches in sorted({fewest, most}):
                batches = [_batch(config, ctx) for _ in range(micro_batches)]
                counter.begin()
                before = counter.now
                train_step(stages, optimizer, batches, config, 1, ctx, sources=sources)
                steps.append((counter.calls.copy(), counter.peak - before, counter.kept or {}))
            state["gradients"] += sum(store.waiting_bytes for store in stores)
    first, last = steps[0], steps[-1]
    calls = {c: n + (accumulated - fewest) * (last[0][c] - n) // max(1, most - fewest) for c, n in first[0].items()}
    # Of a pipeline's ranks not all have a head, and several micro-batches are kept when it begins.
    return Counted(state, first[2] if pipeline.ranks == 1 else {}, max(first[1], last[1]), Counter(calls))


def compare_rank(config: Config, world_size: int, rank: int) -> FormulaCheck:
    """``count_rank`` beside the formulas, which are exact."""
    counted = count_rank(config, world_size, rank)
    rows = []
    for name, size in state_bytes(config, world_size, rank).items():
        rows.append(_row(f"bytes of {name}", counted.state[name], size))
    plain = dataclasses.replace(config, kernels=KernelsConfig())
    backends = fused_backends(plain.kernels)
    if counted.kept:
        kept = kept_bytes(plain, backends, rank)
        rows.append(_row("bytes of activations", sum(counted.kept.values()), kept))
    predicted = collectives(config, world_size, rank, _chunk_tokens(config))
    for c in sorted({*counted.collectives, *predicted}):
        what = f"{c.axis}: {c.kind} of {c.bytes:,} bytes, times"
        rows.append(_row(what, counted.collectives[c], predicted[c]))
    return FormulaCheck(counted, rows, chosen_kernels(config))


def _row(what: str, counted: int, formula: int) -> tuple[str, str, str, str]:
    return what, f"{counted:,}", f"{formula:,}", "" if counted == formula else "DIFFERENT"


def _chunk_tokens(config: Config) -> int:
    return config.kernels.loss_chunk_tokens or CHUNK_TOKENS["cuda"]


def _batch(config: Config, ctx: ParallelContext) -> Batch[Tensor]:
    """The shape of a micro-batch, or of a rank's share of it; with document masks a sample is one document."""
    b, s = config.train.micro_batch_size, config.data.seq_length
    ends = np.arange(0, b * s + 1, s, dtype=np.int32) if config.data.attention_mask == "document" else None
    whole = Batch.from_windows(np.zeros((b, s + 1), np.int64), documents=ends, sources=np.zeros(b, np.int64))
    return whole.shard(ctx.cp.rank, ctx.cp.size).to(ctx.device)
