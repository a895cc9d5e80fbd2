"""AdamW (arXiv 1711.05101, algorithm 2) on flat fp32 tensors, with clipping, unscaling and the skip inside.

    g = grad / divisor;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    w = w (1 - lr decay) - lr (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps)        k: updates applied so far

The reference goes through torch's fused implementation, which also decides the skip on the device: where ``skip`` is 1
nothing changes, not even k. Bytes at best, for each parameter: 30 (gradient 4, master and moments read and written 24,
16-bit copy 2), and 4 more for the norm before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.argument_types import AdamWState
from megatron_hammer.kernels.backend import ANYWHERE, CUDA, FLOATS, HALVES, Backend, Requirements
from megatron_hammer.kernels.libraries import apex
from megatron_hammer.kernels.native import devices as native
from megatron_hammer.kernels.native import triton_rows


@torch.no_grad()
def adamw_(
    states: Sequence[AdamWState], updates: Tensor, lr: float, config: OptimizerConfig, divisor: Tensor, skip: Tensor
) -> None:
    """Update all states in place, and each state's ``param`` from its new weight.

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
    for state in states:
        if state.param is not None:
            state.param.copy_(state.weight)
    updates.add_(1 - skip)


@torch.no_grad()
def add_square_sum(part: Tensor, out: Tensor) -> None:
    """out += sum(part^2): part flat fp32, out an fp32 scalar."""
    out.add_(torch.linalg.vector_norm(part).square())


@dataclass(frozen=True)
class OptimizerKernels:
    """What the optimizer computes with; each function has the signature of its reference above."""

    name: str = "torch"
    """Value of ``kernels.adamw``."""
    update: Callable[[Sequence[AdamWState], Tensor, float, OptimizerConfig, Tensor, Tensor], None] = adamw_
    add_square_sum: Callable[[Tensor, Tensor], None] = add_square_sum


def _in_one_pass(name: str, kernels: Any) -> OptimizerKernels:
    """One pass over each state by a kernel of our own."""

    @torch.no_grad()
    def update(
        states: Sequence[AdamWState], updates: Tensor, lr: float, config: OptimizerConfig, divisor: Tensor, skip: Tensor
    ) -> None:
        for s in states:
            decay = config.weight_decay if s.decay else 0.0
            buffers = (s.weight, s.grad, s.exp_avg, s.exp_avg_sq, s.param)
            kernels.adamw(*buffers, lr, config.beta1, config.beta2, config.eps, decay, divisor, skip, updates)
        updates.add_(1 - skip)

    return OptimizerKernels(name, update, kernels.add_square_sum)


def _fused(device: torch.device) -> OptimizerKernels:
    return _in_one_pass("fused", native.library(device))


def _triton(device: torch.device) -> OptimizerKernels:
    from megatron_hammer.kernels.native import adamw_triton

    return _in_one_pass("triton", adamw_triton)


def _apex(device: torch.device) -> OptimizerKernels:
    return OptimizerKernels("apex", apex.adamw_, apex.add_square_sum)


def _fused_unsupported(required: Requirements) -> str:
    return native.unsupported(replace(required, compile="none"))  # no compiler ever sees the optimizer


BACKENDS = (
    Backend("fused", _fused, ANYWHERE, FLOATS, _fused_unsupported, native.unavailable),
    Backend("triton", _triton, CUDA, HALVES | {torch.float32}, unavailable=triton_rows.unavailable),
    Backend("torch", lambda device: OptimizerKernels()),
    Backend("apex", _apex, CUDA, unavailable=apex.adamw_unavailable, by_name_only=True),
)
