"""The table of kernels that is printed at start."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.config import ATTENTION_MASKS, KernelsConfig
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.native import cpu, cuda, triton_rows
from megatron_hammer.kernels.report import kernels_table, missing_kernels
from megatron_hammer.kernels.selection import TABLES

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]


def test_the_table_at_start(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs, what could, and why not, short: within 100 columns; each backend of the device has its place."""
    required = Requirements(CUDA, torch.bfloat16, heads=32, groups=4)
    for mask, kernels in (
        ("causal", KernelsConfig()),
        ("document", KernelsConfig(attention="sdpa-documents")),
        ("causal", KernelsConfig(compile="operations", layers="te")),
    ):
        text = kernels_table(kernels, replace(required, mask=mask, compile=kernels.compile))
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100 and lines[0] == f"kernels for bfloat16 on cuda, data.attention_mask={mask}:"
        assert [line.split()[0] for line in lines[1:] if line[2] != " "] == ["kernels.", *TABLES]
        for rows in TABLES.values():
            for row in rows:
                meant = row.name not in ATTENTION_MASKS or mask in ATTENTION_MASKS[row.name]
                assert not meant or row.name in text, row.name
    assert "  norm       te (kernels.layers)\n" in text and "  rope       torch (compiled)" in text
    text = kernels_table(KernelsConfig(), required)
    assert "  attention  cudnn               sdpa                   flash-attn, flash-attn-3, flash-attn-4,\n" in text
    assert "  adamw      torch                                      fused: _cuda.so was not built; triton," in text
    monkeypatch.setattr(cuda, "unavailable", lambda device: "a long story " * 12)
    text = kernels_table(KernelsConfig(), required)
    assert text.count("fused: see [1]") == 4 and text.count("  [1] a long story a") == 1
    assert max(map(len, text.splitlines())) <= 100
    assert "flash" not in kernels_table(KernelsConfig(), Requirements()), "what no CPU has is no news on one"


def test_a_gpu_run_without_our_kernels_says_so(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loudly, with what runs instead and the command that mends it; silent where nothing is lost."""
    required = Requirements(CUDA, torch.bfloat16, heads=32, groups=4)
    text = missing_kernels(KernelsConfig(), required)
    assert all(line.startswith("WARNING: ") for line in text.splitlines())
    assert "_cuda.so was not built" in text and "takes torch for norm, rope, swiglu, adamw instead, about a" in text
    assert f"{sys.executable} -m pip install --no-build-isolation" in text and text.endswith(f"--editable {ROOT}")
    monkeypatch.setattr(triton_rows, "_missing", lambda: "")
    text = missing_kernels(KernelsConfig(rope="torch"), required)
    assert "takes triton for norm, swiglu, adamw instead. With" in text
    for kernels, wanted in (
        (KernelsConfig(norm="torch", rope="torch", swiglu="triton", adamw="torch"), required),  # as the user wishes
        (KernelsConfig(compile="layers", adamw="torch"), replace(required, compile="layers")),  # the compiler's work
        (KernelsConfig(), Requirements()),  # on a CPU
    ):
        assert missing_kernels(kernels, wanted) == ""
    monkeypatch.setattr(cuda, "unavailable", lambda device: "")
    assert missing_kernels(KernelsConfig(), required) == ""


def test_the_command_installs_what_pyproject_builds_with() -> None:
    (build,) = re.findall(r"^requires = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for requirement in json.loads(f"[{build}]"):
        assert requirement in cuda.how_to_build()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_names_the_instructions_of_attention(dtype: torch.dtype) -> None:
    if reason := cpu.attention_unsupported(dtype):
        pytest.skip(reason)
    version = cpu.attention_versions(dtype)[0].name
    text = kernels_table(KernelsConfig(attention="fused"), Requirements(dtype=dtype))
    assert f"\n  attention  fused ({version})" in text
