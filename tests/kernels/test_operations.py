"""The reference operations against formulas written down independently, and the compiled ones against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.attention import causal_attention
from megatron_hammer.kernels.operations import rms_norm, rope, select_operations, swiglu


def test_rms_norm() -> None:
    x, weight = torch.randn(5, 3, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    expected = torch.stack([row / ((row * row).sum() / 16 + 1e-3) ** 0.5 * weight for row in x.reshape(-1, 16)])
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected.view(5, 3, 16), rtol=1e-12, atol=1e-12)
    assert rms_norm(x.bfloat16(), weight.bfloat16(), 1e-3).dtype == torch.bfloat16


def test_rope_is_a_rotation_by_position() -> None:
    """Dimensions i and i + d/2 are the parts of a complex number that position p turns by p times its angle."""
    s, d = 7, 8
    x = torch.randn(s, 2, 3, d, dtype=torch.float64)
    angles = torch.outer(torch.arange(s, dtype=torch.float64), 10_000.0 ** (-torch.arange(0, d, 2).double() / d))
    numbers = (
        torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)[:, None, None]
    )
    both = angles.repeat(1, 2)[:, None, None]
    torch.testing.assert_close(rope(x, both.cos(), both.sin()), torch.cat((numbers.real, numbers.imag), -1))


def test_swiglu() -> None:
    gate, up = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(swiglu(torch.cat((gate, up), -1)), gate / (1 + (-gate).exp()) * up)


@pytest.mark.parametrize("heads, groups", [(6, 6), (6, 2), (4, 1)])
def test_causal_attention(heads: int, groups: int) -> None:
    """Query head i uses group i // (heads / groups), and looks at no later position."""
    s, b, d = 9, 2, 4
    q, k, v = (torch.randn(s, b, n, d, dtype=torch.float64) for n in (heads, groups, groups))
    out = causal_attention(q, k, v)
    for head in range(heads):
        group = head // (heads // groups)
        for position in range(s):
            scores = torch.einsum("bd,tbd->bt", q[position, :, head], k[: position + 1, :, group]) / d**0.5
            expected = torch.einsum("bt,tbd->bd", scores.softmax(-1), v[: position + 1, :, group])
            torch.testing.assert_close(out[position, :, head], expected)


def _with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, *rest)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out).cumsum(-1))]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_operations_equal_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Forward and backward, odd shapes and a view; bf16: fused kernels keep fp32 where eager rounds between steps."""
    fused = select_operations(KernelsConfig(compile=True))
    x, weight = torch.randn(7, 3, 24, dtype=dtype), torch.randn(24, dtype=dtype)
    heads = torch.randn(7, 3, 5 * 8, dtype=dtype).view(7, 3, 5, 8)[:, :, 1:4]  # a slice of a fused projection
    cos, sin = torch.randn(7, 1, 1, 8, dtype=dtype), torch.randn(7, 1, 1, 8, dtype=dtype)
    for reference, compiled, inputs, rest in (
        (rms_norm, fused.rms_norm, [x, weight], (1e-5,)),
        (rope, fused.rope, [heads], (cos, sin)),
        (swiglu, fused.swiglu, [x], ()),
    ):
        pairs = zip(_with_gradients(reference, inputs, *rest), _with_gradients(compiled, inputs, *rest), strict=True)
        for expected, found in pairs:
            assert found.dtype == expected.dtype
            assert (found - expected).float().norm() <= tolerance * expected.float().norm(), reference.__name__
