"""The prediction beside the measurement: one line, after ten steps of a process, without asking the device."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from megatron_hammer.train import comparison as comparison_module
from megatron_hammer.train.comparison import GIB, Comparison
from megatron_hammer.train.gpus import GPUS
from megatron_hammer.train.rank_speed import Machine, step_time
from tests.train.test_rank_peak import make

CPU = torch.device("cpu")


def test_one_line_after_ten_steps() -> None:
    config, world = make("1.4B", 8, micro_batch_size=8)
    comparison = Comparison(config, world, CPU, "NVIDIA H100 80GB HBM3")
    assert comparison.predicted.startswith("predicted: ") and "tokens/s" in comparison.predicted
    half = 0.5 * (comparison.speed or 0.0)
    comparison.device = torch.device("cuda")
    with mock.patch.object(torch.cuda, "max_memory_allocated", return_value=sum(comparison.parts.values()) * 1.1):
        said = [comparison.step(1000, 1000 / rate) for rate in [1.0] * 3 + [half] * 9]
    assert [i for i, line in enumerate(said, start=1) if line] == [10]
    assert "(+10%)" in str(said[9]) and "allocated" in str(said[9]) and f"{half:,.0f} tokens/s" in str(said[9])
    assert "(-50%)" in str(said[9]), "the first three steps do not count"


def test_on_a_cpu_no_speed_is_claimed() -> None:
    config, world = make("1.4B", 1)
    comparison = Comparison(config, world, CPU, "cpu")
    assert comparison.speed is None and "no rate is known" in comparison.predicted
    said = [comparison.step(1000, 100.0) for _ in range(10)]
    assert "resident, libraries included" in str(said[-1]) and str(said[-1]).endswith("10 tokens/s")
    assert f"predicted {sum(comparison.parts.values()) / GIB:.2f}" in str(said[-1])


def test_a_formula_that_fails_is_a_line_and_no_failure() -> None:
    config, world = make("1.4B", 1)
    with mock.patch.object(comparison_module, "rank_peak", side_effect=KeyError("x\ny")):
        assert Comparison.of(config, world, CPU) == (None, "nothing is predicted for this run (KeyError: 'x\\ny')")
    made, line = Comparison.of(config, world, CPU)
    assert made is not None and line == made.predicted


def test_the_peak_that_the_config_states_counts() -> None:
    config, world = make("1.4B", 1)
    stated = replace(config, log=replace(config.log, peak_tflops=100.0))
    of_table, of_config = (Comparison(c, world, CPU, "NVIDIA A100-SXM4-80GB").speed for c in (config, stated))
    assert of_table is not None and of_config is not None and of_config < 0.5 * of_table
    assert Comparison(stated, world, CPU, "NVIDIA GeForce RTX 4090 D").speed is not None


def test_more_links_and_faster_ones_are_never_slower() -> None:
    config, world = make("8B", 2, tensor_model_parallel_size=4, sequence_parallel=True)
    slow, fast = (Machine("x", GPUS["H100"], 8, link) for link in (25.0, 450.0))
    times = [step_time(config, world, machine) for machine in (slow, fast)]
    assert times[0].seconds["TP"] > 5 * times[1].seconds["TP"]
    assert times[0].seconds["compute"] == times[1].seconds["compute"]
    assert sum(times[1].seconds.values()) == pytest.approx(times[1].total) and 0.2 < times[1].mfu < 0.8
