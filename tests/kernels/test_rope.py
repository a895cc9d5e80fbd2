"""Rotary position embedding: the reference against complex numbers."""

from __future__ import annotations

import torch

from megatron_hammer.kernels.rope import rope, rotate


def _angles(s: int, d: int) -> torch.Tensor:
    return torch.outer(torch.arange(s, dtype=torch.float64), 10_000.0 ** (-torch.arange(0, d, 2).double() / d))


def test_rope_is_a_rotation_by_position() -> None:
    """Dimensions i and i + d/2 are the parts of a complex number that position p turns by p times its angle."""
    s, d = 7, 8
    x, angles = torch.randn(s, 2, 3, d, dtype=torch.float64), _angles(7, 8)[:, None, None]
    numbers = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    assert angles.shape == (s, 1, 1, d // 2)
    torch.testing.assert_close(rotate(x, angles.cos(), angles.sin()), torch.cat((numbers.real, numbers.imag), -1))


def test_queries_and_keys_turn_and_values_stay() -> None:
    heads, groups, angles = 4, 2, _angles(7, 6)[:, None, None]
    cos, sin, qkv = angles.cos(), angles.sin(), torch.randn(7, 3, heads + 2 * groups, 6, dtype=torch.float64)
    q, k, v = rope(qkv.clone(), cos, sin, heads, groups)
    assert torch.equal(q, rotate(qkv[:, :, :heads], cos, sin))
    assert torch.equal(k, rotate(qkv[:, :, heads : heads + groups], cos, sin))
    assert torch.equal(v, qkv[:, :, heads + groups :])


def test_the_gradient_is_the_rotation_back() -> None:
    """A rotation keeps lengths, and its gradient turns the other way."""
    angles = _angles(7, 6)[:, None, None]
    cos, sin = angles.cos(), angles.sin()
    qkv, grads = torch.randn(7, 2, 5, 6, dtype=torch.float64, requires_grad=True), torch.randn(7, 2, 5, 6).double()
    out = rope(qkv, cos, sin, 3, 1)
    (found,) = torch.autograd.grad(out, qkv, grads.split((3, 1, 1), dim=2))
    expected = torch.cat((rotate(grads[:, :, :4], cos, -sin), grads[:, :, 4:]), 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.cat(out, 2).norm(dim=-1), qkv.norm(dim=-1))
