"""Where the documents of a packed micro-batch lie: what attention and the positions need to keep them apart.

The samples of a micro-batch lie one after the other, and the documents in them are told apart by cumulative lengths, as
in flash-attn, which is what every attention kernel for variable lengths takes::

    cu_seqlens   0         5     8               16      documents are the rows [0, 5), [5, 8) and [8, 16)
    positions    0 1 2 3 4 0 1 2 0 1 2 3 4 5 6 7         start anew with each document, for RoPE

The end of a sample is the end of a document, so no document is longer than s, the length of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """The documents of one micro-batch of b s tokens. Made on the host, so that nothing ever waits for the device."""

    lengths: tuple[int, ...]
    """Rows of each document, none of them 0; on the host, their sum is b s."""
    cu_seqlens: Tensor
    """[documents + 1] int32 on the device: document i is the rows [cu_seqlens[i], cu_seqlens[i + 1])."""
    positions: Tensor
    """[b s] int64 on the device: place of each row in its document."""

    @property
    def max_length(self) -> int:
        """Rows of the longest document."""
        return max(self.lengths)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: np.ndarray, device: torch.device) -> PackedSequences:
        """From int32 [documents + 1] on the host; the copies to a GPU are asynchronous."""
        lengths = np.diff(cu_seqlens)
        assert cu_seqlens[0] == 0 and (lengths > 0).all(), f"cumulative lengths {cu_seqlens} must rise from 0"
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        arrays = (torch.from_numpy(a) for a in (cu_seqlens.astype(np.int32), positions.astype(np.int64)))
        on_device = [a.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else a for a in arrays]
        return cls(tuple(lengths.tolist()), *on_device)


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
        rows, count = len(documents.positions), len(documents.lengths)
        lengths = torch.zeros(rows, dtype=torch.int64)
        lengths[:count] = torch.tensor(documents.lengths)
        cu_seqlens = torch.cat((documents.cu_seqlens, documents.cu_seqlens[-1:].expand(rows - count)))
        return cls(lengths, cu_seqlens, documents.positions)

    def documents(self) -> PackedSequences:
        """The inverse of ``of``."""
        count = int(self.lengths.count_nonzero())
        return PackedSequences(tuple(self.lengths[:count].tolist()), self.cu_seqlens[: count + 1], self.positions)
