"""AdamW (arXiv 1711.05101, algorithm 2) on flat fp32 tensors, with clipping, unscaling and the skip inside.

    g = grad / divisor;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w (1 - lr decay) - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)        k: updates applied so far

One pass over memory through torch's fused implementation, which also decides the skip on the device: where
``skip`` is 1 nothing changes, not even k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megatron_hammer.config import OptimizerConfig


@dataclass(frozen=True)
class AdamWState:
    """Equally shaped flat fp32 tensors of some weights; ``weight`` is the master."""

    weight: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decay: bool


@torch.no_grad()
def adamw_(
    states: Sequence[AdamWState], updates: Tensor, lr: float, config: OptimizerConfig, divisor: Tensor, skip: Tensor
) -> None:
    """Update all states in place.

    Args:
        updates: fp32 scalar, k before this call; afterwards k + 1 unless skipped.
        divisor: fp32 scalar by which gradients are divided (loss scale over clip factor).
        skip: fp32 scalar, 1 where nothing shall change.
    """
    for decay in (True, False):
        chosen = [s for s in states if s.decay is decay]
        if not chosen:
            continue
        torch_adamw(
            [s.weight for s in chosen],
            [s.grad for s in chosen],
            [s.exp_avg for s in chosen],
            [s.exp_avg_sq for s in chosen],
            [],
            [updates.clone() for _ in chosen],  # torch counts up one a tensor
            fused=True,
            grad_scale=divisor,
            found_inf=skip,
            amsgrad=False,
            beta1=config.beta1,
            beta2=config.beta2,
            lr=lr,
            weight_decay=config.weight_decay if decay else 0.0,
            eps=config.eps,
            maximize=False,
        )
    updates.add_(1 - skip)
