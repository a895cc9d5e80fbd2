"""The compiled operations against the reference, and the tables of all operations."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import ATTENTION_MASKS, KernelsConfig
from megatron_hammer.kernels.attention import whole_samples
from megatron_hammer.kernels.native import attention as attention_cpu
from megatron_hammer.kernels.native import choice as native
from megatron_hammer.kernels.native import cpu, cuda
from megatron_hammer.kernels.norm import add_rms_norm
from megatron_hammer.kernels.operations import TABLES, kernels_table, select_backends, select_operations
from megatron_hammer.kernels.rope import rope
from megatron_hammer.kernels.swiglu import swiglu
from megatron_hammer.kernels.table import Demand, select

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def _with_gradients(function: Callable[..., Any], inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, *rest)
    outs = list(out) if isinstance(out, tuple) else [out]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, [x.cumsum(-1).detach() for x in outs])]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_compiled_operations_equal_the_reference(dtype: torch.dtype, tolerance: float) -> None:
    """Forward and backward, odd shapes and a view; bf16: fused kernels keep fp32 where eager rounds between steps."""
    fused = select_operations(KernelsConfig(compile="operations", norm="torch", rope="torch", swiglu="torch"))
    x, update, weight = (torch.randn(*shape, dtype=dtype) for shape in ((7, 3, 24), (7, 3, 24), (24,)))
    qkv = torch.randn(7, 3, 7 * 16, dtype=dtype).view(7, 3, 7, 16)[:, :, 1:6]  # strided
    cos, sin = torch.randn(7, 1, 1, 8, dtype=dtype), torch.randn(7, 1, 1, 8, dtype=dtype)
    for reference, compiled, inputs, rest in (
        (add_rms_norm, fused.add_rms_norm, [x, update, weight], (1e-5,)),
        (lambda x, weight: add_rms_norm(x, None, weight, 1e-5)[0],
         lambda x, weight: fused.add_rms_norm(x, None, weight, 1e-5)[0], [x, weight], ()),
        (rope, fused.rope, [qkv], (cos, sin, 3, 1)),
        (swiglu, fused.swiglu, [x], ()),
    ):  # fmt: skip
        assert reference is not compiled
        pairs = zip(_with_gradients(reference, inputs, *rest), _with_gradients(compiled, inputs, *rest), strict=True)
        for expected, found in pairs:
            assert found.dtype == expected.dtype
            assert (found - expected).float().norm() <= tolerance * expected.float().norm(), reference


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
        for device in (CPU, CUDA):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                for deterministic in (False, True):
                    for compiled in ("none", "operations", "layers"):
                        demand = Demand(device, dtype, deterministic=deterministic, compile=compiled)
                        assert select(operation, "auto", rows, demand).name in (
                            "fused",
                            "torch",
                            "sdpa",
                            "cudnn",
                            "triton",
                        )


@pytest.mark.skipif(bool(native.missing(CPU)), reason=native.missing(CPU))
def test_our_own_kernels_are_the_first_choice_on_a_cpu() -> None:
    for dtype, expected in {torch.float32: "fused", torch.bfloat16: "fused", torch.float16: "torch"}.items():
        for compiled in ("none", "operations"):
            chosen = select_backends(KernelsConfig(compile=compiled), Demand(dtype=dtype, compile=compiled))
            assert {row.name for name, row in chosen.items() if name not in ("attention", "adamw")} == {expected}
            assert chosen["attention"].name == ("sdpa" if attention_cpu.obstacle(dtype) else "fused")
    whole = select_backends(KernelsConfig(compile="layers"), Demand(compile="layers"))
    assert {name: row.name for name, row in whole.items()} == {
        "attention": "sdpa", "norm": "torch", "rope": "torch", "swiglu": "torch", "loss": "fused", "adamw": "fused",
    }  # fmt: skip
    for name in ("norm", "rope", "swiglu"):
        kernels = KernelsConfig(compile="layers", **{name: "fused"})
        with pytest.raises(ConfigError, match=rf"E209.*kernels.{name}=fused is not for kernels.compile=layers"):
            select_backends(kernels, Demand(compile="layers"))


def test_missing_kernels_are_said_and_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "missing", lambda device: "nobody built them")
    monkeypatch.setattr(attention_cpu, "obstacle", attention_cpu.obstacle.__wrapped__)  # what it remembers is not so
    assert {row.name for row in select_backends(KernelsConfig(), Demand()).values()} == {"sdpa", "torch"}
    for name in ("norm", "rope", "swiglu", "loss", "adamw"):
        with pytest.raises(
            ConfigError, match=rf"E209.*kernels.{name}=fused cannot run here \(nobody built them\); use"
        ):
            select_backends(KernelsConfig(**{name: "fused"}), Demand())


def test_the_table_at_start(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs, what could, and why not, short: within 100 columns; each backend of the device has its place."""
    demand = Demand(CUDA, torch.bfloat16, heads=32, groups=4)
    for mask, kernels in (
        ("causal", KernelsConfig()),
        ("document", KernelsConfig(attention="sdpa-documents")),
        ("causal", KernelsConfig(compile="operations", layers="te")),
    ):
        text = kernels_table(kernels, replace(demand, mask=mask, compile=kernels.compile))
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100 and lines[0] == f"kernels for bfloat16 on cuda, data.attention_mask={mask}:"
        assert [line.split()[0] for line in lines[1:] if line[2] != " "] == ["kernels.", *TABLES]
        for rows in TABLES.values():
            for row in rows:
                meant = row.name not in ATTENTION_MASKS or mask in ATTENTION_MASKS[row.name]
                assert not meant or row.name in text, row.name
    assert "  norm       te (kernels.layers)\n" in text and "  rope       torch (compiled)" in text
    text = kernels_table(KernelsConfig(), demand)
    assert "  attention  cudnn               sdpa                   flash-attn, flash-attn-3, flash-attn-4,\n" in text
    assert "  adamw      torch                                      fused: _cuda.so was not built; apex: not" in text
    monkeypatch.setattr(cuda, "missing", lambda device: "a long story " * 12)
    text = kernels_table(KernelsConfig(), demand)
    assert text.count("fused: see [1]") == 4 and text.count("  [1] a long story a") == 1
    assert max(map(len, text.splitlines())) <= 100
    assert "flash" not in kernels_table(KernelsConfig(), Demand()), "what no CPU has is no news on one"


def test_equal_bits_are_asked_of_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only; there torch's switch is what attention's backward, in torch and beyond, goes by."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # put back afterwards
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    seen: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", seen.append)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    plain = KernelsConfig(norm="torch", rope="torch", swiglu="torch", loss="torch", deterministic=True)
    select_operations(plain, Demand(deterministic=True))
    select_operations(plain, Demand(CUDA))
    assert not seen and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    chosen = select_operations(plain, Demand(CUDA, deterministic=True))
    assert chosen.attention is whole_samples and seen == [True] and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.utils.deterministic.fill_uninitialized_memory is False
