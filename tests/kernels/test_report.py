"""The table of kernels that is printed at start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_hammer.config import ATTENTION_MASKS, KernelsConfig
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.native import cuda
from megatron_hammer.kernels.report import kernels_table
from megatron_hammer.kernels.selection import TABLES

CUDA = torch.device("cuda", 0)


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
    assert "  adamw      torch                                      fused: _cuda.so was not built; apex: not" in text
    monkeypatch.setattr(cuda, "unavailable", lambda device: "a long story " * 12)
    text = kernels_table(KernelsConfig(), required)
    assert text.count("fused: see [1]") == 4 and text.count("  [1] a long story a") == 1
    assert max(map(len, text.splitlines())) <= 100
    assert "flash" not in kernels_table(KernelsConfig(), Requirements()), "what no CPU has is no news on one"
