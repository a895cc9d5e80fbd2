"""The learning rate: each shape at its landmarks, against formulas written down independently."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_hammer.optim.schedule import learning_rate
from tests.model.tiny import tiny_config

PEAK, FLOOR = 5e-4, 5e-5


def rate(style: str, step: int, warmup: int = 100, num_steps: int = 1000, **schedule: int) -> float:
    changes = {f"schedule__{k}": v for k, v in schedule.items()}
    config = tiny_config(
        optimizer__lr=PEAK,
        optimizer__min_lr=FLOOR,
        schedule__style=style,
        schedule__warmup_steps=warmup,
        train__num_steps=num_steps,
        **changes,
    )
    return learning_rate(config, step)


@pytest.mark.parametrize("style", ["cosine", "cosine-clamped", "wsd", "linear", "constant"])
def test_warm_up_is_linear_to_the_peak(style: str) -> None:
    assert rate(style, 1) == pytest.approx(PEAK / 100)
    assert rate(style, 50) == pytest.approx(PEAK / 2)
    assert rate(style, 100) == PEAK
    assert rate(style, 1, warmup=0) > 0.99 * PEAK


def test_cosine_interpolates() -> None:
    assert rate("cosine", 550) == pytest.approx((PEAK + FLOOR) / 2)
    assert rate("cosine", 1000) == pytest.approx(FLOOR)
    assert rate("cosine", 5000) == pytest.approx(FLOOR)


def test_cosine_clamped_is_hammerllms() -> None:
    """lr = peak x max(0.1, 0.5 x (1 + cos(pi x progress))), warm-up 2,000, horizon 1,000,000 (hammerllm's recipe)."""
    for step in (2_000, 2_001, 123_456, 501_000, 790_000, 800_000, 999_999, 1_000_000):
        progress = (step - 2_000) / 998_000
        expected = PEAK * max(0.1, 0.5 * (1 + math.cos(math.pi * progress)))
        assert rate("cosine-clamped", step, 2_000, 1_000_000) == pytest.approx(expected, rel=1e-12)
    assert rate("cosine-clamped", 550) == pytest.approx(PEAK / 2), "a cosine to zero, not to the floor"
    assert rate("cosine-clamped", 900) == FLOOR


def test_linear_constant_and_wsd() -> None:
    assert rate("linear", 550) == pytest.approx((PEAK + FLOOR) / 2)
    assert rate("constant", 999) == PEAK
    assert rate("wsd", 900) == PEAK and rate("wsd", 950) == pytest.approx((PEAK + FLOOR) / 2)
    assert rate("wsd", 1000) == pytest.approx(FLOOR)
    assert rate("wsd", 800, anneal_steps=400) == pytest.approx((PEAK + FLOOR) / 2)


def test_horizon_is_its_own_number() -> None:
    assert rate("cosine", 550, num_steps=700, decay_steps=1000) == rate("cosine", 550)
    assert rate("cosine", 700, num_steps=700) == pytest.approx(FLOOR), "absent: the run's length"


def test_warm_up_longer_than_the_run_is_clamped() -> None:
    for steps in (1, 2, 10):
        assert rate("cosine", steps, num_steps=steps) == pytest.approx(PEAK)
    config = tiny_config(schedule__warmup_steps=50, train__num_steps=10)
    assert any("clamped" in note for note in config.notes())


@pytest.mark.parametrize("plan", [{"decay_steps": 1000}, {"style": "constant"}])
def test_a_warm_up_that_the_run_does_not_plan_is_not_clamped(plan: dict[str, Any]) -> None:
    """The rate of a step stays when the run becomes longer."""
    plan = {"style": "cosine"} | plan
    short, long = ([rate(step=s, num_steps=steps, **plan) for s in range(1, 21)] for steps in (20, 500))
    assert short == long
    config = tiny_config(
        schedule__warmup_steps=50, train__num_steps=10, **{f"schedule__{key}": value for key, value in plan.items()}
    )
    assert any("does not reach its peak" in note for note in config.notes())
