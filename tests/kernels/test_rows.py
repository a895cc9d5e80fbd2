"""Every row of the tables that a GPU's machine can run, against the plain torch reference: skipped with its reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.argument_types import AdamWState
from megatron_hammer.kernels.attention import each_document, whole_samples
from megatron_hammer.kernels.backend import Backend, Requirements
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.selection import TABLES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LAYER = [(name, row) for name in ("norm", "rope", "swiglu") for row in TABLES[name]]
REQUIRED = Requirements(torch.device("cuda"), torch.bfloat16, heads=8, groups=2)


def loaded(row: Backend, required: Requirements = REQUIRED) -> Any:
    if reason := row.unusable(required):
        pytest.skip(f"{row.name} {reason}")
    return row.load(required.device)


def gradients(function: Any, leaves: list[Tensor], *rest: Any) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in leaves]
    out = function(*(x.clone() for x in leaves), *rest)  # some write over their input, which no leaf allows
    outs = list(out) if isinstance(out, tuple) else [out]
    return [
        *(x.detach() for x in outs),
        *torch.autograd.grad(outs, leaves, [x.detach().float().cos().to(x.dtype) for x in outs]),
    ]


def near(mine: list[Tensor], reference: list[Tensor]) -> None:
    """1 % of the norm: a few roundings to bf16, at other places."""
    for a, b in zip(mine, reference, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and (a - b).float().norm() <= 1e-2 * b.float().norm()


@pytest.mark.parametrize("operation, row", LAYER, ids=[f"{name}={row.name}" for name, row in LAYER])
def test_layer_operations(operation: str, row: Backend) -> None:
    mine, reference = loaded(row), next(r for r in TABLES[operation] if r.name == "torch").load(REQUIRED.device)
    x, branch = (torch.randn(33, 3, 256, device="cuda").bfloat16() for _ in range(2))
    if operation == "norm":
        weight = torch.nn.Parameter(torch.rand(256, device="cuda").bfloat16() + 0.5)
        for other in ([branch], []):

            def call(f: Any, other: list[Tensor] = other) -> list[Tensor]:
                leaves = [t.clone().requires_grad_() for t in (x, *other)]
                out = f(leaves[0], leaves[1] if other else None, weight, 1e-5)
                return [
                    *(t.detach() for t in out),
                    *torch.autograd.grad(out, [*leaves, weight], [t.detach() for t in out]),
                ]

            near(call(mine), call(reference))
    elif operation == "rope":
        angles = torch.randn(33, 1, 1, 16, device="cuda")
        rest = (angles.cos().bfloat16(), angles.sin().bfloat16(), 4, 2)
        near(*(gradients(f, [x.view(33, 3, 8, 32)], *rest) for f in (mine, reference)))
    else:
        near(*(gradients(f, [x]) for f in (mine, reference)))


@pytest.mark.parametrize("mask", ["causal", "document"])
@pytest.mark.parametrize("row", TABLES["attention"], ids=lambda row: row.name)
def test_attention(row: Backend, mask: str) -> None:
    function = loaded(row, Requirements(REQUIRED.device, REQUIRED.dtype, mask, 8, 2))
    documents = PackedSequences.from_cu_seqlens(np.cumsum([0, 1, 300, 17, 1000, 64]).astype(np.int32), REQUIRED.device)
    shape, given, reference = (
        ((512, 2), None, whole_samples) if mask == "causal" else ((1382, 1), documents, each_document)
    )
    parts = torch.randn(*shape, 12, 64, device="cuda").bfloat16().split((8, 2, 2), dim=2)
    near(*(gradients(f, list(parts), given) for f in (function, reference)))


@pytest.mark.parametrize("row", TABLES["adamw"], ids=lambda row: row.name)
def test_adamw(row: Backend) -> None:
    """Two updates and a skip, with the 16-bit copy: nobody waits for the device."""
    kernels, results = loaded(row), []
    made = [[torch.randn(n, device="cuda") ** 2 for _ in range(4)] for n in (100_003, 64)]
    for each in (next(r for r in TABLES["adamw"] if r.name == "torch").load(REQUIRED.device), kernels):
        states = [
            AdamWState(*(t.clone() for t in ts), i == 0, torch.zeros_like(ts[0]).bfloat16())
            for i, ts in enumerate(made)
        ]
        updates, squares, divisor = (torch.tensor(v, device="cuda") for v in (0.0, 0.0, 2.0))
        skips = torch.tensor([0.0, 1.0, 0.0], device="cuda")
        for skip in skips:
            for s, tensors in zip(states, made, strict=True):
                s.grad.copy_(tensors[1])
            torch.cuda.set_sync_debug_mode("error")
            try:
                each.add_square_sum(states[0].grad, squares)
                each.update(states, updates, 1e-2, OptimizerConfig(), divisor, skip)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append([updates, squares, *(t for s in states for t in (s.weight, s.exp_avg, s.exp_avg_sq))])
    for mine, reference in zip(results[1], results[0], strict=True):
        assert (mine - reference).norm() <= 1e-5 * reference.norm()
