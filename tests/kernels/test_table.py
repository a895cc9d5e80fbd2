"""The choice from a table: the first that can, the one that was named, and what an error says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.kernels.table import CUDA, HALVES, Backend, Demand, select

GPU = torch.device("cuda", 0)
ROWS = (
    Backend("quick", lambda device: 1, CUDA, HALVES, lambda d: "is for one head" if d.heads > 1 else ""),
    Backend("choosy", lambda device: 2, missing=lambda d: "", preferred=lambda demand: demand.head_size == 8),
    Backend("absent", lambda device: 3, missing=lambda device: f"no library on {device.type}"),
    Backend("other", lambda device: 4, by_name_only=True),
    Backend("loose", lambda device: 5, deterministic=False),
    Backend("plain", lambda device: 6),
)


def choose(name: str, demand: Demand) -> str:
    return select("norm", name, ROWS, demand).name


def test_auto_is_the_first_that_can_and_may() -> None:
    cpu, gpu = Demand(), Demand(GPU, torch.bfloat16)
    assert choose("auto", gpu) == "quick" and choose("auto", replace(gpu, heads=2)) == "loose"
    assert choose("auto", replace(gpu, dtype=torch.float32)) == "loose"
    assert choose("auto", cpu) == "loose" and choose("auto", replace(cpu, head_size=8)) == "choosy"
    assert choose("auto", replace(cpu, deterministic=True)) == "plain"


def test_a_name_is_followed_or_refused_with_the_reason() -> None:
    for name in ("choosy", "other", "loose", "plain"):
        assert choose(name, Demand()) == name
    able = r"; use auto or choosy or other or loose or plain"
    for name, demand, why in (
        ("quick", Demand(), "does not run on cpu"),
        ("quick", Demand(GPU), "does not compute in float32"),
        ("quick", Demand(GPU, torch.float16, heads=3), "is for one head"),
        ("absent", Demand(), r"cannot run here \(no library on cpu\)"),
        ("loose", Demand(deterministic=True), r"is not the same from run to run \(kernels.deterministic=true\)"),
    ):
        rest = able.replace(" or loose", "") if demand.deterministic else able
        with pytest.raises(ConfigError, match=rf"^error\[E209\]: kernels\.norm={name} {why}{rest}$"):
            choose(name, demand)


def test_a_machine_is_asked_only_about_its_own_devices() -> None:
    """What a row needs is not looked for where it could never run."""

    def ask(device: torch.device) -> str:
        raise AssertionError("asked")

    rows = (Backend("gpu only", lambda device: 1, CUDA, missing=ask), ROWS[-1])
    assert select("norm", "auto", rows, Demand()).name == "plain"


def test_none_can() -> None:
    with pytest.raises(ConfigError, match=r"E210.*kernels\.norm=auto finds no backend: quick does not run on cpu, "
                       r"choosy is taken by name only on this device, absent cannot run"):  # fmt: skip
        select("norm", "auto", ROWS[:3], Demand())
