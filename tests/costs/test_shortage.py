"""Out of memory: the error ends with where the memory goes and the cheapest changes that would fit."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hammer.base.errors import MemoryShortage, from_exception
from megatron_hammer.costs.gpus import GPUS
from megatron_hammer.costs.layouts import need_of
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_speed import Cluster
from megatron_hammer.costs.shortage import cheapest_changes, explained, refuse_far_too_large, shortage
from megatron_hammer.parallel.agreement import BeforeStart
from megatron_hammer.train import run
from megatron_hammer.train.begin import Beginning
from tests.costs.test_rank_peak import make
from tests.model.tiny import tiny_config


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


RAISED = OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_error_of_a_gpu() -> None:
    config, world = make("8B", 8, micro_batch_size=4)
    error = shortage(RAISED, config, world, 3, "NVIDIA H100 80GB HBM3", int(0.5 * 79.6 * GIB))
    text = str(error)
    assert text.startswith("error[E1001]: rank 3 has no memory left (CUDA out of memory. Tried to allocate 2.00 GiB); ")
    for part in ("weights", "gradients", "optimizer", "activations", "head, backward", "of 39.8"):
        assert part in text
    said = text.split("the fastest first: ")[1]
    changes = re.findall(r"\(\d\) (.+?) \(([\d.]+) GiB, about ([\w% ]+)\)", said)
    assert len(changes) == 3 and all(float(size) <= 0.92 * 39.8 for _, size, _ in changes)
    assert all(re.search(r"(parallel|train)\.\w+=\w+", settings) for settings, _, _ in changes)


def test_changes_are_valid_fit_and_change_no_more_than_they_must() -> None:
    config, world = make("8B", 8, micro_batch_size=4)
    cluster = Cluster("H100", GPUS["H100"])
    now = need_of(config, world, cluster)
    found = cheapest_changes(config, world, cluster, 0.8 * now.bytes)
    assert 0 < len(found) <= 3
    for layout in found:
        layout.config.validate(world)
        assert layout.bytes <= 0.8 * now.bytes and layout.config.train.global_batch_size == 64
    times = [layout.time.total for layout in found]
    assert times == sorted(times)


def test_nothing_fits() -> None:
    config, world = make("8B", 1, recompute="full")
    assert "use more ranks" in str(shortage(RAISED, config, world, 0, "cpu", GIB))


def test_a_gpu_without_a_published_peak() -> None:
    config, world = make("8B", 8, micro_batch_size=2)
    for name in ("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 5090 D", "of tomorrow"):
        assert "the fastest first: (1)" in str(shortage(RAISED, config, world, 0, name, 60 * GIB))


def test_changes_are_compared_over_the_links_of_the_gpu() -> None:
    """Sharded weights, gathered in each micro-batch, cost nothing over NVLink and a quarter of the step over PCIe."""
    config, world = make("1.4B", 4, micro_batch_size=2)
    said = [
        str(shortage(RAISED, config, world, 0, name, 45 * GIB)) for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA L40S")
    ]
    slower = [re.findall(r"parallel.shard=weights \([\d.]+ GiB, about ([^)]+)\)", text) for text in said]
    assert slower[0] == ["as fast"] and int(slower[1][0].removesuffix("% slower")) > 10


def test_what_is_far_beyond_the_machine_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """A sequence of 100,000,000 tokens was only remarked (1,493 GiB of 24)."""
    config = tiny_config(data__seq_length=100_000_000, train__output=str(tmp_path / "run"))
    beginning = Beginning(BeforeStart(None, 0, 1), ExitStack(), config, 0)
    prepared = mock.Mock(config=config, is_finished=False)
    rule = r"E1003\]: a rank is predicted to need [\d,]+ GiB, \d+ times the [\d.]+ GiB of this machine: .*shorter d"
    with pytest.raises(MemoryShortage, match=rule):
        beginning._predict(prepared)
    prepared.is_finished = True
    beginning._predict(prepared)  # it needs nothing any more
    needed = sum(beginning.prediction.parts.values()) if beginning.prediction else 0
    refuse_far_too_large(needed, config, 1, "NVIDIA A100-SXM4-80GB", needed // 3)  # formulas may err, machines swap
    with pytest.raises(MemoryShortage, match=r"4 times the .* of this GPU: .*activations"):
        refuse_far_too_large(needed, config, 1, "NVIDIA A100-SXM4-80GB", needed // 4)


def test_a_formula_that_fails_leaves_the_error_as_it_came() -> None:
    with mock.patch("megatron_hammer.costs.shortage.shortage", side_effect=KeyError):
        assert explained(RAISED, tiny_config(), 1, 0, torch.device("cpu")) is None


def test_other_errors_stay_what_they_are() -> None:
    config = tiny_config()
    assert explained(RuntimeError("shapes differ"), config, 1, 0, torch.device("cpu")) is None
    assert explained(MemoryError(), config, 1, 0, torch.device("cpu")) is None, "Python's own: no tensor"
    allocator = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    found = explained(allocator, config, 1, 0, torch.device("cpu"))
    assert found is not None and found.code == "E1001" and from_exception(found, "x") is found


def test_nccl_says_the_same_of_want_of_memory_and_of_a_gpu_that_has_failed() -> None:
    error = RuntimeError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nFailed to CUDA calloc async 608 bytes")
    found = explained(error, tiny_config(), 1, 0, torch.device("cpu"))
    assert found is not None and "has no memory left (NCCL error" in str(found)
    broken = RuntimeError("CUDA error: an illegal memory access was encountered")
    with mock.patch("torch.ones", side_effect=broken):
        assert explained(error, tiny_config(), 1, 0, torch.device("cpu")) is None


def test_a_run_raises_it(tmp_path: Any) -> None:
    """Where the loop ends so, whatever it was doing."""
    config = tiny_config(train__output=str(tmp_path), train__micro_batch_size=4)
    prepared = mock.Mock(config=config, is_finished=False)
    with (
        mock.patch.object(run, "Beginning") as beginning,
        mock.patch.object(run, "announcement", return_value=""),
        mock.patch.object(run, "train", side_effect=RAISED),
        pytest.raises(MemoryShortage) as caught,
    ):
        beginning.return_value.agree.return_value = prepared
        beginning.return_value.device, beginning.return_value.ranks = torch.device("cpu"), BeforeStart(None, 0, 1)
        run.run_rank(config, 0, 0, 1, None)
    assert "train.micro_batch_size=2" in str(caught.value) or "train.recompute" in str(caught.value)
    assert caught.value.__cause__ is RAISED
