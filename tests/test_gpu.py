"""What only a GPU can show; every test is skipped, visibly, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.loop import build
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import run_rank
from megatron_hammer.train.step import train_step
from tests.model.tiny import rank_batches, tiny_config
from tests.train.runs import config_for, metrics, overrides, run, write_dataset

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for seed, (name, documents) in enumerate({"a": 60, "b": 40, "x": 8, "y": 5}.items()):
        write_dataset(tmp_path / name, documents, seed)
    return tmp_path


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_a_gpu_computes_what_a_cpu_computes(precision: str, tolerance: float) -> None:
    """Ten steps; fp32 matrix products without TF32 differ in the order of sums only, the others in rounding too."""
    losses = {}
    for device in ("cpu", "cuda"):
        config = tiny_config(train__precision="fp32" if device == "cpu" else precision)
        ctx = ParallelContext.single(device)
        model, optimizer = build(config, ctx)
        losses[device] = []
        for step in range(1, 11):
            batches = [(t.to(device), y.to(device)) for t, y in rank_batches(config, step, ctx)]
            losses[device].append(float(train_step(model, optimizer, batches, config, step, ctx).loss))
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=tolerance)


def test_a_step_does_not_synchronise() -> None:
    """torch itself raises where the host waits for the device."""
    config = tiny_config(train__precision="bf16")
    ctx = ParallelContext.single("cuda")
    model, optimizer = build(config, ctx)
    batches = [(t.cuda(), y.cuda()) for t, y in rank_batches(config, 1, ctx)]
    train_step(model, optimizer, batches, config, 1, ctx)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(model, optimizer, batches, config, 2, ctx)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_resumes(data: Path, tmp_path: Path) -> None:
    """Stopped after 6 steps and resumed equals straight through, on one GPU."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bf16 = ["train.precision=bf16", "schedule.style=constant"]
    assert run_rank(config_for(overrides(data, whole, *bf16)), 0, 0, 1, None) == 0
    for steps in (6, 12):
        assert run_rank(config_for(overrides(data, parts, *bf16, f"train.num_steps={steps}")), 0, 0, 1, None) == 0
    assert [x["loss"] for x in metrics(parts)] == [x["loss"] for x in metrics(whole)]
    assert prepare(config_for(overrides(data, whole, *bf16)), 1).is_finished


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [[], ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]])
def test_two_gpus_equal_one(layout: list[str], data: Path, tmp_path: Path) -> None:
    """NCCL: DP 2 and TP 2 with sequence parallelism against one GPU, fp32."""
    for ranks, name, extra in ((1, "one", []), (2, "two", layout)):
        done = run(ranks, overrides(data, tmp_path / name, "train.precision=fp32", *extra))
        assert done.returncode == 0, done.stderr
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [x["samples_digest"] for x in two] == [x["samples_digest"] for x in one]
    assert [x["loss"] for x in two] == pytest.approx([x["loss"] for x in one], rel=1e-4)
