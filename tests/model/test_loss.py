"""Vocab-parallel cross-entropy against torch's own, in fp64 where only the formula can differ."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import megatron_hammer.model.loss as loss_module
from megatron_hammer.model.loss import vocab_parallel_cross_entropy
from megatron_hammer.parallel.context import Group
from tests.distributed import run_distributed


@pytest.mark.parametrize("chunk", [1, 1000, 2**20])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_torch(dtype: torch.dtype, tolerance: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", chunk)
    generator = torch.Generator().manual_seed(chunk)
    logits = (torch.randn(7, 3, 200, generator=generator, dtype=torch.float64) * 5).to(dtype).requires_grad_()
    labels = torch.randint(0, 150, (7, 3), generator=generator)
    weights = torch.rand(7, 3, generator=generator, dtype=torch.float64)
    expected = F.cross_entropy(logits[..., :150].double().flatten(0, 1), labels.flatten(), reduction="none").view(7, 3)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    copy = logits.detach().clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(copy * 1, labels, 150, Group())
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6 if dtype != torch.float64 else 1e-13, atol=1e-6)
    (loss * weights.to(loss.dtype)).sum().backward()
    assert copy.grad is not None
    assert (copy.grad.double() - gradient.double()).norm() / gradient.double().norm() < tolerance
    assert not copy.grad[..., 150:].any(), "padding must get no gradient"


def _sharded(rank: int, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, size: int) -> tuple:
    width = logits.shape[-1] // size
    mine = logits[..., rank * width : (rank + 1) * width].clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(mine * 1, labels, vocab_size, Group(rank, size))
    loss.sum().backward()
    assert mine.grad is not None
    return loss.detach().numpy(), mine.grad.numpy()


@pytest.mark.parametrize("vocab_size", [61, 90, 128])
def test_ranks_agree(vocab_size: int) -> None:
    """4 ranks of 32 columns; with 61 true columns the last two hold padding only."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(5, 2, 128, generator=generator, dtype=torch.float64) * 30  # far from zero: the max matters
    labels = torch.randint(0, vocab_size, (5, 2), generator=generator)
    results = run_distributed(4, _sharded, logits, labels, vocab_size, 4)
    logits.requires_grad_()
    expected = F.cross_entropy(logits[..., :vocab_size].flatten(0, 1), labels.flatten(), reduction="none").view(5, 2)
    expected.sum().backward()
    for loss, _ in results:
        torch.testing.assert_close(torch.from_numpy(loss), expected.detach(), rtol=1e-12, atol=1e-12)
    gradient = torch.cat([torch.from_numpy(g) for _, g in results], -1)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-10, atol=1e-12)
