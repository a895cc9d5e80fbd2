"""How many Python functions a layer calls in one micro-batch: what a GPU that is faster than Python waits for."""

from __future__ import annotations

import pytest
import torch

from benchmarks.calls import Cost, count, on_ranks
from megatron_hammer.kernels import wide_products
from megatron_hammer.kernels.native import cpu

compiled = pytest.mark.skipif(bool(cpu.unavailable(torch.device("cpu"))), reason="the CPU kernels are not compiled")


def check(cost: Cost, calls: int, ours: int) -> None:
    assert cost.ours <= ours and cost.python <= calls, cost.calls.most_common(20)
    assert cost.python > 100 and cost.operations > 0, "not the layer was counted"


# Half of what there was on 29 Nov. 2026 (427, 517 and 399), and the package's own part of it.
@pytest.mark.parametrize(
    "path, calls, ours",
    [pytest.param("tp2", 258, 135, marks=compiled), ("gpu", 199, 105)],
)
def test_a_layer_calls_half_of_the_functions(path: str, calls: int, ours: int) -> None:
    """The number is the same every time; ``python benchmarks/calls.py --list`` says which functions."""
    check(on_ranks(count, path) if path == "tp2" else count(0, path), calls, ours)


@compiled
@pytest.mark.parametrize("wide", [False, True])
def test_products_of_either_kind_of_processor_call_as_few(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_products, "pay_here", lambda device, dtype: wide and dtype == torch.bfloat16)
    check(count(0, "cpu"), 213, 110)
