"""The plan of a mix: shares, tokens, epochs and repeats by unit of the weights; what is refused; what it prints."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.sampling.plan import format_plan, plan_sources, sampling_weights
from megatron_hammer.sampling.samples import TrainData
from tests.dataset.written import write_dataset

# HammerLLM's corpus, in tokens
CORPUS = {"zh": 142e9, "en": 128e9, "arxiv": 38e9, "wiki": 12e9, "github": 30e9}
TOKENS = {name: int(tokens) for name, tokens in CORPUS.items()}
STEP = 2048 * 1024


def test_shares_are_relative_and_ask_for_nothing():
    for scale in (1, 1e-9):
        plan = plan_sources({name: weight * scale for name, weight in CORPUS.items()}, "share", TOKENS, 1000, STEP)
        assert [s.drawn for s in plan.sources] == [round(1000 * STEP * w / 350e9) for w in CORPUS.values()]
        assert plan.asked is None and plan.fitting_steps is None and "note" not in format_plan(plan)


def test_tokens_and_epochs_name_the_length_that_fits():
    tokens = plan_sources({"zh": 71e9, "wiki": 24e9}, "tokens", TOKENS, 45_000, STEP)
    epochs = plan_sources({"wiki": 2, "zh": 0.5}, "epochs", TOKENS, 45_000, STEP)
    for plan in (tokens, epochs):
        by_name = {s.prefix: s for s in plan.sources}
        assert plan.asked == pytest.approx(95e9) and plan.fitting_steps == int(95e9 // STEP) == 45_299
        assert by_name["zh"].share == pytest.approx(71 / 95) and by_name["zh"].repeated == 0
        assert by_name["wiki"].epochs == pytest.approx(2 * 45_000 * STEP / 95e9)
        assert by_name["wiki"].repeated == by_name["wiki"].drawn - TOKENS["wiki"] > 0
        assert sum(s.drawn for s in plan.sources) == pytest.approx(plan.drawn, abs=2)
        assert "0.9934 times that, from every source; train.num_steps=45299 fits" in format_plan(plan)
    fits = plan_sources({"zh": 0.5, "wiki": 2}, "epochs", TOKENS, 45_299, STEP, max_epochs=2)
    assert "note" not in format_plan(fits) and fits.sources[1].epochs == pytest.approx(2, rel=1e-4)
    assert plan_sources({"wiki": 1e-12}, "epochs", TOKENS, 1, STEP).fitting_steps == 1, "no run has no step"


def test_a_limit_on_epochs():
    with pytest.raises(ConfigError) as caught:
        plan_sources({"zh": 1, "wiki": 1}, "share", TOKENS, 20_000, STEP, max_epochs=1.5)
    line = str(caught.value)
    assert caught.value.code == "E293" and "data.train[wiki]: 1.748 epochs" in line and "data.max_epochs=1.5" in line
    longest = int(line.split("train.num_steps=")[1].split(",")[0])
    at_limit = plan_sources({"zh": 1, "wiki": 1}, "share", TOKENS, longest, STEP, max_epochs=1.5)
    assert at_limit.sources[1].epochs <= 1.5, "the remedy works"
    with pytest.raises(ConfigError):
        plan_sources({"zh": 1, "wiki": 1}, "share", TOKENS, longest + 1, STEP, max_epochs=1.5)
    with pytest.raises(ConfigError) as caught:
        plan_sources({"tiny": 1}, "share", {"tiny": 10}, 1, STEP, max_epochs=2)
    assert "train.num_steps" not in str(caught.value), "no length of run would do"
    exact = plan_sources({"a": 3}, "epochs", {"a": 7 * 3}, 9, 7, max_epochs=3)
    assert exact.sources[0].epochs == 3, "as much as allowed is allowed"


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match=r"E345.*nothing"):
        plan_sources({"nothing": 1}, "epochs", {"nothing": 0}, 1, 1)


def test_format():
    plan = plan_sources({"a": 1, "b": 3e-7}, "share", {"a": 10**6, "b": 10**9}, 10, 10**6)
    lines = format_plan(plan).splitlines()
    assert lines[0].startswith("plan of 10 steps of 1,000,000 tokens, 10,000,000 in all")
    assert [line.split()[0] for line in lines[1:]] == ["source", "a", "b", "all"]
    assert lines[2].split()[-2:] == ["10.000", "8,999,997"] and lines[3].split()[-2] == "3.0e-09"
    assert plan.describe()["sources"][0]["epochs"] == 9.999997


def test_existing_units_keep_their_numbers():
    weights = [0.1, 0.7, 123456789.1]
    assert sampling_weights(weights, "share", [3, 2, 1]) == weights
    assert sampling_weights(weights, "tokens", [3, 2, 1]) == weights
    assert sampling_weights([2, 0.5], "epochs", [3, 10]) == [6, 5]


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_what_the_plan_says_is_what_is_drawn(tmp_path, order):
    """Samples of each source in a run of each unit against the plan, to within the mix's own 1 or 1.5 samples."""
    lengths = {"a": [40] * 20, "b": [25] * 80, "c": [7] * 30}
    tokens, prefixes = {}, {}
    for seed, (name, of) in enumerate(lengths.items()):
        prefixes[name] = str(tmp_path / name)
        write_dataset(prefixes[name], of, seed=seed)
        tokens[prefixes[name]] = sum(of)
    a, b, c = prefixes.values()
    asked = {"share": {a: 1, b: 1, c: 2}, "tokens": {a: 900, b: 1000, c: 100}, "epochs": {a: 0.5, b: 1.5, c: 3}}
    for unit, weights in asked.items():
        plan = plan_sources(weights, unit, tokens, 25, 8 * 16)
        data = TrainData(weights, 16, 1, order, 200, unit)
        drawn = np.bincount([data.sample_id(i).source for i in range(200)], minlength=3) * 16
        by_prefix = {str(dataset.prefix): int(n) for dataset, n in zip(data.sources, drawn)}
        for source in plan.sources:
            assert abs(by_prefix[source.prefix] - source.drawn) <= 1.5 * 16 + 1, unit
