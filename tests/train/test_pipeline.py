"""Pipelines on real ranks: what they compute equals one process, whatever else the layout does."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_hammer.config import Config
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.step import train_step
from megatron_hammer.verify.compare import LayoutSizes, compare_numbers, compare_pieces, whole_tensors
from megatron_hammer.verify.shrink import alone
from tests.distributed import run_distributed
from tests.model.tiny import exact_steps, make_context, rank_batches, tiny_config

TP2 = dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
TIED = dict(model__tie_word_embeddings=True)
DOCUMENTS = dict(data__attention_mask="document")


def pipeline_config(pp: int, v: int = 1, **changes: Any) -> Config:
    config = tiny_config(
        # A large eps: without it AdamW's first steps are the signs of gradients, which rounding decides near zero.
        **dict(model__num_layers=5, train__global_batch_size=16, optimizer__eps=1e-3)
        | dict(parallel__pipeline_model_parallel_size=pp, parallel__virtual_pipeline_stages=v)
        | changes
    )
    return config


LAYOUTS: dict[str, tuple[int, Config]] = {
    "PP 2, tied": (2, pipeline_config(2, **TIED)),
    "PP 4, documents, a split of one's own": (
        4, pipeline_config(4, **DOCUMENTS, parallel__pipeline_split=[1, 2, 2, 0])),
    "PP 2 interleaved, TP 2 + SP, tied": (4, pipeline_config(2, 2, **TP2, **TIED)),
    "PP 2, DP 2, tied, full recompute, z-loss": (
        4, pipeline_config(2, **TIED, train__recompute="full", train__recompute_layers=3, train__z_loss=1e-3)),
    "PP 2, DP 2, sharded weights": (
        4, pipeline_config(2, parallel__shard="weights", train__recompute="full", train__recompute_layers=3)),
    "PP 2 interleaved, DP 2, sharded weights kept to backward": (
        4, pipeline_config(2, 2, **TIED, parallel__shard="weights", parallel__reshard_after_forward=False)),
    "PP 2 interleaved, DP 2, sharded gradients": (4, pipeline_config(2, 2, **TIED, parallel__shard="gradients")),
    "PP 2 interleaved, CP 2, selective": (
        4, pipeline_config(2, 2, train__recompute="selective", **DOCUMENTS, parallel__context_parallel_size=2)),
}  # fmt: skip


def losses_and_norms(rank: int, config: Config, steps: int) -> list[tuple[float, float, bool]]:
    """Steps in the config's precision."""
    ctx = make_context(config)
    stages, optimizer = build_stages(config, ctx)
    reports = [train_step(stages, optimizer, rank_batches(config, n, ctx), config, n, ctx) for n in range(1, steps + 1)]
    return [(float(r.loss), float(r.grad_norm), bool(r.applied)) for r in reports]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pipeline_equals_one_process(layout: str) -> None:
    """Gradients, masters, moments and weights after two steps in fp64; losses and norms of several in fp32."""
    ranks, config = LAYOUTS[layout]
    config.validate(ranks)
    expected = exact_steps(0, alone(config))
    found = run_distributed(ranks, exact_steps, config)
    worst, findings = compare_pieces(found, whole_tensors(expected.pieces), 1e-10, LayoutSizes(1, 1, 1))
    states = {"weight", "exp_avg", "exp_avg_sq"}
    kinds = states | {"gradient", "model", "initial weight", "initial model"} | {f"step-1 {kind}" for kind in states}
    assert findings == [] and set(worst) == kinds
    assert compare_numbers(found, expected, 1e-6, LayoutSizes(1, 1, 1))[1] == []
    for reports in run_distributed(ranks, losses_and_norms, config, 6):
        for report, wanted in zip(reports, losses_and_norms(0, alone(config), 6), strict=True):
            assert report == pytest.approx(wanted, rel=1e-5)


def test_a_step_that_overflows_is_skipped_on_all_ranks() -> None:
    """fp16 with a scale that is too large: norms, losses and decisions are those of one process."""
    half = dict(train__precision="fp16", optimizer__initial_loss_scale=2.0**24)
    config = pipeline_config(2, **TIED, **half, train__global_batch_size=4)
    expected = losses_and_norms(0, alone(config), 12)
    assert {applied for _, _, applied in expected} == {True, False}
    for reports in run_distributed(2, losses_and_norms, config, 12):
        assert [applied for _, _, applied in reports] == [applied for _, _, applied in expected]
        assert [loss for loss, _, _ in reports] == pytest.approx([loss for loss, _, _ in expected], rel=2e-3)
