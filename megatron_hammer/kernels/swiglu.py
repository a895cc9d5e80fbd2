"""SwiGLU, the product in the feed-forward layer: silu(gate) x up.

Bytes at best, with f the feed-forward width: forward 3 f times an element's size (gate and up read, product
written), backward 5 f (gradient, gate and up read, both gradients written).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.kernels.backend import ANYWHERE, CUDA, FLOATS, HALVES, Backend
from megatron_hammer.kernels.libraries import liger
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import devices as native
from megatron_hammer.kernels.native import triton_rows

SwiGLUFunction = Callable[[Tensor], Tensor]


def swiglu(gate_up: Tensor) -> Tensor:
    """The reference: silu(gate) * up (arXiv 2002.05202), [..., 2f] -> [..., f]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _fused(device: torch.device) -> Any:
    return partial(fused.swiglu, native.library(device))


def _triton(device: torch.device) -> Any:
    from megatron_hammer.kernels.native import layers_triton

    return partial(fused.swiglu, layers_triton)


BACKENDS = (
    Backend("fused", _fused, ANYWHERE, FLOATS, native.unsupported, native.unavailable),
    Backend("triton", _triton, CUDA, HALVES | {torch.float32}, triton_rows.unsupported, triton_rows.unavailable),
    Backend("torch", lambda device: swiglu, compiles=True),
    Backend("liger", lambda device: liger.swiglu, CUDA, HALVES | {torch.float32}, liger.unsupported, liger.unavailable,
            by_name_only=True),
)  # fmt: skip
