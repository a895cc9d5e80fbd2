"""The prediction beside the measurement: one line, after ten steps of a process, without asking the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_hammer.costs import comparison as comparison_module
from megatron_hammer.costs.comparison import Prediction
from megatron_hammer.costs.gpus import GPUS
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_speed import Cluster, step_time
from megatron_hammer.train.run import run_rank
from tests.costs.test_rank_peak import make
from tests.train.runs import config_for, overrides
from tests.train.test_rewind import REWIND, bad_samples

CPU = torch.device("cpu")


def test_one_line_after_ten_steps() -> None:
    config, world = make("1.4B", 8, micro_batch_size=8)
    prediction = Prediction(config, world, CPU, "NVIDIA H100 80GB HBM3")
    assert prediction.predicted.startswith("predicted: ") and "tokens/s" in prediction.predicted
    half = 0.5 * (prediction.speed or 0.0)
    prediction.device = torch.device("cuda")
    with mock.patch.object(torch.cuda, "max_memory_allocated", return_value=sum(prediction.parts.values()) * 1.1):
        said = [prediction.step(1000, 1000 / rate) for rate in [1.0] * 3 + [half] * 9]
    assert [i for i, line in enumerate(said, start=1) if line] == [10]
    assert "(+10%)" in str(said[9]) and "allocated" in str(said[9]) and f"{half:,.0f} tokens/s" in str(said[9])
    assert "(-50%)" in str(said[9]), "the first three steps do not count"


def test_on_a_cpu_no_speed_is_claimed() -> None:
    config, world = make("1.4B", 1)
    prediction = Prediction(config, world, CPU, "cpu")
    assert prediction.speed is None and "no rate is known" in prediction.predicted
    said = [prediction.step(1000, 100.0) for _ in range(10)]
    assert str(said[-1]).endswith("10 tokens/s")
    assert f"resident, of which {sum(prediction.parts.values()) / GIB:.2f} are predicted" in str(said[-1])
    prediction.parts = {"weights": 5 * 2**20, "optimizer": 2**20 // 2}
    assert prediction.predicted.startswith("predicted: 5.5 MiB on rank 0 (weights 5.0, optimizer 0.5)")


def test_a_formula_that_fails_is_a_line_and_no_failure() -> None:
    config, world = make("1.4B", 1)
    with mock.patch.object(comparison_module, "rank_peak", side_effect=KeyError("x\ny")):
        assert Prediction.of(config, world, CPU) == (None, "nothing is predicted for this run (KeyError: 'x\\ny')")
    made, line = Prediction.of(config, world, CPU)
    assert made is not None and line == made.predicted


def test_the_peak_that_the_config_states_counts() -> None:
    config, world = make("1.4B", 1)
    stated = replace(config, log=replace(config.log, peak_tflops=100.0))
    of_table, of_config = (Prediction(c, world, CPU, "NVIDIA A100-SXM4-80GB").speed for c in (config, stated))
    assert of_table is not None and of_config is not None and of_config < 0.5 * of_table
    assert Prediction(stated, world, CPU, "NVIDIA GeForce RTX 4090 D").speed is not None


def test_a_run_predicts_once_and_is_held_against_it_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it goes back over: the tenth step of this process is one of those that are done again."""
    real, config = Prediction.__init__, config_for(overrides(data, tmp_path / "run", *REWIND))
    with bad_samples(), mock.patch.object(Prediction, "__init__", autospec=True, side_effect=real) as made:
        assert run_rank(config, 0, 0, 1, None) == 0
    said = "".join(capsys.readouterr())
    assert made.call_count == 1 and said.count("predicted: ") == 1 and "rewind 1, back to" in said
    assert said.count("after 10 steps: at most ") == 1


def test_more_links_and_faster_ones_are_never_slower() -> None:
    config, world = make("8B", 2, tensor_model_parallel_size=4, sequence_parallel=True)
    slow, fast = (Cluster("x", replace(GPUS["H100"], link=link)) for link in (25.0, 450.0))
    times = [step_time(config, world, cluster) for cluster in (slow, fast)]
    assert times[0].seconds["TP"] > 5 * times[1].seconds["TP"]
    assert times[0].seconds["compute"] == times[1].seconds["compute"]
    assert sum(times[1].seconds.values()) == pytest.approx(times[1].total) and 0.2 < times[1].mfu < 0.8
