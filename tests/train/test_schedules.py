"""The weighted mean over the global batch: against one process that computes it plainly from the losses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.config import Config
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import build_stage
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.step import sum_of_weights, train_step
from tests.distributed import run_distributed
from tests.host_waits import OperationNames
from tests.model.tiny import build, logical_parts, make_context, merged, random_batch, rank_batches, tiny_config

SHAPE = (8, 32)  # global batch and length of ``tiny_config``


def weights_of(kind: str) -> Tensor:
    """[global_batch_size, s] fp32; the later a sample, the fewer of its tokens count, so that ranks differ."""
    generator = torch.Generator().manual_seed(3)
    if kind == "ones":
        return torch.ones(SHAPE)
    if kind == "none":
        return torch.zeros(SHAPE)
    mask = (torch.rand(SHAPE, generator=generator) < torch.linspace(0.9, 0.1, SHAPE[0])[:, None]).float()
    return mask if kind == "mask" else mask * torch.rand(SHAPE, generator=generator)


def weighted_batches(config: Config, kind: str, ctx: ParallelContext) -> list[Batch[Tensor]]:
    """This rank's micro-batches with their rows of the weights."""
    b, stride = config.train.micro_batch_size, config.train.micro_batch_size * ctx.dp.size
    starts = range(b * ctx.dp.rank, config.train.global_batch_size, stride)
    return [
        dataclasses.replace(batch, loss_weights=weights_of(kind)[i : i + b])
        for batch, i in zip(rank_batches(config, 1, ctx), starts, strict=True)
    ]


def step_with(rank: int, config: Config, kind: str | None) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, gradient norm, and this rank's weights after one step; without loss weights for None."""
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    batches = rank_batches(config, 1, ctx) if kind is None else weighted_batches(config, kind, ctx)
    report = train_step(model, optimizer, batches, config, 1, ctx)
    assert bool(report.applied)
    return float(report.loss), float(report.grad_norm), logical_parts(model, config, ctx)


def config_with(**changes: Any) -> Config:
    """Steps that show the size of the gradient: AdamW's first is lr * g / (|g| + eps), here close to the gradient."""
    plain = dict(optimizer__eps=1.0, optimizer__weight_decay=0.0, optimizer__clip_grad=1e9)
    return tiny_config(**plain, optimizer__lr=1.0, schedule__warmup_steps=0, **changes)


def expected_step(config: Config, kind: str) -> tuple[float, float, dict[str, Tensor]]:
    """What ``step_with`` must find: from the weighted mean over the whole batch, by autograd on the logits."""
    ctx = ParallelContext.single()
    model = build_stage(config.model, ctx)
    initialise(model, parameter_table(config.model), config.train.seed)
    before = logical_parts(model, config, ctx)
    tokens, labels = random_batch(config, 1)
    logits = torch.nn.functional.linear(model.hidden(tokens), model.head_and_loss.weight)[..., : model.vocab_size]
    logits = logits.transpose(0, 1)  # [b, s, v]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(SHAPE)
    weights = weights_of(kind)
    loss = (losses * weights).sum() / weights.sum()
    extra = (logits.logsumexp(-1).square() * weights).sum() / weights.sum()
    (loss + config.train.z_loss * extra).backward()
    found = logical_parts(model, config, ctx, grads=True)
    norm = torch.stack([g.square().sum() for g in found.values()]).sum().sqrt()
    lr = learning_rate(config, 1)
    return float(loss.detach()), float(norm), {k: before[k] - lr * g / (g.abs() + 1) for k, g in found.items()}


@pytest.mark.parametrize("kind, z_loss", [("mask", 0.0), ("weights", 1e-2), ("ones", 0.0)])
@pytest.mark.parametrize("dp, tp", [(1, 1), (2, 1), (4, 1), (2, 2)])
def test_loss_and_gradient_are_those_of_the_weighted_mean(dp: int, tp: int, kind: str, z_loss: float) -> None:
    """Ranks and micro-batches hold different sums of weights; tolerances are those of fp32 sums in another order."""
    config = config_with(train__z_loss=z_loss, parallel__tensor_model_parallel_size=tp)
    expected_loss, expected_norm, expected = expected_step(config, kind)
    results = run_distributed(dp * tp, step_with, config, kind) if dp * tp > 1 else [step_with(0, config, kind)]
    for loss, norm, _ in results:
        assert loss == pytest.approx(expected_loss, rel=1e-5) and norm == pytest.approx(expected_norm, rel=1e-5)
    weights = merged([parts for _, _, parts in results])
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_ones_are_no_weights() -> None:
    """The same loss and step but for rounding, with and without a column of ones."""
    (loss, norm, weights), (other_loss, other_norm, others) = (step_with(0, config_with(), k) for k in ("ones", None))
    assert loss == pytest.approx(other_loss, rel=1e-6) and norm == pytest.approx(other_norm, rel=1e-6)
    for name in weights:
        torch.testing.assert_close(weights[name], others[name], rtol=1e-6, atol=1e-7)


def test_a_batch_that_counts_nothing_has_no_gradient() -> None:
    """Also with fp16's large scale of the loss."""
    for changes in ({}, {"train__precision": "fp16", "optimizer__initial_loss_scale": 2.0**22}):
        config = config_with(**changes)
        loss, norm, _ = step_with(0, config, "none")
        assert (loss, norm) == (0.0, 0.0)


def _communicates(rank: int, config: Config) -> tuple[int | float, float]:
    ctx = make_context(config)
    _, optimizer = build(config, ctx)
    return sum_of_weights(rank_batches(config, 1, ctx), optimizer, ctx), float(
        sum_of_weights(weighted_batches(config, "mask", ctx), optimizer, ctx)
    )


def test_the_sum_of_weights() -> None:
    """Known on the host without weights; with them the sum over both ranks, which hold different parts of it."""
    total = float(weights_of("mask").sum())
    for plain, weighted in run_distributed(2, _communicates, tiny_config()):
        assert isinstance(plain, int) and plain == 8 * 32
        assert weighted == total


def test_weights_make_no_step_wait_for_the_device() -> None:
    torch_kernels = {f"kernels__{name}": "torch" for name in ("norm", "rope", "swiglu", "loss", "adamw")}
    config = tiny_config(**torch_kernels)
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    batches = weighted_batches(config, "mask", ctx)
    with OperationNames() as seen:
        train_step(model, optimizer, batches, config, 1, ctx)
    assert not seen.waits()
