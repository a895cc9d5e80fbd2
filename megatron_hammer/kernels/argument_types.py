"""The types of arguments that an operation's file shares with the backends of that operation.

They stand below both, so that a backend need not import the file whose table names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """The part of the vocabulary that a rank's logits are of."""

    start: int
    """Token id of the first column."""
    valid: int
    """Columns that stand for a token; the others are padding."""

    @classmethod
    def of(cls, rank: int, width: int, vocab_size: int) -> Columns:
        """Those of one rank, which holds ``width`` columns of the padded vocabulary."""
        return cls(width * rank, max(0, min(width, vocab_size - width * rank)))

    def find(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids [n] -> column of each (0 where another rank has it), and whether it is here."""
        local = labels - self.start
        here = (local >= 0) & (local < self.valid)
        return torch.where(here, local, 0), here


class ShardState(ABC):
    """Equally shaped flat fp32 tensors of some weights; ``weight`` is the master."""

    weight: Tensor
    grad: Tensor
    decay: bool
    param: Tensor | None
    """The model's own copy of the weight, in its 16-bit dtype; None where that is the master itself."""

    @property
    @abstractmethod
    def moments(self) -> dict[str, Tensor]:
        """What is remembered of gradients, by the names that checkpoints use."""

    @property
    def kinds(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"weight": self.weight, **self.moments}

    @property
    def own_bytes(self) -> int:
        """Memory beside that of the model's weights and the gradients."""
        return sum(tensor.nbytes for tensor in (self.moments if self.param is None else self.kinds).values())


@dataclass(frozen=True)
class AdamWState(ShardState):
    """What AdamW keeps of some weights: both moments."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decay: bool
    param: Tensor | None = None

    @property
    def moments(self) -> dict[str, Tensor]:
        """Both."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}


@dataclass(frozen=True)
class MuonState(ShardState):
    """What Muon keeps of some weights: the first moment alone."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    decay: bool
    param: Tensor | None = None

    @property
    def moments(self) -> dict[str, Tensor]:
        """The first."""
        return {"exp_avg": self.exp_avg}
