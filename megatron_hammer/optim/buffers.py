"""The memory of weights, or of gradients: for each bucket all of it, and this rank's shard.

Whole buffers are there always, and a shard is a part of them. Where a rank keeps its shards only, a bucket has a buffer
of its own, which is opened to compute with all of it and closed again::

    whole    kept  [ bucket 0: shard, shard, ... | bucket 1: shard, shard, ... ]        a shard is a view
    shards   kept  [ my shard of bucket 0 | my shard of bucket 1 ]
             full  [ bucket 0: shard, shard, ... ]    open, or of no bytes              the shard has to be copied

Tensors that lie in a buffer (weights of a model, sums of gradients) are views that stay what they are: opening gives
their storage its bytes, closing takes these away (FSDP does so too, arXiv 2304.11277). So a layer or a graph can hold
them. A closed one has no memory: who reads it ends the process, as with any null pointer, and never reads old values.
On a CPU the storage keeps its address, and its pages go to the bucket that opens next (``base/pages.py``; a bucket
below 2 MiB gives them back to the system), because blocks of this size that come and go leave holes in malloc's heap;
elsewhere torch's allocator has the memory back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hammer.base import pages
from megatron_hammer.base.pages import Pages, Spare
from megatron_hammer.optim.buckets import Bucket, BufferLayout


class _BucketMemory:
    """The memory of one bucket, closed at first: a flat tensor that stays, with or without its bytes.

    Args:
        spare: pages that other buckets have left.
    """

    def __init__(self, length: int, dtype: torch.dtype, device: torch.device, spare: Spare) -> None:
        self._spare = spare
        self._pages = Pages(length * dtype.itemsize) if _has_pages(device) else None
        if self._pages is None:
            self.tensor = torch.empty(length, dtype=dtype, device=device)
            self.close()
        else:
            self.tensor = torch.frombuffer(self._pages.memory, dtype=dtype, count=length)

    @property
    def is_open(self) -> bool:
        return self._pages.is_open if self._pages else self.tensor.untyped_storage().size() > 0

    def open(self) -> None:
        self._pages.open(self._spare) if self._pages else self.tensor.untyped_storage().resize_(self.tensor.nbytes)

    def close(self) -> None:
        self._pages.close(self._spare) if self._pages else self.tensor.untyped_storage().resize_(0)


class Buffers:
    """Weights or gradients of all buckets of a rank.

    Args:
        whole: keep all of each bucket, not this rank's shard alone. One rank alone has nothing else.
        spare: pages for the buckets that open, on a CPU; shared with other buffers.
    """

    def __init__(
        self, layout: BufferLayout, dtype: torch.dtype, device: torch.device, whole: bool, spare: Spare
    ) -> None:
        self.layout, self.whole = layout, whole or layout.ranks == 1
        size = layout.total if self.whole else layout.total // layout.ranks
        self.kept = _zeros(size, dtype, device)
        self.views: dict[int, Tensor] = {}
        """Each parameter's place, by its position in the table, with a version counter of its own (``.data``): a graph
        holds its weights and sums from forward to backward, while other layers write to theirs."""
        self.full: dict[Bucket, Tensor] = {}
        """All of each bucket, open or not."""
        self.own: dict[Bucket, Tensor] = {}
        """This rank's shard of each, where it lies in ``full``."""
        self._memories: dict[Bucket, _BucketMemory] = {}
        self.open_bytes = 0
        """Of all buckets that are open now."""
        for bucket in layout.buckets:
            length, shard = bucket.stop - bucket.start, layout.shard(bucket)
            if self.whole:
                full = self.kept[bucket.start : bucket.stop]
            else:
                full = (memory := _BucketMemory(length, dtype, device, spare)).tensor
                self._memories[bucket] = memory
            self.full[bucket] = full
            self.own[bucket] = full[shard.start - bucket.start : shard.stop - bucket.start]
            for i in bucket.parameters:
                row, start = layout.table[i], layout.offsets[i] - bucket.start
                self.views[i] = full[start : start + row.numel].view(tuple(row.shape)).data

    def shard(self, bucket: Bucket) -> Tensor:
        """This rank's shard where it is kept; the same memory as ``own`` in whole buffers."""
        shard = self.layout.shard(bucket)
        return self.kept[self.place(bucket, shard.start, shard.stop)]

    def place(self, bucket: Bucket, start: int, stop: int) -> slice:
        """Where a range of this rank's shard, counted in whole buffers, is kept."""
        if self.whole:
            return slice(start, stop)
        shift = bucket.start // self.layout.ranks - self.layout.shard(bucket).start
        return slice(start + shift, stop + shift)

    def is_open(self, bucket: Bucket) -> bool:
        """Whether all of a bucket is there."""
        return self.whole or self._memories[bucket].is_open

    def open(self, bucket: Bucket) -> None:
        """Make room for all of a bucket; what lies there then is undefined."""
        if not self.is_open(bucket):
            self._memories[bucket].open()
            self.open_bytes += self.full[bucket].nbytes

    def close(self, bucket: Bucket) -> None:
        """Give the room back; a shard that was not copied is gone."""
        if not self.whole and self._memories[bucket].is_open:
            self._memories[bucket].close()
            self.open_bytes -= self.full[bucket].nbytes


def _has_pages(device: torch.device) -> bool:
    """Whether tensors of a device can lie in pages of our own (``base/pages.py``)."""
    return device.type == "cpu" and pages.HERE


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size] zeros; on a CPU in huge pages where there are any, which the system has back when the tensor goes."""
    if not _has_pages(device) or size * dtype.itemsize < pages.HUGE:
        return torch.zeros(size, dtype=dtype, device=device)
    own = Pages(size * dtype.itemsize)
    own.open()
    return torch.frombuffer(own.memory, dtype=dtype, count=size)
