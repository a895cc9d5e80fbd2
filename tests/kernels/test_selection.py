"""The choice from a table: the first that can, the one that was named, and what an error says."""

from __future__ import annotations

import os
import typing
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.attention import whole_samples
from megatron_hammer.kernels.backend import CUDA, HALVES, Backend, Requirements
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.native import devices as native
from megatron_hammer.kernels.selection import TABLES, select, select_backends, select_operations

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
ROWS = (
    Backend("quick", lambda device: 1, CUDA, HALVES, lambda d: "is for one head" if d.heads > 1 else ""),
    Backend("choosy", lambda device: 2, unavailable=lambda d: "", preferred=lambda required: required.head_size == 8),
    Backend("absent", lambda device: 3, unavailable=lambda device: f"no library on {device.type}"),
    Backend("other", lambda device: 4, by_name_only=True),
    Backend("loose", lambda device: 5, deterministic=False),
    Backend("plain", lambda device: 6),
)


def choose(name: str, required: Requirements) -> str:
    return select("norm", name, ROWS, required).name


def test_auto_is_the_first_that_can_and_may() -> None:
    cpu, gpu = Requirements(), Requirements(GPU, torch.bfloat16)
    assert choose("auto", gpu) == "quick" and choose("auto", replace(gpu, heads=2)) == "loose"
    assert choose("auto", replace(gpu, dtype=torch.float32)) == "loose"
    assert choose("auto", cpu) == "loose" and choose("auto", replace(cpu, head_size=8)) == "choosy"
    assert choose("auto", replace(cpu, deterministic=True)) == "plain"


def test_a_name_is_followed_or_refused_with_the_reason() -> None:
    for name in ("choosy", "other", "loose", "plain"):
        assert choose(name, Requirements()) == name
    able = r"; use auto or choosy or other or loose or plain"
    for name, required, why in (
        ("quick", Requirements(), "does not run on cpu"),
        ("quick", Requirements(GPU), "does not compute in float32"),
        ("quick", Requirements(GPU, torch.float16, heads=3), "is for one head"),
        ("absent", Requirements(), r"cannot run here \(no library on cpu\)"),
        ("loose", Requirements(deterministic=True), r"is not the same from run to run \(kernels.deterministic=true\)"),
    ):
        rest = able.replace(" or loose", "") if required.deterministic else able
        with pytest.raises(ConfigError, match=rf"^error\[E209\]: kernels\.norm={name} {why}{rest}$"):
            choose(name, required)


def test_a_machine_is_asked_only_about_its_own_devices() -> None:
    """What a row needs is not looked for where it could never run."""

    def ask(device: torch.device) -> str:
        raise AssertionError("asked")

    rows = (Backend("gpu only", lambda device: 1, CUDA, unavailable=ask), ROWS[-1])
    assert select("norm", "auto", rows, Requirements()).name == "plain"


def test_none_can() -> None:
    with pytest.raises(ConfigError, match=r"E210.*kernels\.norm=auto finds no backend: quick does not run on cpu, "
                       r"choosy is taken by name only on this device, absent cannot run"):  # fmt: skip
        select("norm", "auto", ROWS[:3], Requirements())


# ---- the tables of all operations ------------------------------------------------------------------------------------


def test_config_names_the_tables() -> None:
    hints = typing.get_type_hints(KernelsConfig)
    for operation, rows in TABLES.items():
        names = [row.name for row in rows]
        assert len(set(names)) == len(names) and {"auto", *names} == set(typing.get_args(hints[operation])), operation
    assert set(TABLES) == {name for name, hint in hints.items() if "auto" in typing.get_args(hint)}


def test_a_table_may_be_read_top_down(gpu: Any) -> None:
    """Our own kernels first, what no measurement supports never by itself, torch's reference always possible."""
    for operation, rows in TABLES.items():
        assert [row.name for row in rows if row.by_name_only] == [
            row.name for row in rows if row.name in ("te", "apex", "liger") or row.name.startswith("flash-attn")
        ]
        assert rows[0].name == "fused"
        for device in (CPU, GPU):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for deterministic in (False, True):
                    for compiled in ("none", "operations", "layers"):
                        required = Requirements(device, dtype, deterministic=deterministic, compile=compiled)
                        assert select(operation, "auto", rows, required).name in (
                            "fused",
                            "torch",
                            "sdpa",
                            "cudnn",
                            "triton",
                        )


@pytest.mark.skipif(bool(native.unavailable(CPU)), reason=native.unavailable(CPU))
def test_our_own_kernels_are_the_first_choice_on_a_cpu() -> None:
    for dtype, expected in {torch.float32: "fused", torch.bfloat16: "fused", torch.float16: "torch"}.items():
        for compiled in ("none", "operations"):
            chosen = select_backends(KernelsConfig(compile=compiled), Requirements(dtype=dtype, compile=compiled))
            assert {row.name for name, row in chosen.items() if name not in ("attention", "adamw")} == {expected}
            assert chosen["attention"].name == ("fused" if cpu.attention_is_fast(dtype) else "sdpa")
    whole = select_backends(KernelsConfig(compile="layers"), Requirements(compile="layers"))
    assert {name: row.name for name, row in whole.items()} == {
        "attention": "sdpa", "norm": "torch", "rope": "torch", "swiglu": "torch", "loss": "fused", "adamw": "fused",
    }  # fmt: skip
    for name in ("norm", "rope", "swiglu"):
        kernels = KernelsConfig(compile="layers", **{name: "fused"})
        with pytest.raises(ConfigError, match=rf"E209.*kernels.{name}=fused is not for kernels.compile=layers"):
            select_backends(kernels, Requirements(compile="layers"))


def test_missing_kernels_are_said_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda device: "nobody built them")
    monkeypatch.setattr(
        cpu, "attention_unsupported", cpu.attention_unsupported.__wrapped__
    )  # what it remembers is not so
    assert {row.name for row in select_backends(KernelsConfig(), Requirements()).values()} == {"sdpa", "torch"}
    for name in ("norm", "rope", "swiglu", "loss", "adamw"):
        with pytest.raises(
            ConfigError, match=rf"E209.*kernels.{name}=fused cannot run here \(nobody built them\); use"
        ):
            select_backends(KernelsConfig(**{name: "fused"}), Requirements())


def test_equal_bits_are_asked_of_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only; there torch's switch is what attention's backward, in torch and beyond, goes by."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", seen.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    plain = KernelsConfig(norm="torch", rope="torch", swiglu="torch", loss="torch", deterministic=True)
    select_operations(plain, Requirements(deterministic=True))
    select_operations(plain, Requirements(GPU))
    assert not seen and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    chosen = select_operations(plain, Requirements(GPU, deterministic=True))
    assert chosen.attention is whole_samples and seen == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.utils.deterministic.fill_uninitialized_memory is False
