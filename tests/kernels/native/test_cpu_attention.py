"""Our attention for CPUs against torch's, which is computed in fp64: values, gradients, documents, threads, layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.kernels.attention import causal_attention, each_document
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.packed_sequences import PackedSequences
from tests.kernels.spans import spans

CPU = torch.device("cpu")

# Rows, samples, heads, groups, head size: those of the CPU benchmark (shortened), the ends of blocks of 32, 128 and 256
# rows and one past them, heads that fill no block of 32, no groups, one group.
SHAPES = [
    (256, 2, 8, 2, 32),
    (512, 1, 4, 2, 64),
    (129, 2, 4, 1, 64),
    (257, 1, 4, 4, 40),
    (31, 3, 6, 3, 128),
    (700, 1, 2, 1, 8),
]
# Norm of the error as a share of the norm. bf16: rounding costs at most 2^-8 of a number, 1.7e-3 in the mean square,
# and a gradient of q or k has three in a row (the result in delta, dS, the gradient): 5e-3 if all went one way, 4.1e-3
# is the most that was seen. fp32: products of q and k reach 110, half of whose last bit, times d^-0.5, moves an
# exponent by 5e-7; scores, lse and 2^x have such errors in the forward and in the backward pass: six. 1.1e-6 is the
# most that was seen.
ERRORS = {torch.float32: 3e-6, torch.bfloat16: 5e-3}

# Every version that this machine can run, in each of its types.
VERSIONS = [
    pytest.param(version, dtype, id=f"{version.name}-{str(dtype).removeprefix('torch.')}")
    for dtype in ERRORS
    if not cpu.attention_unsupported(dtype)
    for version in cpu.attention_versions(dtype)
]
pytestmark = pytest.mark.skipif(bool(why := cpu.unavailable(CPU)), reason=why or "can run")
each_version = pytest.mark.parametrize(("version", "dtype"), VERSIONS)


def by(version: Any) -> Callable[..., Tensor]:
    """Attention by the kernels of one instruction set."""
    return partial(fused.attention, kernels=version)


def tensors(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as slices of one projection, and a gradient of the result; fresh numbers, their seed printed."""
    print("seed", seed := torch.seed())
    generator = torch.Generator().manual_seed(seed)
    s, b, n, g, d = shape
    q, k, v = torch.randn(s, b, n + 2 * g, d, generator=generator).to(dtype).split((n, g, g), dim=2)
    return [2 * q, k, v, torch.randn(s, b, n, d, generator=generator).to(dtype)]


def with_gradients(function: object, inputs: Sequence[Tensor], *documents: PackedSequences) -> list[Tensor]:
    """The result and the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    assert callable(function)
    out = function(*leaves, *documents)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def assert_near(ours: Sequence[Tensor], truth: Sequence[Tensor], bound: float, known: Sequence[Tensor] = ()) -> None:
    """Norm of the difference within a share of the norm, plus the norm of an error that is known and not a mistake."""
    for i, (x, y) in enumerate(zip(ours, truth, strict=True)):
        error, allowed = (x.double() - y).norm(), bound * y.norm() + (known[i].norm() if known else 0)
        assert error <= allowed, f"{('out', 'grad q', 'grad k', 'grad v')[i]}: {error:.1e}, allowed {allowed:.1e}"


@each_version
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: Sequence[int], dtype: torch.dtype, version: Any) -> None:
    inputs = tensors(shape, dtype)
    truth = with_gradients(causal_attention, [x.double() for x in inputs])
    assert_near(with_gradients(by(version), inputs), truth, ERRORS[dtype])


@each_version
def test_documents(dtype: torch.dtype, version: Any) -> None:
    """Each document attends to itself alone, whatever its length."""
    lengths = (1, 40, 32, 2, 300, 129)
    documents = PackedSequences.from_cu_seqlens(np.cumsum([0, *lengths]).astype(np.int32), CPU)
    inputs = tensors((sum(lengths), 1, 4, 2, 48), dtype)
    truth = with_gradients(each_document, [x.double() for x in inputs], documents)
    assert_near(with_gradients(by(version), inputs, documents), truth, ERRORS[dtype])


@each_version
def test_fewer_queries_than_keys(dtype: torch.dtype, version: Any) -> None:
    """The queries are the end of the keys: offsets within, at and over the ends of blocks of 32, 128 and 256 rows."""
    documents = spans([(1, 1), (1, 300), (40, 41), (32, 64), (129, 130), (5, 37), (257, 520), (31, 31), (64, 200)])
    q, _, _, grad = tensors((sum(documents.lengths), 1, 4, 2, 40), dtype)
    _, k, v, _ = tensors((sum(documents.key_lengths), 1, 4, 2, 40), dtype)
    inputs = [q, k, v, grad]
    truth = with_gradients(each_document, [x.double() for x in inputs], documents)
    assert_near(with_gradients(by(version), inputs, documents), truth, ERRORS[dtype])


@each_version
def test_no_result_depends_on_threads_or_strides(dtype: torch.dtype, version: Any) -> None:
    """Equal bits from one and three threads, from slices, contiguous copies and tensors that are laid out otherwise."""
    inputs = tensors((150, 2, 6, 3, 64), dtype)
    expected = with_gradients(by(version), inputs)
    layouts = [[x.contiguous() for x in inputs], [x.mT.contiguous().mT for x in inputs]]
    results = [with_gradients(by(version), layout) for layout in layouts]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        results.append(with_gradients(by(version), inputs))
    finally:
        torch.set_num_threads(before)
    for result in results:
        for x, y in zip(result, expected, strict=True):
            assert torch.equal(x, y)


@each_version
def test_later_rows_are_not_seen(dtype: torch.dtype, version: Any) -> None:
    """What comes later changes no bit of a row, not even where it is not finite; what is seen and NaN shows."""
    q, k, v, _ = tensors((200, 1, 4, 2, 32), dtype)
    expected = by(version)(q, k, v)
    k, v = k.clone(), v.clone()
    k[130:] = 1e4
    v[130:] = 1e4
    k[190] = torch.nan
    result = by(version)(q, k, v)
    assert torch.equal(result[:130], expected[:130]) and not torch.equal(result[131:], expected[131:])
    assert result[:190].isfinite().all() and result[190:].isnan().all()


@each_version
def test_first_rows(dtype: torch.dtype, version: Any) -> None:
    """The first row of a document sees itself alone: nothing that q and k could change, so their gradients are 0, in
    bits. delta, from a rounded result, would leave rounding in their place."""
    documents = PackedSequences.from_cu_seqlens(np.array([0, 1, 2, 42, 43, 300], np.int32), CPU)
    alone, first = [0, 1, 42], [0, 1, 2, 42, 43]
    inputs = q, _, v, grad = tensors((300, 2, 4, 2, 64), dtype)
    out, grad_q, grad_k, grad_v = with_gradients(by(version), inputs, documents)
    ours = [out[first], grad_q[first], grad_k[alone], grad_v[alone]]
    heads = grad[alone].double().unflatten(2, (2, 2)).sum(3)  # a head of k and v serves two of q
    truth = [v[first].double().repeat_interleave(2, dim=2), 0 * q[first].double(), 0 * heads, heads]
    assert_near(ours, truth, ERRORS[dtype])
    assert grad_q[3:42].any(dim=-1).all()


def known_errors(inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the two numbers that the forward pass stores lose by rounding, as errors of its result and of the gradients.

    A row's lse, in the unit of the scores S, that is larger by e makes its probabilities smaller by scale e, as if its
    gradient were. Its result, rounded by r, moves delta by dO r and dS by -P dO r, and P is the gradient of scale lse.
    """
    dtype, scale = inputs[0].dtype, inputs[0].shape[3] ** -0.5
    q, k, v, grad = (x.double() for x in inputs)
    q, k = q.requires_grad_(), k.requires_grad_()
    scores = torch.einsum("ibnd,jbnd->bnij", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
    hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
    lse = (scores.masked_fill(hidden, -torch.inf) * scale).logsumexp(3).permute(2, 0, 1)[..., None] / scale
    rounding = (lse.float() - lse).detach()
    out, *from_lse = with_gradients(causal_attention, (q, k, v, -scale * rounding * grad))
    from_out = torch.autograd.grad((-scale * (grad * (out.to(dtype) - out)).sum(3, keepdim=True) * lse).sum(), (q, k))
    return [torch.zeros_like(out), from_lse[0] + from_out[0], from_lse[1] + from_out[1], from_lse[2]]


@each_version
def test_large_scores(dtype: torch.dtype, version: Any) -> None:
    """Scores reach 1000, so that one key takes most rows' weight. In fp32 their last bit alone would be a large error,
    but q and k are whole numbers, so that their products are exact in any order, and what remains is known: of a row
    with one key nothing, of the others half a last bit of lse."""
    *qk, v, grad = tensors((300, 2, 2, 1, 64), dtype)
    inputs = [(25 * qk[0]).round(), (4 * qk[1]).round(), v, grad]
    truth = with_gradients(causal_attention, [x.double() for x in inputs])
    assert_near(with_gradients(by(version), inputs), truth, ERRORS[dtype], known_errors(inputs))


def test_dtypes_that_it_leaves_to_torch() -> None:
    for dtype in (torch.float64, torch.float16):
        assert "does not compute in" in cpu.attention_unsupported(dtype)


@pytest.mark.parametrize("dtype", ERRORS)
def test_every_instruction_set_that_the_processor_names_has_a_version(dtype: torch.dtype) -> None:
    """Each has its own; AMX multiplies bf16 only, and takes Linux's permission besides."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()) if Path("/proc/cpuinfo").exists() else set()
    if not {"avx2", "fma"} <= flags:
        pytest.skip("this processor has no instructions of which /proc/cpuinfo and our versions both know")
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    expected = [
        *(["avx512_bf16"] if wide and "avx512_bf16" in flags else []),
        *(["avx512"] if wide else []),
        "avx2",
        "portable",
    ]
    names = [version.name for version in cpu.attention_versions(dtype)]
    assert [name for name in names if name != "amx"] == expected
