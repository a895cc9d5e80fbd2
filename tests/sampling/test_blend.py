"""Mixing sources: exact at every prefix, the same on both backends, and independent of how it is read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.blend import _BLOCK, Blend
from tests.sampling.whole_mix import draw_whole

WEIGHTS = [
    [1.0],
    [1.0, 1.0],
    [1 / 3, 2 / 3],
    [142, 128, 38, 12, 30],
    [1e-6, 1.0],
    [1.0] * 7,
    [0.1] * 10,
    [1000.0, 1.0, 1.0, 1.0],
]


def prefix_error(weights, sources):
    """Largest |share * t - drawn| over all prefixes t and all sources."""
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    drawn = np.cumsum(sources[:, None] == np.arange(len(shares)), axis=0)
    return np.abs(np.arange(1, len(sources) + 1)[:, None] * shares - drawn).max()


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_is_off_by_less_than_one_sample(weights, compiled):
    sources, _ = draw_whole(weights, "chairman", 100_000)
    n = len(weights)
    bound = 1 - 1 / (2 * n - 2) if n > 1 else 0
    assert prefix_error(weights, sources) <= bound + 1e-9  # Tijdeman's bound, and rounding


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40))
def test_every_prefix_of_a_random_mix_is_off_by_less_than_one_sample(weights):
    shares = np.asarray(weights) / np.sum(weights)
    sources, positions, drawn = index.chairman_blend(shares, np.zeros(len(weights), np.int64), 2000)
    assert prefix_error(weights, sources) < 1
    for k in range(len(weights)):
        assert np.array_equal(positions[sources == k], np.arange(drawn[k]))


def test_megatrons_rule_is_worse(compiled):
    sources, _ = draw_whole([142, 128, 38, 12, 30], "greedy", 10_000)
    assert prefix_error([142, 128, 38, 12, 30], sources) >= 1  # else the other rule would be pointless


@pytest.mark.parametrize("draw", [index.chairman_blend, index.greedy_blend])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_compiled_blend_equals_the_twin(draw, weights, compiled, twin):
    shares = np.asarray(weights) / np.sum(weights)
    start = np.zeros(len(weights), np.int64)
    for ours, numpys in zip(draw(shares, start, 1500), twin(draw, shares, start, 1500)):
        assert np.array_equal(ours, numpys) and ours.dtype == numpys.dtype
    far = (shares * 10**12).astype(np.int64)
    for ours, numpys in zip(draw(shares, far, 300), twin(draw, shares, far, 300)):
        assert np.array_equal(ours, numpys)


@pytest.mark.parametrize("seed", range(12))
def test_close_decisions_fall_as_in_the_twin(seed, compiled, twin):
    """The compiled rules decide in integers unless it is close: equal and decimal weights, ties, odd pasts, far."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 10))
    kinds = [np.ones(n), rng.integers(1, 9, n).astype(float), np.round(rng.random(n) + 0.01, 2), rng.random(n) + 1e-3]
    kinds.append(np.exp(rng.normal(0, 5, n)))
    for weights in kinds:
        shares = weights / weights.sum()
        pasts = [np.zeros(n, np.int64), (shares * 10 ** int(rng.integers(3, 16))).astype(np.int64)]
        pasts.append(rng.integers(0, 3000, n))  # nowhere near the shares
        for past in pasts:
            for draw, rule in ((index.chairman_blend, True), (index.greedy_blend, False)):
                ours, numpys = draw(shares, past, 1100), twin(draw, shares, past, 1100)
                assert all(np.array_equal(a, b) for a, b in zip(ours, numpys))
                assert np.array_equal(index.blend_counts(rule, shares, past, 1100), ours[2])
    tiny = np.full(n, 1e-9)  # far from shares that sum to one, and beyond what the integers hold
    zeros = np.zeros(n, np.int64)
    for draw in (index.chairman_blend, index.greedy_blend):
        assert all(np.array_equal(a, b) for a, b in zip(draw(tiny, zeros, 300), twin(draw, tiny, zeros, 300)))


@pytest.mark.parametrize("rule", ["chairman", "greedy"])
def test_samples_do_not_depend_on_how_they_are_read(rule, compiled):
    weights = [142, 128, 38, 12, 30]
    n = 3 * _BLOCK + 100
    sources, positions = draw_whole(weights, rule, n)
    blend = Blend(weights, rule)  # from the end, then to and fro
    for i in [
        n - 1,
        0,
        _BLOCK,
        _BLOCK - 1,
        2 * _BLOCK + 5,
        n - 1,
        *np.random.default_rng(0).integers(0, n, 50).tolist(),
    ]:
        assert blend[i] == (sources[i], positions[i])


def test_one_source_needs_no_blocks():
    assert Blend([7.0])[10**15] == (0, 10**15)
