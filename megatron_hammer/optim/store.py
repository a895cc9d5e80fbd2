"""The flat store: the weights of a rank, and the sums of their gradients, in contiguous buffers (ZeRO stage 1).

All local weights lie in one buffer in the model's dtype, their gradients in one fp32 buffer of the same layout, in the
order in which backward finishes them. The buffers are cut into buckets, each bucket into dp equal shards (arXiv
1910.02054)::

                 bucket 0                        bucket 1
    params  [ head | norm | layer n ...  |pad] [ ... | layer 0 | embedding |pad]     model dtype
    grads   [ rank 0 | rank 1 | ... dp shards] [ rank 0 | rank 1 | ...         ]     fp32
              ^ this rank's shard                ^ and here: what this rank updates

It is made from the parameter table, before the model, which takes its weights from it (``weight``). In a step::

    begin       before each micro-batch
    add         the layers' backward: each gradient into its place; a bucket whose last gradient of the last micro-batch
                has arrived starts its reduce-scatter, while backward still runs
    reduce      waits for the buckets, and sums what other ranks hold in common with this one
    stretches   what an optimizer updates: this rank's shards of weights and gradients
    gather      starts to bring every rank's updated shards together, the bucket that forward needs first before the
                others
    acquire     before a part of the model computes, in the next forward: waits for its buckets
    wait        before anybody else reads or writes weights: waits for all

On one rank it is the same code with groups of size 1. Nothing here waits for the device. Another way of sharding is
another class with these methods: ZeRO stage 2 would keep no gradient after its bucket's reduce-scatter than the rank's
own shard, so it would reduce in each micro-batch and add the shard; stage 3 would keep no weight either, and gather
those of a layer when it is asked for them. Layers and optimizer would not notice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron_hammer.kernels.ranges import GRADIENT, Range, no_range
from megatron_hammer.parallel.collectives import all_gather_into, all_reduce, reduce_scatter_into
from megatron_hammer.parallel.context import Group, ParallelContext
from megatron_hammer.parallel.sharding import ParameterLike, SliceLike

SAME_BUCKETS_UP_TO = 64  # data-parallel ranks
ALIGNMENT = 64  # elements: every shard starts at a multiple of 256 bytes, what vector units and NCCL like

Result = TypeVar("Result")


class SummedSlice(SliceLike, Protocol):
    """What the store needs of ``model.parameters.Slice``."""

    @property
    def sum_over(self) -> str: ...


class Row(ParameterLike, Protocol):
    """What the store needs of ``model.parameters.Parameter``, a row of the parameter table."""

    @property
    def slices(self) -> Sequence[SummedSlice]: ...
    @property
    def decay(self) -> bool: ...
    @property
    def part(self) -> str: ...


@dataclass(eq=False)
class Bucket:
    """One stretch of the buffers that is reduced and gathered as a whole."""

    start: int
    stop: int
    parameters: list[int]
    """Positions in the table."""
    missing: set[int] = field(default_factory=set)
    """Those of which the gradient of the running micro-batch has not arrived yet."""
    handle: Any = None
    """Of the reduce-scatter under way."""
    gathering: Any = None
    """Handle of the all-gather under way."""


class StoredGradient:
    """The gradient of one weight (``Gradient`` in ``kernels/linear.py``)."""

    def __init__(self, store: FlatStore, index: int, bucket: Bucket, main_grad: Tensor) -> None:
        self.store, self.index, self.bucket, self.main_grad = store, index, bucket, main_grad
        self.written = False  # in the running micro-batch

    @property
    def begun(self) -> Tensor:
        return self.store.begun

    @property
    def version(self) -> int:
        return self.store.version

    def add(self, write: Callable[[Tensor, bool], Result], last: bool = True) -> Result:
        begun, self.written = self.written or not self.store.first, True
        if self.store.range_of is no_range:
            result = write(self.main_grad, begun)
        else:
            with self.store.range_of(GRADIENT):
                result = write(self.main_grad, begun)
        missing = self.bucket.missing
        assert self.index in missing, f"{self.store.table[self.index].name} got a gradient after its last one"
        if last:
            missing.remove(self.index)
            if self.store.last and not missing:
                self.store.start_reduction(self.bucket)
        return result

    def ready(self) -> None:
        if self.index in self.bucket.missing:  # else the layer was not compiled after all, and has added by itself
            self.add(lambda main_grad, begun: None)  # it has been written


@dataclass(frozen=True)
class Part:
    """What this rank's shards hold of one parameter."""

    parameter: Row
    start: int
    stop: int
    """Range in the flattened parameter."""
    offset: int
    """Of the parameter in the buffers."""

    @property
    def range(self) -> tuple[int, int]:
        """In the buffers."""
        return self.offset + self.start, self.offset + self.stop


@dataclass(frozen=True)
class Stretch:
    """Neighbouring parts with the same weight decay: an optimizer runs over few long tensors."""

    parts: tuple[Part, ...]
    """One after the other; together they fill the stretch."""
    decay: bool
    param: Tensor
    """[n] in the model's dtype: a view of the weights."""
    grad: Tensor
    """[n] fp32: a view of the gradients."""


class FlatStore:
    """Weights and gradients of one rank (``GradientStore`` in ``kernels/linear.py``).

    Args:
        table: the parameter table of this rank.
        dtype: of the weights.
        bucket_bytes: size of a bucket's gradients, at least; with many ranks more (``bucket_elements``).
        range_of: entered around each addition to a gradient, for a profiler.
        overlap_gather: leave the gather of updated weights under way until forward needs them; false: wait at once.
    """

    block = 1
    """Elements: a parameter starts at, and a shard is of, a multiple of so many."""

    def __init__(
        self,
        table: Sequence[Row],
        dtype: torch.dtype,
        ctx: ParallelContext,
        bucket_bytes: int,
        range_of: Range = no_range,
        overlap_gather: bool = True,
    ) -> None:
        self.range_of, self.overlap_gather = range_of, overlap_gather
        self.table, self.ctx = tuple(table), ctx
        self.offsets, self.buckets = lay_out(
            [p.numel for p in self.table],
            bucket_elements(bucket_bytes, ctx.dp.size),
            ctx.dp.size,
            summed_over_stages(self.table),
            self.block,
        )
        total = self.buckets[-1].stop
        self.params = torch.zeros(total, dtype=dtype, device=ctx.device)
        self.grads = torch.zeros(total, dtype=torch.promote_types(dtype, torch.float32), device=ctx.device)
        self.weights = [nn.Parameter(self._own_view(self.params, i)) for i in range(len(self.table))]
        bucket_of = {i: bucket for bucket in self.buckets for i in bucket.parameters}
        self.gradients = [
            StoredGradient(self, i, bucket_of[i], self._own_view(self.grads, i)) for i in range(len(self.table))
        ]
        self._buckets_of: dict[str, list[Bucket]] = {}
        for bucket in reversed(self.buckets):  # as they are gathered
            for part in {self.table[i].part for i in bucket.parameters}:
                self._buckets_of.setdefault(part, []).append(bucket)
        self._untaken = iter(range(len(self.table)))
        self.version = 0
        self.first = self.last = False
        self.begun = torch.tensor(False)
        self._counted = self.counted()
        self._shared = {over: list(self._slices_summed_over(over)) for over in ("tp", "kv", "stages")}

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of the sums of gradients."""
        return self.grads.dtype

    @property
    def of_stages(self) -> list[FlatStore]:
        """The stores of this rank's stages (``stage_stores.py``): it has one."""
        return [self]

    # ---- for the layers --------------------------------------------------------------------------------------------

    def weight(self, *shape: int) -> tuple[nn.Parameter, StoredGradient]:
        """The next weight of the table, zero at first, and its gradient."""
        index = next(self._untaken, None)
        assert index is not None, f"the model has more weights than the {len(self.table)} of the parameter table"
        row = self.table[index]
        assert shape == tuple(row.shape), f"{row.name} is {shape} in the model, {tuple(row.shape)} in the table"
        return self.weights[index], self.gradients[index]

    def acquire(self, part: str) -> None:
        """Wait for the weights of a part of the model, which were updated and may be on their way."""
        for bucket in self._buckets_of[part]:
            _wait_for(bucket)

    def check(self, model: nn.Module) -> None:
        """That a model has taken its weights from here, each under its name in the table."""
        found = {name: id(weight) for name, weight in model.named_parameters()}
        expected = {row.name: id(weight) for row, weight in zip(self.table, self.weights, strict=True)}
        assert found == expected, "the parameter table and the model must name the same tensors"

    # ---- a step ----------------------------------------------------------------------------------------------------

    def order(self, count: int) -> list[int]:
        """In which order this rank's micro-batches are to be computed."""
        return list(range(count))

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """The sum over the global batch of a scalar that each micro-batch of this rank has. Communicates over dp."""
        total = torch.zeros((), device=self.ctx.device)
        for value in values:
            total += value
        all_reduce(total, self.ctx.dp)
        return total

    def begin(self, first: bool, last: bool) -> None:
        """Say which micro-batch of the step comes; after the last one's backward the reduction is under way."""
        self.first, self.last, self.begun = first, last, torch.tensor(not first)
        for gradient in self.gradients:
            gradient.written = False
        for bucket in self.buckets:
            bucket.missing.update(bucket.parameters)

    def start_reduction(self, bucket: Bucket) -> None:
        """Sum a bucket's gradients over the data-parallel ranks, into each rank's shard. Communicates over dp."""
        shard = self.grads[self._shard_range(bucket)]
        bucket.handle = reduce_scatter_into(shard, self.grads[bucket.start : bucket.stop], self.ctx.dp)

    def reduce(self) -> None:
        """Wait for the buckets, then sum what tensor-parallel ranks, and first and last stage, hold in common."""
        for bucket in self.buckets:
            assert bucket.handle is not None, f"no gradient for {[self.table[i].name for i in bucket.parameters]}"
            bucket.handle.wait()
            bucket.handle = None
        for over, group in (("tp", self.ctx.tp), ("kv", self.ctx.kv), ("stages", self.ctx.ends)):
            _sum_in_one_message(self._shared[over], group)

    def gather(self) -> None:
        """Start to bring every rank's shards of the weights together: after an update. Communicates over dp."""
        self.wait()
        self.version += 1
        for b in reversed(self.buckets):  # the order of forward
            shard = self.params[self._shard_range(b)]
            b.gathering = all_gather_into(self.params[b.start : b.stop], shard, self.ctx.dp)
        if not self.overlap_gather:
            self.wait()

    def wait(self) -> None:
        """Wait until all weights are there: before anybody but the model reads them, or writes them."""
        for bucket in self.buckets:
            _wait_for(bucket)

    # ---- for the optimizer -----------------------------------------------------------------------------------------

    def stretches(self) -> list[Stretch]:
        """This rank's shards, neighbours with the same weight decay together."""
        groups: list[list[Part]] = []
        for part in self._parts():
            last = groups[-1][-1] if groups else None
            if last and last.range[1] == part.range[0] and last.parameter.decay == part.parameter.decay:
                groups[-1].append(part)
            else:
                groups.append([part])
        spans = [slice(parts[0].range[0], parts[-1].range[1]) for parts in groups]
        return [
            Stretch(tuple(parts), parts[0].parameter.decay, self.params[span], self.grads[span])
            for parts, span in zip(groups, spans, strict=True)
        ]

    def counted(self) -> list[Tensor]:
        """The gradients that this rank counts in the norm of the whole model, flat: each logical element once.

        Copies of what other ranks hold are left out; neighbours are joined to keep the list short.
        """
        ranges: list[list[int]] = []
        for s, start, stop in self._slice_ranges():
            if s.owned and ranges and ranges[-1][1] == start:
                ranges[-1][1] = stop
            elif s.owned:
                ranges.append([start, stop])
        return [self.grads[start:stop] for start, stop in ranges]

    def square_sum(self, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        """The sum of the squares of the whole model's gradient, each logical element once. Communicates over the world.

        Args:
            add: (part, out) adds the squares of a flat part to a scalar.
        """
        squares = self.local_square_sum(add)
        all_reduce(squares, self.ctx.world)
        return squares

    def local_square_sum(self, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        """What this rank counts of it."""
        squares = torch.zeros((), dtype=self.sum_dtype, device=self.ctx.device)
        for part in self._counted:
            add(part, squares)
        return squares

    # ---- layout ----------------------------------------------------------------------------------------------------

    def _own_view(self, buffer: Tensor, index: int) -> Tensor:
        """A parameter's place in a buffer, in its shape, with a version counter of its own (``.data``).

        A graph holds its weights and sums from forward to backward, while other layers write to theirs.
        """
        start, row = self.offsets[index], self.table[index]
        return buffer[start : start + row.numel].view(tuple(row.shape)).data

    def _shard_range(self, bucket: Bucket) -> slice:
        size = (bucket.stop - bucket.start) // self.ctx.dp.size
        return slice(bucket.start + size * self.ctx.dp.rank, bucket.start + size * (self.ctx.dp.rank + 1))

    def _parts(self) -> Iterator[Part]:
        """What of each parameter falls into this rank's shards, in the order of the buffers."""
        for bucket in self.buckets:
            shard = self._shard_range(bucket)
            for i in bucket.parameters:
                row, offset = self.table[i], self.offsets[i]
                start, stop = max(shard.start - offset, 0), min(shard.stop - offset, row.numel)
                if start < stop:
                    yield Part(row, start, stop, offset)

    def _slice_ranges(self) -> Iterator[tuple[SummedSlice, int, int]]:
        """Each slice of the table that this rank's shards touch, with its range in the buffers."""
        for part in self._parts():
            first, last = part.range
            cols = part.parameter.shape[1] if len(part.parameter.shape) > 1 else 1
            for s in part.parameter.slices:
                start = max(first, part.offset + s.local_row * cols)
                stop = min(last, part.offset + (s.local_row + s.num_rows) * cols)
                if start < stop:
                    yield s, start, stop

    def _slices_summed_over(self, group: str) -> Iterator[Tensor]:
        return (self.grads[start:stop] for s, start, stop in self._slice_ranges() if s.sum_over == group)


def bucket_elements(bucket_bytes: int, dp_size: int) -> int:
    """Elements of a bucket in fp32: of ``bucket_bytes`` on up to 64 ranks, and in proportion to the ranks beyond.

    A bucket of 64 MiB on 512 ranks would be shards of 0.13 MiB, too small to fill a network; so a shard keeps its size,
    1 MiB of the default's.
    """
    return bucket_bytes // 4 * max(SAME_BUCKETS_UP_TO, dp_size) // SAME_BUCKETS_UP_TO


def summed_over_stages(table: Sequence[Row]) -> list[int]:
    """Parameters that the first and the last stage both have: each gets a bucket of its own.

    So a rank has the same shard of it as its partner on the other stage.
    """
    return [i for i, row in enumerate(table) if any(s.sum_over == "stages" for s in row.slices)]


def lay_out(
    sizes: Sequence[int], bucket_elements: int, dp_size: int, alone: Collection[int] = (), block: int = 1
) -> tuple[list[int], list[Bucket]]:
    """Place parameters, last first, and close a bucket once it has ``bucket_elements``.

    Args:
        alone: parameters that get a bucket of their own.
        block: of which the offsets and the lengths of shards are multiples.

    Returns:
        the offset of each parameter (in the order given) and the buckets, each a multiple of 64 x dp elements long.
    """
    offsets, buckets, at = [0] * len(sizes), [Bucket(0, 0, [])], 0
    for i in reversed(range(len(sizes))):
        offsets[i] = at
        buckets[-1].parameters.append(i)
        at += -(-sizes[i] // block) * block
        if at - buckets[-1].start >= bucket_elements or i == 0 or {i, i - 1} & set(alone):
            unit = math.lcm(ALIGNMENT, block) * dp_size
            at = -(-at // unit) * unit
            buckets[-1].stop = at
            if i:
                buckets.append(Bucket(at, at, []))
    return offsets, buckets


def _wait_for(bucket: Bucket) -> None:
    if bucket.gathering is not None:
        bucket.gathering.wait()
        bucket.gathering = None


def _sum_in_one_message(views: list[Tensor], group: Group) -> None:
    if not views or group.size == 1:
        return
    message = torch.cat(views)
    all_reduce(message, group)
    for view, part in zip(views, message.split([v.numel() for v in views]), strict=True):
        view.copy_(part)
