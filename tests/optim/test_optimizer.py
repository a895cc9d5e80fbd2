"""The distributed optimizer against torch's AdamW, its skips, its loss scale and its layout."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_hammer.config import Config
from megatron_hammer.model.llama import gradients_of
from megatron_hammer.optim.store import lay_out
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.model.test_llama import carry_weights, hugging_face
from tests.model.tiny import build, make_context, random_batch, rank_batches, tiny_config


def test_fifty_recipe_steps_equal_a_plain_loop() -> None:
    """HammerLLM's hyper-parameters: ours against LlamaForCausalLM, torch's AdamW and clip_grad_norm_.

    1e-4 relative on every loss: 50 steps of fp32 rounding in two orders, through Adam's division by sqrt(v).
    """
    config = tiny_config(
        optimizer__lr=5e-4,
        optimizer__min_lr=5e-5,
        optimizer__weight_decay=0.0,
        optimizer__beta2=0.999,
        optimizer__clip_grad=1.0,
        schedule__style="cosine-clamped",
        schedule__warmup_steps=10,
        schedule__decay_steps=1_000_000,
        train__num_steps=50,
    )
    from megatron_hammer.optim.schedule import learning_rate

    torch.manual_seed(0)
    theirs = hugging_face(config.model)
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    carry_weights(model, dict(theirs.named_parameters()))
    optimizer.adamw.copy_masters_from_params()
    reference = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses: list[tuple[float, float]] = []
    for step in range(1, 51):
        report = train_step(model, optimizer, rank_batches(config, step, ctx), config, step, ctx)
        tokens, labels = random_batch(config, step)
        loss = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        assert float(report.grad_norm) == pytest.approx(float(norm), rel=1e-3)
        for group in reference.param_groups:
            group["lr"] = learning_rate(config, step)
        reference.step()
        reference.zero_grad()
        losses.append((float(report.loss), float(loss.detach())))
    assert losses[-1][0] < 0.8 * losses[0][0]
    for ours, other in losses:
        assert ours == pytest.approx(other, rel=1e-4)


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


def _poisoned(rank: int, config: Config) -> tuple[bool, bool, bool]:
    """One rank's gradient gets a NaN: (step applied, everything unchanged, next step applied)."""
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    train_step(model, optimizer, rank_batches(config, 1, ctx), config, 1, ctx)
    states = optimizer.adamw.states
    state = [optimizer.store.params, optimizer.adamw.updates]
    state += [tensor for s in states for tensor in (s.weight, s.exp_avg, s.exp_avg_sq)]
    before = [x.clone() for x in state]
    victim = gradients_of(model.layers["1"])[-1]  # of mlp.down
    ready = victim.ready

    def poison() -> None:
        victim.main_grad.view(-1)[-1] = torch.nan
        ready()

    if rank == ctx.world.size - 1:
        victim.ready = poison  # type: ignore[method-assign]
    applied = bool(train_step(model, optimizer, rank_batches(config, 2, ctx), config, 2, ctx).applied)
    victim.ready = ready  # type: ignore[method-assign]
    same = all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    report = train_step(model, optimizer, rank_batches(config, 3, ctx), config, 3, ctx)
    return applied, same, bool(report.applied)


@pytest.mark.parametrize("ranks, tp", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_not_finite_changes_nothing_on_any_rank(ranks: int, tp: int) -> None:
    config = tiny_config(parallel__tensor_model_parallel_size=tp, train__global_batch_size=8)
    results = run_distributed(ranks, _poisoned, config) if ranks > 1 else [_poisoned(0, config)]
    assert results == [(False, True, True)] * ranks


def _fp16_run(rank: int, config: Config, steps: int) -> list[tuple[float, bool, float]]:
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    seen = []
    for step in range(1, steps + 1):
        scale = float(optimizer.loss_scale)
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


def test_bf16_trains_like_fp32() -> None:
    """fp32 masters and gradient sums: 20 steps of bf16 end within 2 % of fp32's loss."""
    from tests.model.tiny import train

    bf16, _ = train(0, tiny_config(train__precision="bf16"), 20)
    fp32, _ = train(0, tiny_config(), 20)
    assert bf16[-1][0] == pytest.approx(fp32[-1][0], rel=0.02)


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_layout_properties(dp: int) -> None:
    """Parameters do not overlap, buckets tile the buffer, shards are equal and aligned."""
    rng = np.random.default_rng(dp)
    for _ in range(50):
        sizes = rng.integers(1, 5000, rng.integers(1, 20)).tolist()
        offsets, buckets = lay_out(sizes, int(rng.integers(1, 8000)), dp)
        assert sorted(i for b in buckets for i in b.parameters) == list(range(len(sizes)))
        assert buckets[0].start == 0 and all(a.stop == b.start for a, b in pairwise(buckets))
        for b in buckets:
            assert (b.stop - b.start) % (64 * dp) == 0
            at = b.start
            for i in b.parameters:
                assert offsets[i] == at
                at += sizes[i]
            assert at <= b.stop


def _gradient_norm(rank: int, config: Config) -> tuple[float, Any]:
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    batches = rank_batches(config, 1, ctx)
    for i, batch in enumerate(batches):
        optimizer.store.begin(first=i == 0, last=i == len(batches) - 1)
        model(batch.tokens, batch.labels).sum().backward()
    return float(optimizer.clip_grad_norm(1.0)), None


@pytest.mark.parametrize("tp, sp", [(2, True), (4, True), (8, False), (8, True)])
def test_norm_counts_copies_once(tp: int, sp: bool) -> None:
    """Query groups held by several ranks and norms under sequence parallelism: the norm is that of one process."""
    expected, _ = _gradient_norm(0, tiny_config())
    config = tiny_config(parallel__tensor_model_parallel_size=tp, parallel__sequence_parallel=sp)
    for norm, _ in run_distributed(tp, _gradient_norm, config):
        assert norm == pytest.approx(expected, rel=1e-6)
