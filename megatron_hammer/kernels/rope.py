"""Rotary position embedding on the fused queries, keys and values.

Bytes at best, in units of one hidden tensor: 2.25 each way (queries and keys read and written in place; the values are
not touched), and backward writes the gradient of all three as one tensor, which the product before it wants.

Legend: s sequence, b micro-batch, n query heads, g query groups, d size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.kernels.backend import ANYWHERE, CUDA, FLOATS, HALVES, Backend
from megatron_hammer.kernels.libraries import liger
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import devices as native
from megatron_hammer.kernels.native import triton_rows

RopeFunction = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, ...]]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by position (arXiv 2104.09864), half-split: dimension i turns with i + d/2, as in Hugging Face.

    Args:
        x: [s, b, heads, d].
        cos, sin: [s, 1, 1, d/2] in x's dtype, one row a position.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rope(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> tuple[Tensor, ...]:
    """The reference: [s, b, n + 2g, d] -> rotated q [s, b, n, d], rotated k [s, b, g, d], v [s, b, g, d].

    A backend may write over ``qkv``.
    """
    q, k, v = qkv.split((heads, groups, groups), dim=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def _fused(device: torch.device) -> Any:
    return partial(fused.rope, native.library(device))


def _triton(device: torch.device) -> Any:
    from megatron_hammer.kernels.native import layers_triton

    return partial(fused.rope, layers_triton)


BACKENDS = (
    Backend("fused", _fused, ANYWHERE, FLOATS, native.unsupported, native.unavailable),
    Backend("triton", _triton, CUDA, HALVES | {torch.float32}, triton_rows.unsupported, triton_rows.unavailable),
    Backend("torch", lambda device: rope, compiles=True),
    Backend("liger", lambda device: liger.rope, CUDA, HALVES | {torch.float32}, liger.unsupported, liger.unavailable,
            by_name_only=True),
)  # fmt: skip
