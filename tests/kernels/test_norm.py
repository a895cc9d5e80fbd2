"""Residual add and RMSNorm: the reference against the formula, written down independently."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.norm import add_rms_norm, rms_norm, with_gradient
from tests.kernels.one_gradient import OneGradient


def test_rms_norm() -> None:
    x, weight = torch.randn(5, 3, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    expected = torch.stack([row / ((row * row).sum() / 16 + 1e-3) ** 0.5 * weight for row in x.reshape(-1, 16)])
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected.view(5, 3, 16), rtol=1e-12, atol=1e-12)
    assert rms_norm(x.bfloat16(), weight.bfloat16(), 1e-3).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_rounded_before_it_is_normalised(dtype: torch.dtype) -> None:
    """The residual stream is what the norm reads, bit by bit; without a branch it is x itself."""
    x, branch, weight = (
        torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((5, 3, 16), (5, 3, 16), (16,))
    )
    normed, summed = add_rms_norm(x, branch, weight, 1e-5)
    assert torch.equal(summed, x + branch) and torch.equal(normed, rms_norm(summed, weight, 1e-5))
    normed, summed = add_rms_norm(x, None, weight, 1e-5)
    assert summed is x and torch.equal(normed, rms_norm(x, weight, 1e-5))


def test_gradients_of_both_results() -> None:
    """dx = d norm + d sum, the same for x and the branch: numerically in fp64."""
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 3, 6), (6,))]
    assert torch.autograd.gradcheck(lambda x, branch, weight: add_rms_norm(x, branch, weight, 1e-3), inputs)


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("of", ["others", "fused"])
def test_the_gradient_of_the_weight_goes_to_the_store(of: str, branched: bool) -> None:
    """The same number as autograd returns, added to the sum of two micro-batches, and autograd gets none."""
    if of == "fused" and (why := cpu.unavailable(torch.device("cpu"))):
        pytest.skip(why)
    function: Any = with_gradient(add_rms_norm) if of == "others" else partial(fused.add_rms_norm, cpu.library())
    x, weight = torch.randn(5, 3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    branch = torch.randn(5, 3, 16) if branched else None
    normed, summed = function(x, branch, weight, 1e-5)
    expected = torch.autograd.grad((normed.square().sum() + summed.sum(),), (x, weight))
    gradient = OneGradient(weight)
    for _ in range(2):
        x.grad = None
        normed, summed = function(x, branch, weight, 1e-5, gradient)
        (normed.square().sum() + summed.sum()).backward()
    assert weight.grad is None and torch.equal(gradient.main_grad, 2 * expected[1])
    assert x.grad is not None and torch.equal(x.grad, expected[0])
