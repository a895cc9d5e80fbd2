"""What a dry run says of memory, disk, time and data, against what is really allocated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_hammer.base.errors import DataError
from megatron_hammer.config import load_config
from megatron_hammer.costs.forecast import forecast
from megatron_hammer.costs.rank_costs import state_bytes
from megatron_hammer.kernels.selection import kernel_requirements, select_backends
from megatron_hammer.metrics.reporter import _perplexity
from megatron_hammer.model.parameters import count_parameters
from megatron_hammer.parallel.context import Group, ParallelContext
from megatron_hammer.sampling.plan import format_plan, plan_sources
from megatron_hammer.train.build import build
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import describe_dry_run
from tests.model.tiny import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tp, dp", [(1, 1), (2, 1), (1, 4)])
def test_states_are_what_is_allocated(precision: str, tp: int, dp: int) -> None:
    config = tiny_config(train__precision=precision, parallel__tensor_model_parallel_size=tp)
    ctx = ParallelContext(torch.device("cpu"), world=Group(0, tp * dp), tp=Group(0, tp), dp=Group(0, dp))
    _, optimizer = build(config, ctx)
    states = optimizer.rule.states
    own = sum(s.own_bytes for s in states)
    expected = state_bytes(config, tp * dp)
    padding = 8 * dp * 64 * len(optimizer.store.buckets)  # buckets end at multiples of 64 elements a rank
    for found, name in ((optimizer.store.params.nbytes, "weights"), (optimizer.store.grads.nbytes, "gradients")):
        assert expected[name] <= found <= expected[name] + padding
    # A rank's shards of the buckets: a dp-th of everything, more or less one bucket.
    assert abs(own - expected["optimizer"]) <= 12 * (padding + 40_000 // 4)


def test_the_lines() -> None:
    config = load_config(ROOT / "examples/configs/hammerllm_1b4.yaml", ["model.vocab_size=105789"])
    backends = select_backends(config.kernels, kernel_requirements(config, torch.device("cpu")))
    memory, disk, time = forecast(config, 8, backends)
    assert count_parameters(config.model) == 1_402_288_128
    assert memory.startswith("memory of a rank: at least ") and "weights 2.6, gradients 5.2, optimizer 2" in memory
    assert "15.7 GiB a checkpoint, 799.3 GiB while one more than checkpoint.keep_last=50" in disk
    assert "2,097,152,000,000 tokens, 1.72e+22 FLOPs; at 50% of the bf16 peak about 50.4 days on 8 x H100" in time
    small = tiny_config()
    assert "on two CPU cores" in forecast(small, 1, backends)[2]


def test_a_dry_run_goes_through_without_data(tmp_path: Path) -> None:
    config = tiny_config(train__dry_run=True)
    assert "note: data.train is not set: no plan of the data" in describe_dry_run(prepare(config, 1), 1)
    absent = dataclasses.replace(config.data, train={f"{tmp_path}/absent": 1.0})
    text = describe_dry_run(prepare(dataclasses.replace(config, data=absent), 1), 1)
    assert "note: a run would stop here: error[E330]" in text and "memory of a rank" in text
    with pytest.raises(DataError):
        prepare(dataclasses.replace(config, data=absent, train=dataclasses.replace(config.train, dry_run=False)), 1)


@pytest.mark.parametrize("steps, remarked", [(39, False), (41, True), (10_000_000, True)])
def test_a_text_that_is_read_very_often(steps: int, remarked: bool) -> None:
    text = format_plan(plan_sources({"zh": 1.0}, "share", {"zh": 1000}, steps, 1000))
    assert (f"note: zh is read {steps:,} times" in text) == remarked


@pytest.mark.parametrize(
    "horizon, steps, style, remarked",
    [(1_000_000, 200, "cosine", True), (401, 200, "wsd", True), (400, 200, "cosine", False),
     (None, 200, "cosine", False), (1_000_000, 200, "constant", False)],
)  # fmt: skip
def test_a_horizon_far_beyond_the_run(horizon: int | None, steps: int, style: str, remarked: bool) -> None:
    config = tiny_config(schedule__decay_steps=horizon, train__num_steps=steps, schedule__style=style)
    assert any("lies far beyond train.num_steps=200" in note for note in config.notes()) == remarked


def test_perplexity_of_any_loss() -> None:
    assert [_perplexity(loss) for loss in (0.0, 2.0, 11.0, 1e9, float("inf"), float("nan"))] == [
        "1", "7.389", "5.987e+04", "inf", "inf", "nan"]  # fmt: skip
