"""The distributed optimizer as a whole against torch's AdamW, and the steps that it skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.config import Config
from megatron_hammer.model.llama import gradients_of
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
    for state in optimizer.rule.states:
        if state.param is not None:
            state.weight.copy_(state.param.detach())
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


def _poisoned(rank: int, config: Config) -> tuple[bool, bool, bool]:
    """One rank's gradient gets a NaN: (step applied, everything unchanged, next step applied)."""
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    train_step(model, optimizer, rank_batches(config, 1, ctx), config, 1, ctx)
    states = optimizer.rule.states
    state = [optimizer.store.params, optimizer.rule.updates]
    state += [tensor for s in states for tensor in (s.weight, s.exp_avg, s.exp_avg_sq)]
    optimizer.store.wait()
    before = [x.clone() for x in state]
    victim = gradients_of(model.layers["1"])[-1]  # of mlp.down
    add = victim.add

    def poisoned(write: Any, last: bool = True) -> Any:
        def poison(place: Tensor, begun: bool) -> None:
            write(place, begun)
            place.view(-1)[-1] = torch.nan

        return add(poison, last)

    if rank == ctx.world.size - 1:
        victim.add = poisoned  # type: ignore[method-assign]
    applied = bool(train_step(model, optimizer, rank_batches(config, 2, ctx), config, 2, ctx).applied)
    victim.add = add  # type: ignore[method-assign]
    optimizer.store.wait()
    same = all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    report = train_step(model, optimizer, rank_batches(config, 3, ctx), config, 3, ctx)
    return applied, same, bool(report.applied)


@pytest.mark.parametrize("ranks, tp", [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_not_finite_changes_nothing_on_any_rank(ranks: int, tp: int) -> None:
    config = tiny_config(parallel__tensor_model_parallel_size=tp, train__global_batch_size=8)
    results = run_distributed(ranks, _poisoned, config) if ranks > 1 else [_poisoned(0, config)]
    assert results == [(False, True, True)] * ranks


def test_bf16_trains_like_fp32() -> None:
    """fp32 masters and gradient sums: 20 steps of bf16 end within 2 % of fp32's loss."""
    from tests.model.tiny import train

    bf16, _ = train(0, tiny_config(train__precision="bf16"), 20)
    fp32, _ = train(0, tiny_config(), 20)
    assert bf16[-1][0] == pytest.approx(fp32[-1][0], rel=0.02)
