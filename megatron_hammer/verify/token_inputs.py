"""The tokens, labels, positions and documents of a whole global batch, and the ranks that compute them: for proofs.

Derived from the samples alone, without the code that is judged; ``what_if.py`` changes them as a fault would.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.config import Config
from megatron_hammer.parallel.sequence_split import token_index
from megatron_hammer.verify.steps import global_batch

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits [n, v] and labels [n], the loss of each token."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each token as it should be: -ln p of its label."""
    return F.cross_entropy(logits, labels, reduction="none")


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of a step's global batch: a row for each micro-batch, [.., b s], in which its samples come one after
    the other."""

    tokens: Tensor
    labels: Tensor
    positions: np.ndarray
    """In their document."""
    documents: list[list[int]]
    """Lengths of those of each row; a whole sample under a causal mask."""

    @classmethod
    def of(cls, config: Config, step: int = 1) -> TokenInputs:
        """The inputs of a step as they should be."""
        windows, documents = global_batch(config, step)
        s, b = windows.shape[1] - 1, config.train.micro_batch_size
        if config.data.attention_mask != "document":
            documents = [[s] for _ in documents]
        rows = [[n for sample in documents[i : i + b] for n in sample] for i in range(0, len(documents), b)]
        return cls(windows[:, :-1].reshape(-1, b * s), windows[:, 1:].reshape(-1, b * s), positions_of(rows), rows)

    def losses(self, model: Any, loss: Loss = cross_entropy) -> np.ndarray:
        """The loss of each token, one sample after the other."""
        found = []
        with torch.no_grad():
            for sample, part in self.parts():
                positions = torch.from_numpy(self.positions[sample, part])[None]
                tokens = self.tokens[sample, part][None]
                # With a mask, or transformers would take positions with gaps for several documents.
                logits = model(tokens, attention_mask=torch.ones_like(tokens), position_ids=positions).logits[0]
                found.append(loss(logits, self.labels[sample, part]))
        losses: np.ndarray = torch.cat(found).numpy()
        return losses

    def parts(self) -> Iterator[tuple[int, slice]]:
        """Each document: its row, and its tokens there."""
        for sample, lengths in enumerate(self.documents):
            ends = np.cumsum([0, *lengths])
            yield from ((sample, slice(int(a), int(b))) for a, b in itertools.pairwise(ends))


def positions_of(documents: list[list[int]]) -> np.ndarray:
    """Place in its document of each token of rows with these lengths."""
    return np.stack([np.concatenate([np.arange(n) for n in lengths]) for lengths in documents])


@dataclass(frozen=True)
class TokenOwners:
    """The ranks that compute each token of the global batch, by their coordinates; rows as in ``TokenInputs``."""

    dp: np.ndarray
    micro_batch: np.ndarray
    cp: np.ndarray
    place: np.ndarray
    """Among the tokens that the context-parallel rank has of the document."""

    @classmethod
    def of(cls, config: Config, world_size: int, inputs: TokenInputs) -> TokenOwners:
        """Who computes what, by the order of the loader and the split of samples."""
        shape, dp_size = inputs.positions.shape, config.data_parallel_size(world_size)
        shards = config.parallel.context_parallel_size
        number = np.arange(shape[0])  # of a micro-batch, in the global batch
        cp, place = np.zeros(shape, dtype=int), inputs.positions.copy()
        if shards > 1:
            for row, lengths in enumerate(inputs.documents):
                ends = np.cumsum([0, *lengths]).astype(np.int32)
                for rank, tokens in enumerate(token_index(ends, shards, config.data.attention_mask == "document")):
                    cp[row, tokens] = rank
            for row, part in inputs.parts():
                for rank in range(shards):
                    mine = cp[row, part] == rank
                    place[row, part][mine] = np.arange(mine.sum())
        return cls(
            np.broadcast_to((number % dp_size)[:, None], shape),
            np.broadcast_to((number // dp_size)[:, None], shape),
            cp,
            place,
        )
