"""SwiGLU's product: the reference against the formula."""

from __future__ import annotations

import torch

from megatron_hammer.kernels.swiglu import swiglu


def test_swiglu() -> None:
    """Gate first; the gradient numerically."""
    gate, up = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 4, 6, dtype=torch.float64)
    both = torch.cat((gate, up), -1)
    torch.testing.assert_close(swiglu(both), gate / (1 + (-gate).exp()) * up)
    assert torch.autograd.gradcheck(swiglu, both.requires_grad_())
