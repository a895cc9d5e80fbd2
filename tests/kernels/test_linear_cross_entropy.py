"""The softmax of a chunk and the product that sums a weight's gradient, against torch's own on fresh random inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels import linear
from megatron_hammer.kernels import linear_cross_entropy as kernel
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.linear import add_wgrad
from megatron_hammer.kernels.linear_cross_entropy import (
    CHUNK_TOKENS,
    Columns,
    LossKernels,
    combine_statistics,
    loss_and_gradient_,
    row_statistics,
    softmax_gradient_,
    with_chunks,
)
from megatron_hammer.kernels.native import triton_rows
from megatron_hammer.kernels.selection import select, select_operations
from tests.kernels.triton_here import needs_interpreter, needs_triton

# Largest error of the gradient, as a share of its norm: one rounding to the logits' type; in fp32 z - lse is rounded
# where both are near 40, and exp makes the absolute error of 4e-6 a relative one.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def problem(n: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, width] far from zero, so that the maximum matters, labels for all columns, weights with zeros."""
    logits = (torch.randn(n, width, dtype=torch.float64) * 5 + 20).to(dtype)
    weights = torch.rand(n, dtype=torch.promote_types(dtype, torch.float32))
    weights[::3] = 0
    return logits, torch.randint(0, width, (n,)), weights


def expected(logits: Tensor, labels: Tensor, vocab_size: int, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient in fp64 by autograd."""
    z = logits.to(torch.float64, copy=True).requires_grad_()
    loss = F.cross_entropy(z[:, :vocab_size], labels, reduction="none")
    objective = loss + z_loss * z[:, :vocab_size].logsumexp(-1).square()
    (gradient,) = torch.autograd.grad((weights.double() * objective).sum(), z)
    return loss.detach(), gradient


def close(found: Tensor, reference: Tensor, tolerance: float) -> None:
    assert (found.double() - reference).norm() <= tolerance * reference.norm()


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("block", [1, 1000, 2**18])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_one_rank(dtype: torch.dtype, block: int, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernel.BLOCK_ELEMENTS, "cpu", block)
    logits, labels, weights = problem(23, 200, dtype)
    columns = Columns.of(0, 200, 151)
    labels %= 151
    loss, gradient = expected(logits, labels, 151, weights, z_loss)
    found = logits.clone()
    losses = loss_and_gradient_(found, labels, columns, weights, z_loss)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    close(losses, loss, 1e-13 if dtype == torch.float64 else 1e-6)
    close(found, gradient, TOLERANCE[dtype])
    assert not found[:, 151:].any(), "padding must get no gradient"
    assert not found[::3].any(), "nor tokens that do not count"


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("vocab_size", [61, 90, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ranks_apart(dtype: torch.dtype, vocab_size: int, z_loss: float) -> None:
    """4 ranks of 32 columns; with 61 true columns the last two hold padding only."""
    logits, labels, weights = problem(19, 128, dtype)
    labels %= vocab_size
    loss, gradient = expected(logits, labels, vocab_size, weights, z_loss)
    shards = [x.contiguous() for x in logits.split(32, 1)]
    columns = [Columns.of(rank, 32, vocab_size) for rank in range(4)]
    parts = torch.stack([row_statistics(z, labels, c) for z, c in zip(shards, columns, strict=True)])
    assert all(torch.equal(z, part) for z, part in zip(shards, logits.split(32, 1), strict=True)), "still unchanged"
    lse, losses = combine_statistics(parts)
    close(losses, loss, 1e-13 if dtype == torch.float64 else 1e-6)
    for z, c in zip(shards, columns, strict=True):
        softmax_gradient_(z, labels, c, lse, losses, weights, z_loss)
    close(torch.cat(shards, 1), gradient, TOLERANCE[dtype])
    assert not torch.cat(shards, 1)[:, vocab_size:].any()


def test_a_label_that_is_all_but_certain_keeps_its_gradient() -> None:
    """p = 1 - 1e-4 is 1 in bf16, so p - 1 of the written p would be 0. 4e-3: a rounding to bf16 and one of the sum."""
    logits, labels, columns = torch.zeros(2, 8, dtype=torch.bfloat16), torch.tensor([3, 3]), Columns.of(0, 8, 8)
    logits[:, 3] = 11
    _, gradient = expected(logits, labels, 8, torch.ones(2), 0.0)
    assert -2e-4 < gradient[0, 3] < -1e-4
    one, apart = logits.clone(), logits.clone()
    loss_and_gradient_(one, labels, columns, torch.ones(2))
    lse, loss = combine_statistics(row_statistics(logits, labels, columns)[None])
    softmax_gradient_(apart, labels, columns, lse, loss, torch.ones(2))
    for found in (one, apart):
        torch.testing.assert_close(found.double(), gradient, rtol=4e-3, atol=0)


@pytest.mark.parametrize("block", [5, 64, 2**20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_gradient_is_summed_in_fp32(dtype: torch.dtype, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written over garbage, then added to 63 times; in 16 bits such a sum would stop growing.

    16 bits: each product is rounded once, the sum never. fp32: 64 roundings.
    """
    monkeypatch.setattr(linear, "BLOCK_ELEMENTS", block)
    wide = torch.promote_types(dtype, torch.float32)
    grad, x = torch.randn(13, 37).to(dtype), torch.randn(13, 6).to(dtype)
    place = torch.full((37, 6), torch.nan, dtype=wide)
    add_wgrad(grad, x, place, begun=False)
    product = grad.double().t() @ x.double()
    tolerance = {torch.float64: 1e-13, torch.float32: 5e-6}.get(dtype, torch.finfo(dtype).eps / 2)
    close(place, product, tolerance)
    for _ in range(63):
        add_wgrad(grad / 64, x, place, begun=True)
    close(place, product * (1 + 63 / 64), tolerance)


def test_selection() -> None:
    """On a CPU: torch, and triton only refused; chunks are the device's or the user's, never the ranks'."""
    cuda = torch.device("cuda")
    assert select_operations(KernelsConfig(loss="torch")).loss == LossKernels("torch", CHUNK_TOKENS["cpu"])
    row = select("loss", "torch", kernel.BACKENDS, Requirements(cuda))
    assert with_chunks(row.load(cuda), KernelsConfig(loss_chunk_tokens=7), cuda) == LossKernels("torch", 7)
    assert with_chunks(row.load(cuda), KernelsConfig(), cuda) == LossKernels("torch", CHUNK_TOKENS["cuda"])
    assert select_operations(KernelsConfig(loss_chunk_tokens=9)).loss.chunk_tokens == 9
    with pytest.raises(ConfigError, match=r"error\[E209\]: kernels.loss=triton does not run on cpu; use auto or"):
        select("loss", "triton", kernel.BACKENDS, Requirements())


def test_triton_is_chosen_on_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    required = Requirements(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(triton_rows.importlib.util, "find_spec", lambda name: object())
    chosen = select("loss", "auto", kernel.BACKENDS, required).load(required.device)
    assert (chosen.name, chosen.chunk_tokens) == ("triton", CHUNK_TOKENS["cuda"])
    assert chosen.row_statistics is not row_statistics and chosen.loss_and_gradient_ is not loss_and_gradient_
    monkeypatch.setattr(triton_rows.importlib.util, "find_spec", lambda name: None)
    assert select("loss", "auto", kernel.BACKENDS, required).name == "torch"
    with pytest.raises(ConfigError, match=r"E209.*the package triton is not installed"):
        select("loss", "triton", kernel.BACKENDS, required)
    with pytest.raises(ConfigError, match=r"E209.*does not compute in float64"):
        select("loss", "triton", kernel.BACKENDS, replace(required, dtype=torch.float64))


def _child(program: str, **environment: str) -> str:
    """Triton decides when a kernel is defined whether it interprets it: so in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_interpreter
def test_triton_interpreted() -> None:
    """Fewer and more columns than a block, padding, all ranks' parts, zero weights, z-loss, a row stride."""
    assert _child(INTERPRETED, TRITON_INTERPRET="1").strip() == "36 cases"


@needs_triton
def test_triton_compiles_for_gpus(tmp_path: Path) -> None:
    """An odd vocabulary in rows that are not: 16 bytes an access, but for the label's logit and its gradient."""
    assert _child(COMPILED, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").strip() == "6 kernels"


INTERPRETED = """
import itertools, torch
from megatron_hammer.kernels import linear_cross_entropy as reference
from megatron_hammer.kernels.native import linear_cross_entropy_triton as triton_form
triton_form.BLOCK, cases = 64, 0
for dtype, width, z_loss, rank in itertools.product(
    (torch.float32, torch.float16, torch.bfloat16), (40, 64, 130), (0.0, 1e-2), (0, 1)
):
    vocabulary, n = 2 * width - 11, 6
    labels, weights = torch.randint(0, vocabulary, (n,)), torch.rand(n)
    weights[::3] = 0
    whole = (torch.randn(n, 2 * width) * 5 + 20).to(dtype)
    parts = [whole[:, :width], whole[:, width:]]  # views: the stride of a row is not its length
    columns = [reference.Columns.of(r, width, vocabulary) for r in (0, 1)]
    statistics = [reference.row_statistics(z, labels, c) for z, c in zip(parts, columns)]
    found = triton_form.row_statistics(parts[rank], labels, columns[rank])
    torch.testing.assert_close(found, statistics[rank], rtol=1e-6, atol=1e-6)
    lse, loss = reference.combine_statistics(torch.stack(statistics))
    pairs = [[parts[rank].clone(), whole[:, :width].clone() if rank == 0 else whole[:, width:].clone()]]
    for form, z in zip((reference, triton_form), pairs[0]):
        form.softmax_gradient_(z, labels, columns[rank], lse, loss, weights, z_loss)
    all_columns = reference.Columns.of(0, 2 * width, vocabulary)
    pairs.append([whole.clone(), whole.clone()])
    losses = [
        form.loss_and_gradient_(z, labels, all_columns, weights, z_loss)
        for form, z in zip((reference, triton_form), pairs[1])
    ]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=2e-6)
    for expected, mine in pairs:
        # The interpreter truncates to bf16 where a GPU rounds: a whole unit in the last place.
        tolerance = {torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
        assert (mine - expected).float().norm() <= tolerance * expected.float().norm()
        assert not mine[::3].any()
    assert not pairs[1][1][:, vocabulary:].any()
    cases += 1
print(cases, "cases")
"""

COMPILED = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from megatron_hammer.kernels.native import linear_cross_entropy_triton as form
pointers = {"logits": "*bf16", "labels": "*i64"}
pointers |= dict.fromkeys(("statistics", "lse_of", "loss_of", "weights"), "*fp32")
numbers = {"z_loss": "fp32"} | dict.fromkeys(("rows", "row_stride", "start", "valid", "width"), "i32")
count = 0
for capability in (80, 90):
    for total, gradient in ((True, False), (False, True), (True, True)):
        fixed = {"SUM": total, "GRADIENT": gradient, "BLOCK": form.BLOCK, "EACH": form.EACH}
        names = form.softmax_rows.arg_names
        even = {(names.index(x),): [["tt.divisibility", 16]] for x in (*pointers, "row_stride", "width")}
        signature = pointers | numbers | dict.fromkeys(fixed, "constexpr")
        source = ASTSource(form.softmax_rows, signature, constexprs=fixed, attrs=even)
        done = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": form.WARPS})
        of_logits = re.findall(r"(ld|st)\\.global\\.(v4\\.b32|b16)", done.asm["ptx"])
        expected = [("ld", "b16")] * total + [("ld", "v4.b32")] * 4 * (total + gradient)
        expected += ([("st", "b16")] + [("st", "v4.b32")] * 4) * gradient
        assert sorted(of_logits) == sorted(expected), of_logits
        count += len(done.asm["cubin"]) > 0
print(count, "kernels")
"""
