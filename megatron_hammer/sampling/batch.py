"""The batch: the samples of one micro-batch as one value, from the datasets to the loss.

::

    TrainData.read, ValidData.read -> Batch of NumPy arrays -> Batch.to(device) -> Batch of tensors -> model and loss
                                      Batch.shard(rank, cp)

A batch holds all that is known of a token on its way to the loss: the weight of its loss (a loss mask is a weight of 0
or 1), which documents attention keeps apart, and which source it comes from. Under context parallelism the ranks of a
group read the same batch and each keeps its part of the tokens (``parallel/sequence_split.py``). Torch is imported by
``Batch.to`` alone, so that everything which only reads samples starts without it.

Legend: b samples of the micro-batch, s tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from megatron_hammer.parallel.sequence_split import SequenceShare, share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megatron_hammer.kernels.packed_sequences import PackedSequences

Array = TypeVar("Array", np.ndarray, "Tensor")


@dataclass(frozen=True, eq=False)
class Batch(Generic[Array]):
    """The samples of one micro-batch; ``Batch[np.ndarray]`` on the host, ``Batch[Tensor]`` on the device."""

    tokens: Array
    """[b, s] int64, the inputs."""
    labels: Array
    """[b, s] int64, the targets: label i is the token after token i."""
    loss_weights: Array | None = None
    """[b, s] fp32, by what the loss of each token counts, 0 for those that are masked; None: each counts 1."""
    documents: np.ndarray | SequenceShare | PackedSequences | None = None
    """Documents that attention keeps apart; None where it attends across them. On the host cumulative lengths over the
    b s tokens, all samples one after the other: [documents + 1] int32, or which part of them this is; on the device
    what the kernels take."""
    sources: Array | None = None
    """[b] int64, source of each sample, counted as in ``TrainData.sources``; [b, s] where the spans of a sample come
    from several. None where nobody asks."""
    windows: Array | None = None
    """[b, s + 1] int64, the memory of which ``tokens`` and ``labels`` are views, so that one copy takes both to the
    device; None where they are apart."""

    @classmethod
    def from_windows(
        cls,
        windows: Array,
        loss_weights: Array | None = None,
        documents: np.ndarray | PackedSequences | None = None,
        sources: Array | None = None,
    ) -> Batch[Array]:
        """Samples of s + 1 consecutive tokens each, [b, s + 1]: inputs are the first s, targets the last s."""
        return cls(windows[:, :-1], windows[:, 1:], loss_weights, documents, sources, windows)

    def shard(self: Batch[np.ndarray], rank: int, shards: int) -> Batch[np.ndarray]:
        """The part of rank ``rank`` of ``shards`` ranks that share the samples: [b, s / shards] in place of [b, s].

        A row of the result is no sample any more: it holds ``s / shards`` of the part's tokens, in their order. Without
        documents each sample is one document to the kernels, which are told which keys belong to it.
        """
        if shards == 1:
            return self
        b, s = self.tokens.shape
        assert self.documents is None or isinstance(self.documents, np.ndarray), "a whole batch on the host"
        ends = np.arange(b + 1) * s if self.documents is None else self.documents
        part = share(ends, rank, shards, keep_whole=self.documents is not None)

        def kept(array: np.ndarray) -> np.ndarray:
            tokens: np.ndarray = array.reshape(-1)[part.rows]
            return tokens.reshape(b, s // shards)

        weights = None if self.loss_weights is None else kept(self.loss_weights)
        sources = self.sources
        if sources is not None:
            sources = kept(sources if sources.shape == (b, s) else np.repeat(sources, s))
        return Batch(kept(self.tokens), kept(self.labels), weights, part, sources)

    def to(self: Batch[np.ndarray], device: torch.device) -> Batch[Tensor]:
        """The same on a device. Copies to a GPU go through pinned memory and nothing waits for them; a CPU shares."""
        from megatron_hammer.kernels.packed_sequences import PackedSequences

        documents = self.documents
        if isinstance(documents, np.ndarray):
            documents = PackedSequences.from_cu_seqlens(documents, device)
        elif isinstance(documents, SequenceShare):
            documents = PackedSequences.from_share(documents, device)
        weights = None if self.loss_weights is None else _copied(self.loss_weights, device)
        sources = None if self.sources is None else _copied(self.sources, device)
        if self.windows is not None:
            return Batch.from_windows(_copied(self.windows, device), weights, documents, sources)
        return Batch(_copied(self.tokens, device), _copied(self.labels, device), weights, documents, sources)


def _copied(array: np.ndarray, device: torch.device) -> Tensor:
    import torch

    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
