"""The hot elementwise and attention operations, as plain torch functions and the set of them that a model uses.

Shapes: s sequence, b batch, n query heads, g query groups, d head_dim, h hidden, f feed-forward width (local ones).
The model receives an ``Operations`` and never asks which implementation it holds. ``select_operations`` chooses; the
plain functions here are the reference for every faster version.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.config import KernelsConfig


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
        cos, sin: [s, 1, 1, d] in x's dtype.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202): [..., 2f] -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over earlier positions: q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # [b, heads, s, d], no copy
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3)


@dataclass(frozen=True)
class Operations:
    """The functions a model is built with; each has the signature of its reference above."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rope: Callable[[Tensor, Tensor, Tensor], Tensor] = rope
    swiglu: Callable[[Tensor], Tensor] = swiglu
    causal_attention: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention


def select_operations(kernels: KernelsConfig) -> Operations:
    """The operations that the config asks for; compilation itself happens at their first call."""
    if not kernels.compile:
        return Operations()
    return Operations(*(torch.compile(f, dynamic=False) for f in (rms_norm, rope, swiglu)))
