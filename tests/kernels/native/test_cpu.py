"""The compiled kernels of a CPU, for every instruction set that this machine has, against references in fp64.

What autograd makes of them (``autograd.py``) is tested along the way. Inputs are fresh; a failure shows its seed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels import linear_cross_entropy as losses
from megatron_hammer.kernels.adamw import adamw_, add_square_sum
from megatron_hammer.kernels.argument_types import AdamWState, Columns
from megatron_hammer.kernels.linear_cross_entropy import combine_statistics
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.norm import rms_norm
from megatron_hammer.kernels.rope import rope
from megatron_hammer.kernels.swiglu import swiglu

SOURCES = Path(__file__).parents[3] / "csrc" / "cpu"
DTYPES = [torch.float32, torch.bfloat16]
VERSIONS = [cpu.CpuKernels(version) for version in cpu.COMPILED.versions()] if cpu.COMPILED else []

pytestmark = pytest.mark.skipif(not VERSIONS, reason="the compiled kernels are missing")
every_version = pytest.mark.parametrize("k", VERSIONS, ids=lambda k: k.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def seed() -> None:
    value = torch.seed()
    print("seed", value)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def close(found: Tensor, expected: Tensor, roundings: float = 1, term: float = 0.0) -> None:
    """Each element, up to so many roundings of its type, and as a sum of terms up to the largest element or ``term``.

    fp32 keeps intermediate results in the type itself: some ten more roundings.
    """
    assert found.shape == expected.shape
    unit = torch.finfo(found.dtype).eps / 2
    many = roundings + (20 if found.dtype == torch.float32 else 0.01)
    scale = max(term, expected.abs().max().item()) if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=many * unit, atol=20 * 2**-24 * scale)


def gradients(outputs: Any, inputs: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for o, g in zip(outputs, grads)])


# ---- residual add and RMSNorm -------------------------------------------------------------------------------------


@every_version
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (1, 3, 257), (5, 2, 64), (150, 3, 256)], ids=str)
@pytest.mark.parametrize("kind", ["branch", "alone", "strided"])
def test_add_rms_norm(k: Any, dtype: torch.dtype, shape: tuple[int, ...], kind: str) -> None:
    x, branch, grad_normed, grad_summed = (normal(*shape, dtype=dtype) for _ in range(4))
    weight = normal(shape[-1], dtype=dtype).requires_grad_()
    if kind == "strided":
        x, grad_normed = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, grad_normed))
    leaves = [x.requires_grad_(), branch.requires_grad_(), weight]
    if kind == "alone":
        del leaves[1]
    other = None if kind == "alone" else branch
    normed, summed = fused.add_rms_norm(k, x, other, weight, 1e-5)
    found = gradients((normed, summed), leaves, [grad_normed, grad_summed])

    rounded = (x if other is None else x + branch).detach()
    assert torch.equal(summed, rounded), "the sum is that of the type, bit by bit"
    wide, wide_weight = rounded.double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = rms_norm(wide, wide_weight, 1e-5)
    close(normed, expected, 2)
    expected_grads = gradients((expected, wide * 1), [wide, wide_weight], [grad_normed, grad_summed])
    rstd = (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    term = (rstd * grad_normed * wide_weight).abs().max().item()  # of which little is left where h is small
    for x_grad in found[:-1]:
        close(x_grad, expected_grads[0], term=term)
    close(found[-1], expected_grads[1])


@every_version
def test_either_result_of_the_norm_may_be_unused(k: Any) -> None:
    inputs = [normal(4, 2, 9, dtype=torch.float32).requires_grad_() for _ in range(2)]
    weight = normal(9, dtype=torch.float32).requires_grad_()
    grad = normal(4, 2, 9, dtype=torch.float32)
    normed, summed = fused.add_rms_norm(k, *inputs, weight, 1e-5)
    for found in torch.autograd.grad(summed, inputs, grad, retain_graph=True):
        assert torch.equal(found, grad)
    wide = (inputs[0] + inputs[1]).detach().double().requires_grad_()
    (expected,) = gradients((rms_norm(wide, weight.double(), 1e-5),), [wide], [grad])
    for found in torch.autograd.grad(normed, inputs, grad):
        close(found, expected)


# ---- RoPE ----------------------------------------------------------------------------------------------------------


def rotations(s: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.rand(s, 1, 1, d // 2, dtype=torch.float64) * 7
    return angles.cos().to(dtype), angles.sin().to(dtype)


@every_version
@every_dtype
@pytest.mark.parametrize("heads, groups, d", [(1, 1, 2), (4, 2, 6), (3, 1, 70), (8, 2, 64)])
def test_rope(k: Any, dtype: torch.dtype, heads: int, groups: int, d: int) -> None:
    s, b = 9, 3
    leaf = normal(s, b, (heads + 2 * groups) * d, dtype=dtype).requires_grad_()
    cos, sin = rotations(s, d, dtype)
    # As attention returns them, a view whose last dimension is not contiguous, and one number for all.
    grads = [
        normal(b, heads, s, d, dtype=dtype).permute(2, 0, 1, 3),
        normal(s, b, d, groups, dtype=dtype).transpose(2, 3),
        normal(1, 1, 1, 1, dtype=dtype).expand(s, b, groups, d),
    ]
    qkv = (leaf * 1).view(s, b, heads + 2 * groups, d)
    before, place = qkv.detach().clone(), qkv.data_ptr()
    found = fused.rope(k, qkv, cos, sin, heads, groups)
    assert [x.data_ptr() for x in found] == [place + n * d * leaf.itemsize for n in (0, heads, heads + groups)]
    (found_grad,) = gradients(found, [leaf], grads)

    wide = before.double().requires_grad_()
    expected = rope(wide, cos.double(), sin.double(), heads, groups)
    for x, y in zip(found, expected):
        close(x, y)
    close(found_grad.view_as(wide), gradients(expected, [wide], grads)[0])


@every_version
def test_rope_says_what_it_overwrote(k: Any) -> None:
    """Whoever kept qkv for backward fails instead of computing with other numbers."""
    x = normal(2, 1, 3, 4, dtype=torch.float32).requires_grad_()
    cos, sin = rotations(2, 4, torch.float32)
    qkv = x * 1
    square = qkv * qkv
    q, _, _ = fused.rope(k, qkv, cos, sin, 1, 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + q.sum()).backward()


@every_version
@pytest.mark.parametrize("kind", ["leaf", "strided", "no grad", "inference"])
def test_rope_copies_what_it_may_not_overwrite(k: Any, kind: str) -> None:
    x = normal(5, 2, 4, 6, dtype=torch.float32)
    if kind == "strided":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    kept = x.clone()
    cos, sin = rotations(5, 6, torch.float32)
    with torch.inference_mode(kind == "inference"):
        qkv = x.clone() if kind == "inference" else x.requires_grad_(kind != "no grad")
        found = fused.rope(k, qkv, cos, sin, 2, 1)
    assert torch.equal(x, kept) == (kind != "no grad"), "only what nobody differentiates is overwritten"
    for mine, expected in zip(found, rope(kept, cos, sin, 2, 1)):
        torch.testing.assert_close(mine, expected)


# ---- SwiGLU --------------------------------------------------------------------------------------------------------


@every_version
@every_dtype
@pytest.mark.parametrize("rows, f", [(1, 1), (3, 7), (1, 257), (3, 64), (200, 96)])
@pytest.mark.parametrize("strided", [False, True])
def test_swiglu(k: Any, dtype: torch.dtype, rows: int, f: int, strided: bool) -> None:
    gate_up, grad = normal(rows, 2, 2 * f, dtype=dtype) * 3, normal(rows, 2, f, dtype=dtype)
    if strided:
        gate_up, grad = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (gate_up, grad))
    gate_up.requires_grad_()
    found = fused.swiglu(k, gate_up)
    wide = gate_up.detach().double().requires_grad_()
    expected = swiglu(wide)
    close(found, expected)
    close(gradients((found,), [gate_up], [grad])[0], gradients((expected,), [wide], [grad])[0])


@every_version
def test_exponential_over_its_whole_range(k: Any) -> None:
    """silu, where e^-x goes from 2^-115 to 2^115, and softmax down to the smallest normal number; 4 ulp of fp32."""
    gate = torch.linspace(-79, 100, 100_003)
    product = torch.empty(len(gate), 1)
    k.swiglu_forward(torch.stack((gate, torch.ones_like(gate)), 1), product)
    expected = gate.double() * gate.double().sigmoid()
    torch.testing.assert_close(product[:, 0].double(), expected, rtol=4 * 2**-23, atol=0)

    z = torch.linspace(-87, 0, 100_003)[:, None].repeat(1, 2)
    z[:, 0] = 0  # so that largest is 0, and the sum of one column left over
    lse, ones = torch.zeros(len(z)), torch.ones(len(z))
    k.softmax_gradient_(z, torch.zeros(len(z), dtype=torch.int64), Columns(0, 2), lse, ones, ones)
    expected = torch.linspace(-87, 0, 100_003).double().exp()
    torch.testing.assert_close(z[:, 1].double(), expected, rtol=4 * 2**-23, atol=0)


# ---- softmax and cross-entropy -------------------------------------------------------------------------------------


def problem(dtype: torch.dtype, n: int, width: int, valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, width] far from zero in rows further apart than their length, labels, weights with zeros."""
    logits = (torch.randn(n, width + 5) * 5 + 20).to(dtype)[:, :width]
    weights = torch.rand(n)
    weights[::3] = 0
    return logits, torch.randint(0, valid, (n,)), weights


@every_version
@every_dtype
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("n, width, valid", [(1, 1, 1), (3, 7, 5), (23, 200, 151), (9, 128, 128), (40, 2000, 1999)])
def test_loss_and_gradient(k: Any, dtype: torch.dtype, n: int, width: int, valid: int, z_loss: float) -> None:
    """In one pass, and in two as ranks do. Gradient: 4e-6 of its norm (z - lse is rounded near 40), or one of bf16."""
    logits, labels, weights = problem(dtype, n, width, valid)
    columns = Columns.of(0, width, valid)
    wide = logits.double()
    expected_loss = losses.loss_and_gradient_(wide, labels, columns, weights.double(), z_loss)
    one, two = logits.clone(), logits.clone()
    found = k.loss_and_gradient_(one, labels, columns, weights, z_loss)
    statistics = k.row_statistics(two, labels, columns)
    assert torch.equal(two, logits), "still unchanged"
    lse, loss = combine_statistics(statistics[None])
    k.softmax_gradient_(two, labels, columns, lse, loss, weights, z_loss)
    for loss_found, gradient in ((found, one), (loss, two)):
        assert loss_found.dtype == torch.float32
        assert (loss_found - expected_loss).norm() <= 1e-6 * expected_loss.norm()
        tolerance = 4e-6 if dtype == torch.float32 else 4e-3
        assert (gradient - wide).norm() <= tolerance * wide.norm()
        assert not gradient[:, valid:].any() and not gradient[::3].any()


@every_version
@every_dtype
@pytest.mark.parametrize("vocab_size", [61, 90, 128])
def test_ranks_apart(k: Any, dtype: torch.dtype, vocab_size: int) -> None:
    """4 ranks of 32 columns; with 61 true columns the last two hold padding only."""
    logits, labels, weights = problem(dtype, 19, 128, vocab_size)
    for rank, shard in enumerate(logits.split(32, 1)):
        columns = Columns.of(rank, 32, vocab_size)
        expected = losses.row_statistics(shard, labels, columns)
        torch.testing.assert_close(k.row_statistics(shard, labels, columns), expected, rtol=1e-6, atol=0)
        lse, loss = torch.rand(19) + 42, torch.rand(19) + 10
        mine, theirs = shard.clone(), shard.double()
        k.softmax_gradient_(mine, labels, columns, lse, loss, weights, 1e-2)
        losses.softmax_gradient_(theirs, labels, columns, lse.double(), loss.double(), weights.double(), 1e-2)
        assert (mine - theirs).norm() <= (4e-6 if dtype == torch.float32 else 4e-3) * theirs.norm()


@every_version
def test_a_label_that_is_all_but_certain_keeps_its_gradient(k: Any) -> None:
    """p = 1 - 1e-4 is 1 in bf16, so p - 1 of the written p would be 0. 4e-3: a rounding to bf16 and one of the sum."""
    logits, labels, columns = torch.zeros(2, 8, dtype=torch.bfloat16), torch.tensor([3, 3]), Columns.of(0, 8, 8)
    logits[:, 3] = 11
    exact = logits.double()
    losses.loss_and_gradient_(exact, labels, columns, torch.ones(2, dtype=torch.float64))
    one, apart = logits.clone(), logits.clone()
    k.loss_and_gradient_(one, labels, columns, torch.ones(2))
    lse, loss = combine_statistics(k.row_statistics(logits, labels, columns)[None])
    k.softmax_gradient_(apart, labels, columns, lse, loss, torch.ones(2))
    for found in (one, apart):
        torch.testing.assert_close(found.double(), exact, rtol=4e-3, atol=0)


@every_version
def test_a_label_outside_the_vocabulary(k: Any) -> None:
    for label in (-1, 5, 2**40):
        logits = normal(2, 8, dtype=torch.float32)
        kept = logits.clone()
        with pytest.raises(IndexError, match="a label is not in the vocabulary"):
            k.loss_and_gradient_(logits, torch.tensor([0, label]), Columns(0, 5), torch.ones(2))
        assert torch.equal(logits, kept)


# ---- optimizer -----------------------------------------------------------------------------------------------------


def state(n: int, dtype: torch.dtype | None, decay: bool = True) -> AdamWState:
    weight, grad, exp_avg = (torch.randn(n) for _ in range(3))
    param = None if dtype is None else torch.zeros(n, dtype=dtype)
    return AdamWState(weight, grad, exp_avg, torch.rand(n), decay, param)


@every_version
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("n", [0, 1, 17, 40_001])
def test_adamw(k: Any, dtype: torch.dtype | None, n: int) -> None:
    """Against torch's own in fp64: a few roundings of fp32 of what was added up, weights and the largest step."""
    config, divisor, skip = OptimizerConfig(), torch.tensor(3.0), torch.tensor(0.0)
    mine = state(n, dtype)
    wide = AdamWState(mine.weight.double(), mine.grad.double(), mine.exp_avg.double(), mine.exp_avg_sq.double(), True)
    before = wide.weight.clone()
    for step in range(3):
        buffers = (mine.weight, mine.grad, mine.exp_avg, mine.exp_avg_sq, mine.param)
        k.adamw(
            *buffers, 1e-2, config.beta1, config.beta2, config.eps, config.weight_decay, divisor, skip,
            torch.tensor(float(step)),
        )  # fmt: skip
        grad = wide.grad.clone()  # torch writes the divided gradient back
        adamw_([wide], torch.tensor(float(step)), 1e-2, config, divisor, skip)
        wide.grad.copy_(grad)
    moved = (wide.weight - before).abs().max().item() if n else 0.0
    torch.testing.assert_close(mine.weight.double(), wide.weight, rtol=1e-6, atol=1e-6 * (1 + moved))
    torch.testing.assert_close(mine.exp_avg.double(), wide.exp_avg, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mine.exp_avg_sq.double(), wide.exp_avg_sq, rtol=1e-6, atol=0)
    if mine.param is not None:
        assert torch.equal(mine.param, mine.weight.to(mine.param.dtype)), "the copy is the weight's rounding"


@every_version
def test_rounding_to_bf16(k: Any) -> None:
    """As torch's: ties to even, beyond the largest to infinity, and whatever is NaN stays NaN."""
    bits = torch.randint(0x00800000, 0x7F800000, (1000,)) & ~0x7FFF  # half of them ties
    rest = torch.tensor([0, 0x7F7FFFFF, 0x7F7F7FFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0x7FC00000, 0x3F808001])
    weight = torch.cat((bits, rest)).to(torch.int32).view(torch.float32)
    weight = torch.cat((weight, -weight))
    param = torch.empty(len(weight), dtype=torch.bfloat16)
    zeros, expected, numbers = torch.zeros_like(weight), weight.to(torch.bfloat16), (0.0, 0.9, 0.95, 1e-8, 0.0)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    k.adamw(weight, zeros, zeros.clone(), zeros.clone(), param, *numbers, one, zero, zero)
    assert torch.equal(param.isnan(), expected.isnan())
    assert torch.equal(param.nan_to_num(), expected.nan_to_num())


@every_version
def test_adamw_skips(k: Any) -> None:
    mine, numbers = state(33, torch.bfloat16), (1e-2, 0.9, 0.95, 1e-8, 0.1)
    mine.grad[5] = torch.nan
    buffers = [mine.weight, mine.grad, mine.exp_avg, mine.exp_avg_sq, mine.param]
    kept = [x.clone() for x in buffers]
    k.adamw(*buffers, *numbers, torch.tensor(0.0), torch.tensor(1.0), torch.tensor(4.0))
    for x, before in zip(buffers, kept):
        assert torch.equal(x.nan_to_num(), before.nan_to_num())


@every_version
@pytest.mark.parametrize("n", [0, 1, 63, 100_003])
def test_square_sum(k: Any, n: int) -> None:
    part, out = torch.randn(n), torch.tensor(2.0)
    k.add_square_sum(part, out)
    torch.testing.assert_close(out.double(), 2 + part.double().square().sum(), rtol=1e-6, atol=0)
    reference = torch.tensor(2.0)
    add_square_sum(part, reference)
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=0)


@every_version
@every_dtype
@pytest.mark.parametrize("n", [0, 7, 70_001])
def test_accumulate(k: Any, dtype: torch.dtype, n: int) -> None:
    place, values = torch.randn(n), normal(n, dtype=dtype)
    expected = place + values.float()
    k.accumulate(place, values, True)
    assert torch.equal(place, expected)
    k.accumulate(place, values, False)
    assert torch.equal(place, values.float())


# ---- all of them ---------------------------------------------------------------------------------------------------


def everything(k: Any, dtype: torch.dtype, poison: float = 1.0) -> list[Tensor]:
    """Results of every function, on inputs large enough for several threads; one input element is multiplied."""
    torch.manual_seed(7)
    s, b, h, n, g = 96, 2, 520, 6, 1
    x, branch, weight = normal(s, b, h, dtype=dtype), normal(s, b, h, dtype=dtype), normal(h, dtype=dtype)
    qkv, gate_up = normal(s, b, n + 2 * g, 64, dtype=dtype), normal(s, b, 2 * h, dtype=dtype)
    for t in (x, qkv, gate_up):
        t.view(-1)[3] *= poison
    leaves = [t.requires_grad_() for t in (x, branch, weight, qkv, gate_up)]
    out = (
        *fused.add_rms_norm(k, x, branch, weight, 1e-5),
        *fused.rope(k, qkv, *rotations(s, 64, dtype), n, g),
        fused.swiglu(k, gate_up),
    )
    results = [*out, *torch.autograd.grad(out, leaves, [normal(*o.shape, dtype=dtype) for o in out])]
    logits, labels, columns = normal(s, 1000, dtype=dtype), torch.randint(0, 900, (s,)), Columns(0, 900)
    logits[0, 3] *= poison
    results += [
        k.row_statistics(logits, labels, columns),
        k.loss_and_gradient_(logits, labels, columns, torch.ones(s)),
        logits,
    ]
    one = state(70_000, dtype)
    one.grad[3] *= poison
    buffers, zero = (one.weight, one.grad, one.exp_avg, one.exp_avg_sq, one.param), torch.tensor(0.0)
    total = torch.tensor(0.0)
    k.add_square_sum(one.grad, total)
    k.adamw(*buffers, 1e-2, 0.9, 0.95, 1e-8, 0.1, torch.tensor(1.0), zero, zero)
    return [*results, total, *buffers]


@every_version
@every_dtype
def test_threads_change_no_bit(k: Any, dtype: torch.dtype, threads: None) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(everything(k, dtype))
    for one, two, three in zip(*results):
        assert torch.equal(one, two) and torch.equal(one, three)


@every_version
@every_dtype
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(k: Any, dtype: torch.dtype, poison: float) -> None:
    """A step that meets it is skipped, so no kernel may turn it into a number: the fp64 reference's places are ours."""
    results = everything(k, dtype, poison)
    normed, summed, q = results[0], results[1], results[2]
    assert not summed.view(-1)[3].isfinite() and not normed.view(-1)[3].isfinite()
    assert not q.reshape(-1)[3].isfinite() and not results[5].view(-1)[3].isfinite()
    for gradient in results[6:9]:
        assert not gradient.isfinite().all()
    statistics, loss, gradient = results[11:14]
    assert statistics[1, 0].isnan() and loss[0].isnan() and gradient[0, :900].isnan().any()
    total, weight, _, exp_avg, exp_avg_sq, param = results[14:]
    assert not any(x.isfinite().all() for x in (total, weight, exp_avg, exp_avg_sq, param))


@every_version
@every_dtype
def test_nothing_at_all(k: Any, dtype: torch.dtype) -> None:
    x = torch.empty(0, 2, 8, dtype=dtype, requires_grad=True)
    weight = normal(8, dtype=dtype).requires_grad_()
    qkv, cos = torch.empty(0, 2, 4, 8, dtype=dtype, requires_grad=True), torch.empty(0, 1, 1, 4, dtype=dtype)
    out = (*fused.add_rms_norm(k, x, x * 1, weight, 1e-5), *fused.rope(k, qkv, cos, cos, 2, 1), fused.swiglu(k, x))
    grads = torch.autograd.grad(out, (x, weight, qkv), [torch.ones_like(o) for o in out])
    assert not grads[1].any()
    logits, labels = torch.empty(0, 5, dtype=dtype), torch.empty(0, dtype=torch.int64)
    assert k.loss_and_gradient_(logits, labels, Columns(0, 5), torch.empty(0)).shape == (0,)
    assert k.row_statistics(logits, labels, Columns(0, 5)).shape == (3, 0)


@every_dtype
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_recompute(dtype: torch.dtype, reentrant: bool) -> None:
    """A layer's worth of operations, recomputed or not: equal bits."""
    k, h, n, g, d = cpu.library(), 24, 2, 1, 6
    x = normal(5, 3, h, dtype=dtype).requires_grad_()
    weights = [normal(*shape, dtype=dtype).requires_grad_() for shape in ((h,), (h,), ((n + 2 * g) * d, h), (h, n * d))]
    cos, sin = rotations(5, d, dtype)

    def layer(x: Tensor, norm: Tensor, norm2: Tensor, into: Tensor, back: Tensor) -> Tensor:
        normed, x = fused.add_rms_norm(k, x, None, norm, 1e-5)
        q, key, value = fused.rope(k, (normed @ into.t()).view(5, 3, -1, d), cos, sin, n, g)
        mixed = (q * key + value).flatten(2) @ back.t()
        normed, x = fused.add_rms_norm(k, x, mixed, norm2, 1e-5)
        return x + fused.swiglu(k, torch.cat((normed, x), -1))

    grad = normal(5, 3, h, dtype=dtype)
    plain = layer(x, *weights)
    again = checkpoint(layer, x, *weights, use_reentrant=reentrant)
    assert torch.equal(plain, again)
    plain.backward(grad)
    expected = [t.grad for t in (x, *weights)]
    for t in (x, *weights):
        t.grad = None
    again.backward(grad)
    for t, before in zip((x, *weights), expected):
        assert t.grad is not None and torch.equal(t.grad, before)


def test_arguments_are_checked() -> None:
    """A wrong one would be read as raw memory."""
    k, x, weight = cpu.library(), torch.zeros(4, 6), torch.ones(6)
    rstd = torch.empty(4)
    good = [x, None, weight, 1e-5, torch.empty(4, 6), None, rstd]
    k.add_rms_norm_forward(*good)
    for place, wrong in (
        (0, torch.zeros(6, 4).t()),
        (0, x.double()),
        (0, x.to("meta")),
        (1, x),  # without a place for the sum
        (2, weight.bfloat16()),
        (2, torch.ones(5)),
        (4, torch.empty(4, 5)),
        (6, torch.empty(3)),
    ):
        with pytest.raises(AssertionError):
            k.add_rms_norm_forward(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(AssertionError):
        k.swiglu_forward(torch.zeros(4, 7), torch.zeros(4, 3))
    with pytest.raises(AssertionError):
        k.rope_forward(torch.zeros(2, 1, 3, 4), torch.zeros(2, 2), torch.zeros(2, 2), 4)
    with pytest.raises(AssertionError):
        k.row_statistics(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int32), Columns(0, 4))
    with pytest.raises(AssertionError):
        k.accumulate(torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16), True)


def test_attention_checks_its_arguments() -> None:
    k = cpu.attention_versions(torch.float32)[0]
    with pytest.raises(AssertionError, match="rise from 0 to 3"):
        k.attention_forward([0, 5], [0, 3], *attention_arguments())
    with pytest.raises(AssertionError, match="keys must rise from 0 to 3"):
        k.attention_forward([0, 3], [0, 5], *attention_arguments())
    with pytest.raises(AssertionError, match="not the same number"):
        k.attention_forward([0, 1, 3], [0, 3], *attention_arguments())
    with pytest.raises(AssertionError, match="document 1 has more queries than keys"):
        k.attention_forward([0, 1, 3], [0, 2, 3], *attention_arguments())
    with pytest.raises(AssertionError, match=r"expected torch.float32 .*found lse: torch.float64"):
        k.attention_forward([0, 3], [0, 3], *attention_arguments()[:4], torch.empty(1, 2, 3, dtype=torch.float64))
    with pytest.raises(AssertionError, match="2 heads do not divide into 0 groups"):
        q, k_, v, out, lse = attention_arguments()
        k.attention_forward([0, 3], [0, 3], q, k_[:, :, :0], v[:, :, :0], out, lse)


def attention_arguments() -> list[Tensor]:
    """q, k, v, out and lse of 3 rows, 2 heads in 1 group."""
    q, kv = torch.zeros(3, 1, 2, 8), torch.zeros(3, 1, 1, 8)
    return [q, kv, kv, torch.empty_like(q), torch.empty(1, 2, 3)]


def test_a_wrong_argument_is_named() -> None:
    k, x, weight = cpu.library(), torch.zeros(4, 6), torch.ones(6)
    with pytest.raises(AssertionError) as raised:
        k.add_rms_norm_forward(x, None, weight.bfloat16(), 1e-5, torch.empty(4, 6), None, torch.empty(4))
    found = "found weight: torch.bfloat16 (6), strides (1), on cpu"
    assert str(raised.value) == f"expected torch.float32 (6) on a CPU, contiguous, {found}"
    with pytest.raises(AssertionError, match=r"compute in float32 and bfloat16, found product: torch.float64 \(4, 3\)"):
        k.swiglu_forward(x.double(), x[:, :3].double())
    with pytest.raises(AssertionError, match="found weight: None"):
        k.add_rms_norm_forward(x, None, None, 1e-5, torch.empty(4, 6), None, torch.empty(4))
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        k.accumulate(x, [1.0], True)


def test_missing_or_outdated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.unavailable(torch.device("cpu")) == "" and cpu.COMPILED.INTERFACE == cpu.INTERFACE
    monkeypatch.setattr(cpu, "COMPILED", None)
    assert "is missing or outdated: reinstall" in cpu.unavailable(torch.device("cpu"))


def test_one_openmp_runtime() -> None:
    """Torch's: two would each start their threads, and spin for each other's cores."""
    code = "from megatron_hammer.kernels.native import cpu; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}) == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_sources_compile_without_warnings() -> None:
    options = ["-std=c++17", "-fsyntax-only", "-fopenmp", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
    for include in (pybind11.get_include(), sysconfig.get_paths()["include"]):
        options += ["-isystem", include]
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    done = subprocess.run(["g++", *options, *sources], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
