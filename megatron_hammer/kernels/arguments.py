"""The types of arguments that an operation's file shares with the backends of that operation.

They stand below both, so that a backend need not import the file whose table names it.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class AdamWState:
    """Equally shaped flat fp32 tensors of some weights; ``weight`` is the master."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decay: bool
    param: Tensor | None = None
    """The model's own copy of the weight, in its 16-bit dtype; None where that is the master itself."""
