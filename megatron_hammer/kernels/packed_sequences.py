"""``PackedSequences``: where the documents of a packed micro-batch lie, for attention and position ids.

The samples of a micro-batch lie one after the other, and the documents in them are told apart by cumulative lengths, as
in flash-attn, which is what every attention kernel for variable lengths takes::

    cu_seqlens   0         5     8               16      documents are the rows [0, 5), [5, 8) and [8, 16)
    positions    0 1 2 3 4 0 1 2 0 1 2 3 4 5 6 7         start anew with each document, for RoPE

The end of a sample is the end of a document, so no document is longer than s, the length of a sample.

Under context parallelism a rank has only some rows of the micro-batch, in spans that each lie within one document
(``parallel/sequence_split.py``), while the keys of all ranks are gathered. A span then stands in the place of a
document here: its queries are the rank's rows, its keys are those of its document from the first up to its own last
row (``PackedKeys``). So the queries are the end of the keys, which is what kernels for variable lengths mean by a
causal mask where there are fewer queries than keys::

    document 0 1 2 3 4 5 6 7, span 4 5       queries   4: keys 0 1 2 3 4      5: keys 0 1 2 3 4 5
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.parallel.sequence_split import SequenceShare


@dataclass(frozen=True)
class PackedKeys:
    """The keys of each span of a rank's rows, where other ranks have some of them."""

    lengths: tuple[int, ...]
    """Keys of each span, at least as many as it has rows; on the host."""
    cu_seqlens: Tensor
    """[spans + 1] int32 on the device, as of the rows."""
    rows: Tensor
    """[sum of lengths] int64 on the device: which of the rows that are gathered from all ranks, in the order of the
    ranks, each key is. A key of two spans is there twice, and no key is of more."""
    shards: int
    """Ranks that share the samples."""


@dataclass(frozen=True)
class PackedSequences:
    """The documents of one micro-batch of b s tokens. Made on the host, so that nothing ever waits for the device."""

    lengths: tuple[int, ...]
    """Rows of each document, none of them 0; on the host, their sum is b s."""
    cu_seqlens: Tensor
    """[documents + 1] int32 on the device: document i is the rows [cu_seqlens[i], cu_seqlens[i + 1])."""
    positions: Tensor
    """[b s] int64 on the device: place of each row in its document."""
    keys: PackedKeys | None = None
    """Under context parallelism, with b s / cp rows and spans of them; None: the rows are queries and keys."""

    @property
    def shards(self) -> int:
        """Ranks that share the samples: a sample is so many times as long as a rank's part."""
        return 1 if self.keys is None else self.keys.shards

    @property
    def max_length(self) -> int:
        """Rows of the longest document."""
        return max(self.lengths)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Keys of each document."""
        return self.lengths if self.keys is None else self.keys.lengths

    @property
    def key_cu_seqlens(self) -> Tensor:
        """As ``cu_seqlens``, of the keys."""
        return self.cu_seqlens if self.keys is None else self.keys.cu_seqlens

    @cached_property
    def bounds(self) -> tuple[list[int], list[int]]:
        """Cumulative lengths of rows and of keys on the host: document i is rows ``bounds[0][i]`` to
        ``bounds[0][i + 1]``. Made once for all layers."""
        return [0, *itertools.accumulate(self.lengths)], [0, *itertools.accumulate(self.key_lengths)]

    @property
    def max_key_length(self) -> int:
        """Keys of the document that has most."""
        return max(self.key_lengths)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: np.ndarray, device: torch.device) -> PackedSequences:
        """From int32 [documents + 1] on the host; the copies to a GPU are asynchronous."""
        lengths = np.diff(cu_seqlens)
        assert cu_seqlens[0] == 0 and (lengths > 0).all(), f"cumulative lengths {cu_seqlens} must rise from 0"
        positions = np.arange(cu_seqlens[-1], dtype=np.int64) - np.repeat(cu_seqlens[:-1], lengths)
        return cls(
            tuple(lengths.tolist()), on_device(cu_seqlens.astype(np.int32), device), on_device(positions, device)
        )

    @classmethod
    def from_share(cls, share: SequenceShare, device: torch.device) -> PackedSequences:
        """From a rank's share of a micro-batch on the host; the copies to a GPU are asynchronous."""
        lengths, keys = share.lengths, share.key_lengths
        ends, key_ends = (np.concatenate(([0], of.cumsum())).astype(np.int32) for of in (lengths, keys))
        return cls(
            tuple(lengths.tolist()),
            on_device(ends, device),
            on_device(share.positions, device),
            PackedKeys(
                tuple(keys.tolist()), on_device(key_ends, device), on_device(share.key_rows, device), share.shards
            ),
        )


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy to a GPU goes through pinned memory and nothing waits for it; a CPU shares."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class GraphPackedSequences(NamedTuple):
    """``PackedSequences`` for layers that torch.compile has made a graph of (``in_graph`` in attention.py).

    A graph is made for shapes and host numbers that stay, and how many documents a micro-batch has and how long they
    are is another matter every time. So these are tensors whose shapes depend on the size of the micro-batch alone.
    """

    lengths: Tensor
    """[b s] int64 on the host: rows of each document, then zeros."""
    cu_seqlens: Tensor
    """[b s + 1] int32 on the device, the last value repeated."""
    positions: Tensor
    """[b s] int64 on the device."""

    @classmethod
    def of(cls, documents: PackedSequences) -> GraphPackedSequences:
        """Without waiting for the device."""
        assert documents.keys is None, "layers are not compiled under context parallelism"
        rows, count = len(documents.positions), len(documents.lengths)
        lengths = torch.zeros(rows, dtype=torch.int64)
        lengths[:count] = torch.tensor(documents.lengths)
        cu_seqlens = torch.cat((documents.cu_seqlens, documents.cu_seqlens[-1:].expand(rows - count)))
        return cls(lengths, cu_seqlens, documents.positions)

    def documents(self) -> PackedSequences:
        """The inverse of ``of``."""
        count = int(self.lengths.count_nonzero())
        return PackedSequences(tuple(self.lengths[:count].tolist()), self.cu_seqlens[: count + 1], self.positions)
