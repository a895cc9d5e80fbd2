"""The operations that a model is built with, compiled, against their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.norm import add_rms_norm
from megatron_hammer.kernels.rope import rope
from megatron_hammer.kernels.selection import select_operations
from megatron_hammer.kernels.swiglu import swiglu


def _with_gradients(function: Callable[..., Any], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, *rest)
    outs = list(out) if isinstance(out, tuple) else [out]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, [x.cumsum(-1).detach() for x in outs])]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_operations_equal_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Forward and backward, odd shapes and a view; bf16: fused kernels keep fp32 where eager rounds between steps."""
    fused = select_operations(KernelsConfig(compile="operations", norm="torch", rope="torch", swiglu="torch"))
    x, branch, weight = (torch.randn(*shape, dtype=dtype) for shape in ((7, 3, 24), (7, 3, 24), (24,)))
    qkv = torch.randn(7, 3, 7 * 16, dtype=dtype).view(7, 3, 7, 16)[:, :, 1:6]  # strided
    cos, sin = torch.randn(7, 1, 1, 8, dtype=dtype), torch.randn(7, 1, 1, 8, dtype=dtype)
    for reference, compiled, inputs, rest in (
        (add_rms_norm, fused.add_rms_norm, [x, branch, weight], (1e-5,)),
        (lambda x, weight: add_rms_norm(x, None, weight, 1e-5)[0],
         lambda x, weight: fused.add_rms_norm(x, None, weight, 1e-5)[0], [x, weight], ()),
        (rope, fused.rope, [qkv], (cos, sin, 3, 1)),
        (swiglu, fused.swiglu, [x], ()),
    ):  # fmt: skip
        assert reference is not compiled
        pairs = zip(_with_gradients(reference, inputs, *rest), _with_gradients(compiled, inputs, *rest), strict=True)
        for expected, found in pairs:
            assert found.dtype == expected.dtype
            assert (found - expected).float().norm() <= tolerance * expected.float().norm(), reference
