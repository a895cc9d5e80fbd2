"""The hot elementwise operations as plain torch functions, and the set of all operations that a model uses.

Shapes: s sequence, b batch, d head_dim, h hidden, f feed-forward width (local ones); of attention in ``attention.py``.
The model receives an ``Operations`` and never asks which implementation it holds. ``select_operations`` chooses; the
plain functions here are the reference for every faster version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.attention import AttentionDemand, AttentionFunction, select_attention, whole_samples
from megatron_hammer.kernels.linear_cross_entropy import LossKernels, select_loss


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension; statistics in fp32 (fp64 for fp64), as in Hugging Face.

    Args:
        x: [..., h], any float dtype.
        weight: [h].
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by position (arXiv 2104.09864), half-split: dimension i turns with i + d/2, as in Hugging Face.

    Args:
        x: [s, b, heads, d].
        cos, sin: [s, 1, 1, d] in x's dtype, one row a position.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202): [..., 2f] -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@dataclass(frozen=True)
class Operations:
    """The functions a model is built with; each has the signature of its reference above."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = rope
    swiglu: Callable[[Tensor], Tensor] = swiglu
    attention: AttentionFunction = whole_samples
    loss: LossKernels = field(default_factory=LossKernels)


def select_operations(kernels: KernelsConfig, demand: AttentionDemand | None = None) -> Operations:
    """The operations that the config asks for; compilation itself happens at their first call.

    Raises:
        ConfigError: no backend, or not the one that the user named, can do what is asked for.
    """
    demand = demand or AttentionDemand()
    attention = select_attention(kernels.attention, demand).function
    loss = select_loss(kernels.loss, kernels.loss_chunk_tokens, demand.device)
    if not kernels.compile:
        return Operations(attention=attention, loss=loss)
    fuse = partial(torch.compile, dynamic=False)
    return Operations(fuse(rms_norm), fuse(rope), fuse(swiglu), attention, loss)
