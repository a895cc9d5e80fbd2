"""The loss scale of fp16, alone and in training."""

from __future__ import annotations

import pytest
import torch

from megatron_hammer.config import Config, OptimizerConfig
from megatron_hammer.optim.loss_scaler import LossScaler
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.model.tiny import build, make_context, rank_batches, tiny_config


def _fp16_run(rank: int, config: Config, steps: int) -> list[tuple[float, bool, float]]:
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    seen = []
    for step in range(1, steps + 1):
        scale = float(optimizer.scaler.scale)
        report = train_step(model, optimizer, rank_batches(config, step, ctx), config, step, ctx)
        seen.append((float(report.loss), bool(report.applied), scale))
    return seen


def test_fp16_scales_its_loss() -> None:
    """Too large a scale overflows, is halved until it fits, and doubles again after the window."""
    config = tiny_config(
        train__precision="fp16",
        optimizer__initial_loss_scale=2.0**22,
        optimizer__loss_scale_window=3,
        model__hidden_size=32,
        model__ffn_hidden_size=64,
        model__num_layers=1,
        data__seq_length=16,
    )
    seen = _fp16_run(0, config, 14)
    scales = [scale for *_, scale in seen]
    assert not seen[0][1] and any(applied for _, applied, _ in seen)
    for (_, applied, scale), after in zip(seen, scales[1:], strict=False):
        assert after in ((scale, scale * 2) if applied else (scale / 2,))
    first = next(i for i, s in enumerate(seen) if s[1])
    assert scales[first : first + 4] == [scales[first]] * 3 + [scales[first] * 2]
    full = _fp16_run(
        0, tiny_config(model__hidden_size=32, model__ffn_hidden_size=64, model__num_layers=1, data__seq_length=16), 1
    )
    assert seen[0][0] == pytest.approx(full[0][0], rel=5e-3), "the reported loss is not scaled"
    assert run_distributed(2, _fp16_run, config, 14)[0][-1][1:] == seen[-1][1:]


def test_other_precisions_have_a_scale_of_one() -> None:
    scaler = LossScaler(OptimizerConfig(initial_loss_scale=8.0), torch.device("cpu"), adapts=False)
    scaler.adapt(torch.tensor(False))
    assert scaler.scale == 1 and scaler.good_steps == 0
