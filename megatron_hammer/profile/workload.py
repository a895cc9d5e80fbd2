"""What is profiled: model, optimizer and batches as training has them, with ranges that can be recorded.

The model and the optimizer are built with named ranges (``kernels/ranges.py``), and waiting for other ranks is one
(``record_waits``). They do nothing until ``recorded``: so the same objects are first timed without a profiler and then
measured part by part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from megatron_hammer.config import Config
from megatron_hammer.costs import budget
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.ranges import no_range
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.profile import trace
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.loop import TrainLoop
from megatron_hammer.train.prepare import Prepared, prepare
from megatron_hammer.train.source_sums import ONE_SOURCE
from megatron_hammer.train.step import train_step


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class RecordedRanges:
    """Ranges as torch's profiler sees them while a ``recorded`` block runs; nothing otherwise."""

    def __init__(self) -> None:
        self._recording = False

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        return record_function(trace.PREFIX + name) if self._recording else no_range(name)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the ranges that are entered meanwhile."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False


def record_waits(status: StatusSlot, ranges: RecordedRanges) -> None:
    """Have the status slot of a rank show torch's profiler, too, when the rank waits for others."""
    note, shown, was_waiting = status.note, ExitStack(), status.is_waiting

    def note_and_show(when: int, collectives: int, waiting: bool, collective: bytes) -> None:
        nonlocal was_waiting
        if not waiting:
            shown.close()
        note(when, collectives, waiting, collective)
        if waiting and not was_waiting:
            shown.enter_context(ranges(budget.COMMUNICATION))
        was_waiting = waiting

    status.note = note_and_show


class Workload:
    """Model, optimizer and batches, as training has them: real data where the config names some, else random tokens.

    Args:
        config: valid for as many ranks as ``ctx`` has.
        ranges: those that ``ctx`` waits in, if it has others to wait for.
    """

    def __init__(self, config: Config, ctx: ParallelContext, ranges: RecordedRanges) -> None:
        self.ctx, self.steps, self.document_squares, self.document_tokens = ctx, 0, 0, 0
        self.loop: TrainLoop | None = None
        self.ranges, size = ranges, ctx.world.size
        if config.data.mixes:
            prepared = prepare(config, size)
            self.config, self.loop = prepared.config, TrainLoop(prepared, ctx, self.ranges)
            self.stages, self.optimizer = self.loop.stages, self.loop.optimizer
        else:
            self.config = _resolved(config, size).config
            self.stages, self.optimizer = build_stages(self.config, ctx, self.ranges)
            # Ranks of one replica see the same tokens, whatever they compute of them.
            self.generator = torch.Generator().manual_seed(config.train.seed + ctx.samples.rank)

    def step(self, name: str = trace.STEP, finish: bool = False) -> None:
        """One step in a range of this name; with ``finish`` the range ends when the device has done it."""
        self.steps += 1
        with record_function(trace.PREFIX + name):
            with record_function(trace.PREFIX + budget.DATA):
                batches = self._batches()
            for documents in (b.documents for b in batches if isinstance(b.documents, PackedSequences)):
                self.document_squares += sum(n * n for n in documents.lengths)
                self.document_tokens += sum(documents.lengths)
            sources = ONE_SOURCE if self.loop is None else self.loop.sources
            train_step(self.stages, self.optimizer, batches, self.config, self.steps, self.ctx, sources=sources)
            if finish:
                wait(self.ctx.device)

    @property
    def attention_length(self) -> float | None:
        """Mean length of the documents that a token is in; None where they are not masked."""
        return self.document_squares / self.document_tokens if self.document_tokens else None

    def _batches(self) -> list[Batch[Tensor]]:
        if self.loop is None:
            return [self._random_batch() for _ in range(self.config.grad_accum(self.ctx.world.size))]
        batches = self.loop.next_batches()
        consumed = self.loop.state.consumed_samples + self.config.train.global_batch_size
        self.loop.state = dataclasses.replace(self.loop.state, consumed_samples=consumed)
        return batches

    def _random_batch(self) -> Batch[Tensor]:
        """Random tokens, and documents of 1 to s tokens where they are masked."""
        b, s, cp = self.config.train.micro_batch_size, self.config.data.seq_length, self.ctx.cp
        assert self.config.model.vocab_size is not None
        windows = torch.randint(self.config.model.vocab_size, (b, s + 1), generator=self.generator).numpy()
        documents = None
        if self.config.data.attention_mask == "document":
            cuts = (
                torch.randint(1, max(2, s), (b, 1 if s < 64 else 3), generator=self.generator)
                + s * torch.arange(b)[:, None]
            )
            ends = torch.cat([cuts.flatten(), s * torch.arange(b + 1)]).unique()
            documents = ends.int().numpy()
        return Batch.from_windows(windows, documents=documents).shard(cp.rank, cp.size).to(self.ctx.device)


def _resolved(config: Config, world_size: int) -> Prepared:
    """A config without data, checked, with its vocabulary: what a dry run prepares."""
    dry = dataclasses.replace(config, train=dataclasses.replace(config.train, dry_run=True))
    return prepare(dry, world_size)
