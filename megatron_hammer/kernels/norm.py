"""Residual add and RMSNorm as one operation: x + branch and its norm, in one pass over memory where fused.

Bytes at best, in units of one hidden tensor: forward 4 (x, branch, sum, normed), backward 4 (two gradients,
sum, result).

Legend: s sequence, b micro-batch, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hammer.kernels.backend import ANYWHERE, CUDA, FLOATS, HALVES, Backend
from megatron_hammer.kernels.libraries import apex, liger, te
from megatron_hammer.kernels.linear import Gradient, stored
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import devices as native
from megatron_hammer.kernels.native import triton_rows


class AddRMSNormFunction(Protocol):
    """What a layer calls: ``add_rms_norm``, and where the gradient of the weight is summed (None: autograd has it)."""

    def __call__(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, gradient: Gradient | None = None, /
    ) -> tuple[Tensor, Tensor]: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension; statistics in fp32 (fp64 for fp64), as in Hugging Face.

    Args:
        x: [..., h], any float dtype.
        weight: [h].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The reference: (RMSNorm of x + branch, x + branch); without a branch x itself is the second.

    Args:
        x: [s, b, h], the residual stream. branch: [s, b, h], what the last sublayer adds to it. weight: [h].
    """
    summed = x if branch is None else x + branch
    return rms_norm(summed, weight, eps), summed


def with_gradient(function: Callable[..., tuple[Tensor, Tensor]]) -> AddRMSNormFunction:
    """What a layer calls, from a backend whose autograd returns the gradient of the weight: all but ours."""

    def called(
        x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, gradient: Gradient | None = None
    ) -> tuple[Tensor, Tensor]:
        return function(x, branch, stored(weight, gradient), eps)

    return called


def _fused(device: torch.device) -> Any:
    return partial(fused.add_rms_norm, native.library(device))


def _triton(device: torch.device) -> Any:
    from megatron_hammer.kernels.native import layers_triton

    return partial(fused.add_rms_norm, layers_triton)


BACKENDS = (
    Backend("fused", _fused, ANYWHERE, FLOATS, native.unsupported, native.unavailable),
    Backend("triton", _triton, CUDA, HALVES | {torch.float32}, triton_rows.unsupported, triton_rows.unavailable),
    Backend("torch", lambda device: add_rms_norm, compiles=True),
    Backend("te", lambda device: te.add_rms_norm, CUDA, HALVES | {torch.float32}, unavailable=te.not_installed,
            by_name_only=True),
    Backend("apex", lambda device: apex.add_rms_norm, CUDA, unavailable=apex.norm_unavailable, by_name_only=True),
    Backend("liger", lambda device: liger.add_rms_norm, CUDA, HALVES | {torch.float32}, liger.unsupported,
            liger.unavailable, by_name_only=True),
)  # fmt: skip
