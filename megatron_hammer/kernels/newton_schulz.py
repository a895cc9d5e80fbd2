"""Orthogonalises matrices by the Newton-Schulz iteration, for Muon, whose update is the orthogonalised momentum.

With X = U S V^T the nearest matrix of orthogonal rows is U V^T. Five steps of a polynomial bring the singular values
there without finding them, each with three products of which two are of small squares::

    X <- X / |X|_F;   five times   A = X X^T,   X <- a X + (b A + c A A) X        a, b, c = 3.4445, -4.7750, 2.0315

so that each singular value s goes through a s + b s^3 + c s^5. The coefficients are Keller Jordan's ("Muon: an
optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon, 2024): their slope at zero is as
steep as it can be, for which they do not converge. Values from 0.002 to 1 of |X|_F end between 0.68 and 1.21, smaller
ones lower.
Flops of a matrix [r, c], r <= c: 5 (4 r r c + 2 r r r).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megatron_hammer.base.system import processor_text

STEPS = 5
A, B, C = 3.4445, -4.7750, 2.0315
SMALLEST_NORM = 1e-20
"""A matrix of less, as one of zeros, is not brought to norm 1 and becomes one of (nearly) zeros."""

Precision = Literal["auto", "bf16", "fp32"]
"""Values of ``optimizer.newton_schulz``."""


def orthogonalise(x: Tensor) -> Tensor:
    """[n, r, c] of r <= c -> [n, r, c], singular values near 1; accumulates the norm in fp32. Overwrites ``x``."""
    assert x.shape[1] <= x.shape[2], f"{tuple(x.shape)}: lay the shorter side in rows"
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide).clamp_(min=SMALLEST_NORM)
    x.div_(norm)
    other, gram, square = torch.empty_like(x), *(x.new_empty((x.shape[0], x.shape[1], x.shape[1])) for _ in range(2))
    for _ in range(STEPS):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=B, alpha=C, out=square)
        torch.baddbmm(x, square, x, beta=A, out=other)
        x, other = other, x
    return x


def flops(rows: int, cols: int) -> int:
    """Of one matrix: what ranks are given equal shares of."""
    short, long = sorted((rows, cols))
    return STEPS * (4 * short * short * long + 2 * short**3)


def type_of_products(precision: Precision, sums: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to orthogonalise in.

    Args:
        sums: type of the gradients' sums; fp64 in proofs, which then are computed in it, whatever is chosen.
    """
    if sums == torch.float64 or precision == "fp32":
        return sums
    return torch.bfloat16 if precision == "bf16" or device.type != "cpu" or has_quick_bf16() else sums


def has_quick_bf16() -> bool:
    """Whether this CPU has products of bf16: an EPYC core does those of 512 x 1408 some 1.5 to 2 times as fast as in
    fp32. Without, torch converts there and back. What is no Linux says nothing of itself, and takes fp32."""
    flags = processor_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags
