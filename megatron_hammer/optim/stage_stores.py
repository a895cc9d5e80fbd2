"""Joins the stores of a rank that has several stages of a pipeline, so that the optimizer sees one.

Micro-batches pass through a rank's stages at different times, so that one stage has begun a sum of gradients while the
other has not. So each stage has a store of its own (``store.py``), to which its layers write, and whose ``begin`` the
schedule calls before each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_hammer.optim.buckets import Row, Stretch
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import ParallelContext


class StageStores:
    """One store for each stage of this rank, first to last."""

    def __init__(self, stores: Sequence[FlatStore]) -> None:
        self.of_stages = list(stores)

    @property
    def ctx(self) -> ParallelContext:
        """The groups of this rank."""
        return self.of_stages[0].ctx

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of the sums of gradients."""
        return self.of_stages[0].sum_dtype

    @property
    def table(self) -> tuple[Row, ...]:
        """The rows of all stages."""
        return tuple(row for store in self.of_stages for row in store.table)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weight of each row."""
        return [weight for store in self.of_stages for weight in store.weights]

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """The sum over the global batch of a scalar that each micro-batch of this rank has. Communicates over dp."""
        return self.of_stages[0].total(values)

    def reduce(self) -> None:
        """Finish the sums of all stages."""
        for store in self.of_stages:
            store.reduce()

    def gather(self) -> None:
        """Start to bring every rank's shards of the weights together. Communicates over dp."""
        for store in self.of_stages:
            store.gather()

    def wait(self) -> None:
        """Wait until all weights are there."""
        for store in self.of_stages:
            store.wait()

    def stretches(self) -> list[Stretch]:
        """What an optimizer updates."""
        return [stretch for store in self.of_stages for stretch in store.stretches()]

    def square_sum(self, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        """The sum of the squares of the whole model's gradient. Communicates over the world."""
        squares = torch.stack([store.local_square_sum(add) for store in self.of_stages]).sum()
        all_reduce(squares, self.ctx.world)
        return squares
