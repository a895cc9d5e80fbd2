"""AdamW on shards: what decays."""

from __future__ import annotations

import pytest
import torch

from megatron_hammer.parallel.context import ParallelContext
from tests.model.tiny import build, random_batch, tiny_config


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_weight_decay_on_matrices_only(decay: float) -> None:
    """With a zero gradient AdamW only decays: matrices shrink, norms stay."""
    config = tiny_config(optimizer__weight_decay=decay, optimizer__lr=0.1)
    model, optimizer = build(config, ParallelContext.single())
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    optimizer.store.begin(first=True, last=True)
    tokens, labels = random_batch(config, 1)
    (model(tokens, labels).sum() * 0).backward()
    optimizer.clip_grad_norm(1.0)
    optimizer.step(0.1)
    for name, weight in model.named_parameters():
        expected = before[name] * (1.0 if "norm" in name else 1 - 0.1 * decay)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0)
