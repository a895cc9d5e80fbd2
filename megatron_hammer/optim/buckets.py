"""Where the weights of a rank lie in the buffers of its store: in buckets, each cut into equal shards, one a rank.

Parameters lie in the order in which backward finishes them, the last of the table first, one after the other. A bucket
ends when it is large enough, and where asked at the end of each part of the model. Pure arithmetic, but for the tensors
in a ``Stretch``: ``buffers.py`` has the memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megatron_hammer.parallel.sharding import ParameterLike, SliceLike

SAME_BUCKETS_UP_TO = 64  # data-parallel ranks
ALIGNMENT = 64  # elements: every shard starts at a multiple of 256 bytes, what vector units and NCCL like


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
    def is_hidden_matrix(self) -> bool: ...
    @property
    def head_rows(self) -> int | None: ...
    @property
    def part(self) -> str: ...


@dataclass(eq=False)
class Bucket:
    """A part of the buffers that is reduced and gathered as a whole, as in DistributedDataParallel and Megatron-LM."""

    start: int
    stop: int
    parameters: list[int]
    """Positions in the table."""
    missing: set[int] = field(default_factory=set)
    """Those of which the gradient of the running micro-batch has not arrived yet."""
    reduced: bool = False
    """Whether the reduce-scatter of the step's last micro-batch has started."""
    first: bool = False
    """Whether the one under way is that of the step's first micro-batch."""
    handle: Any = None
    """Of the reduce-scatter under way."""
    gathering: Any = None
    """Handle of the all-gather under way."""


@dataclass(frozen=True)
class ParameterShard:
    """What this rank's shards hold of one parameter."""

    parameter: Row
    start: int
    stop: int
    """Range in the flattened parameter."""
    offset: int
    """Of the parameter in the buffers."""
    bucket: Bucket

    @property
    def range(self) -> tuple[int, int]:
        """The elements of the buffers that the shards have of the parameter, first and end."""
        return self.offset + self.start, self.offset + self.stop


@dataclass(frozen=True)
class Stretch:
    """Neighbouring shards that are updated in the same way: an optimizer runs over few long tensors.

    FSDP's flat parameter, of one of torch's parameter groups.
    """

    parts: tuple[ParameterShard, ...]
    """One after the other; together they fill the stretch."""
    decay: bool
    param: Tensor
    """[n] in the model's dtype: a view of the weights."""
    grad: Tensor
    """[n] fp32: a view of the gradients."""


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


def lay_out_buckets(
    sizes: Sequence[int], bucket_elements: int, dp_size: int, borders: Collection[int] = (), block: int = 1
) -> tuple[list[int], list[Bucket]]:
    """Place parameters, last first, and close a bucket once it has ``bucket_elements``.

    Args:
        borders: positions of parameters at which a bucket must end, however small it is.
        block: of which the offsets and the lengths of shards are multiples.

    Returns:
        the offset of each parameter (in the order given) and the buckets, each a multiple of 64 x dp elements long.
    """
    offsets, buckets, at = [0] * len(sizes), [Bucket(0, 0, [])], 0
    for i in reversed(range(len(sizes))):
        offsets[i] = at
        buckets[-1].parameters.append(i)
        at += -(-sizes[i] // block) * block
        if at - buckets[-1].start >= bucket_elements or i == 0 or i in borders:
            unit = math.lcm(ALIGNMENT, block) * dp_size
            at = -(-at // unit) * unit
            buckets[-1].stop = at
            if i:
                buckets.append(Bucket(at, at, []))
    return offsets, buckets


class BufferLayout:
    """The buckets of one rank, and what its shards of them hold.

    Args:
        ranks, rank: how many shards a bucket has, and which one is this rank's.
        by_part: no bucket reaches over the end of a part of the model.
        block: elements of which offsets and shards are multiples.
    """

    def __init__(
        self, table: Sequence[Row], bucket_bytes: int, ranks: int, rank: int, by_part: bool = False, block: int = 1
    ) -> None:
        self.table, self.ranks, self.rank = tuple(table), ranks, rank
        parts = [row.part for row in table]
        borders = {i for i in range(1, len(parts)) if parts[i] != parts[i - 1]} if by_part else set()
        borders |= {i + after for i in summed_over_stages(table) for after in (0, 1)}
        elements = bucket_elements(bucket_bytes, ranks)
        self.offsets, self.buckets = lay_out_buckets([row.numel for row in table], elements, ranks, borders, block)

    @property
    def total(self) -> int:
        """Elements of all buckets."""
        return self.buckets[-1].stop

    @property
    def arriving(self) -> int:
        """Elements that the other ranks send of the largest shard when a bucket is summed."""
        most = max(bucket.stop - bucket.start for bucket in self.buckets)
        return most - most // self.ranks

    def shard(self, bucket: Bucket) -> slice:
        """This rank's shard of a bucket."""
        size = (bucket.stop - bucket.start) // self.ranks
        return slice(bucket.start + size * self.rank, bucket.start + size * (self.rank + 1))

    def parts(self) -> Iterator[ParameterShard]:
        """What of each parameter falls into this rank's shards, in the order of the buffers."""
        for bucket in self.buckets:
            shard = self.shard(bucket)
            for i in bucket.parameters:
                row, offset = self.table[i], self.offsets[i]
                start, stop = max(shard.start - offset, 0), min(shard.stop - offset, row.numel)
                if start < stop:
                    yield ParameterShard(row, start, stop, offset, bucket)

    def holders(self, bucket: Bucket, i: int) -> Iterator[tuple[int, int, int]]:
        """Which rank's shard of a bucket has which range of flattened parameter i."""
        size, first, numel = (bucket.stop - bucket.start) // self.ranks, self.offsets[i], self.table[i].numel
        for rank in range((first - bucket.start) // size, self.ranks):
            start, stop = bucket.start + size * rank - first, bucket.start + size * (rank + 1) - first
            if start >= numel:
                return
            yield rank, max(start, 0), min(stop, numel)

    def slices(self) -> Iterator[tuple[SummedSlice, ParameterShard, int, int]]:
        """Each slice of the table that this rank's shards touch, in which part, and its range in the buffers."""
        for part in self.parts():
            first, last = part.range
            cols = part.parameter.shape[1] if len(part.parameter.shape) > 1 else 1
            for s in part.parameter.slices:
                start = max(first, part.offset + s.local_row * cols)
                stop = min(last, part.offset + (s.local_row + s.num_rows) * cols)
                if start < stop:
                    yield s, part, start, stop
