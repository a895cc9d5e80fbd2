"""Our attention for CPUs against torch's, which is computed in fp64: values, gradients, documents, threads, layouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_hammer.kernels import attention_cpu
from megatron_hammer.kernels.attention import Documents, causal_attention, each_document

CPU = torch.device("cpu")

# Rows, samples, heads, groups, head size: those of the CPU benchmark (shortened), the ends of blocks of 32, 128 and 256
# rows and one past them, heads that fill no block of 32, no groups, one group, one row.
SHAPES = [
    (256, 2, 8, 2, 32),
    (512, 1, 4, 2, 64),
    (129, 2, 4, 1, 64),
    (257, 1, 4, 4, 40),
    (31, 3, 6, 3, 128),
    (700, 1, 2, 1, 8),
    (1, 3, 4, 2, 64),
]
# bf16 keeps 8 bits: probabilities and their gradients are rounded once before the products, the results once more.
ERRORS = {torch.float32: 3e-6, torch.bfloat16: 8e-3}

needs = {
    dtype: pytest.mark.skipif(bool(attention_cpu.obstacle(dtype)), reason=attention_cpu.obstacle(dtype) or "can run")
    for dtype in ERRORS
}
DTYPES = [pytest.param(dtype, marks=needs[dtype], id=str(dtype).removeprefix("torch.")) for dtype in ERRORS]


def tensors(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as slices of one projection, and a gradient of the result; fresh numbers, their seed printed."""
    print("seed", seed := torch.seed())
    generator = torch.Generator().manual_seed(seed)
    s, b, n, g, d = shape
    q, k, v = torch.randn(s, b, n + 2 * g, d, generator=generator).to(dtype).split((n, g, g), dim=2)
    return [2 * q, k, v, torch.randn(s, b, n, d, generator=generator).to(dtype)]


def with_gradients(function: object, inputs: Sequence[Tensor], *documents: Documents) -> list[Tensor]:
    """The result and the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    assert callable(function)
    out = function(*leaves, *documents)
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3])]


def assert_near(ours: Sequence[Tensor], truth: Sequence[Tensor], bound: float) -> None:
    """Norm of the difference within a share of the norm, or of half that of the gradients together if larger.

    In a sample of one row the gradients of q and k are 0, and rounding is all that remains of them.
    """
    whole = sum(x.square().sum() for x in truth[1:]).sqrt()
    for name, x, y in zip(("out", "grad q", "grad k", "grad v"), ours, truth, strict=True):
        error = (x.double() - y).norm() / max(y.norm(), 0.5 * whole)
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: Sequence[int], dtype: torch.dtype) -> None:
    inputs = tensors(shape, dtype)
    truth = with_gradients(causal_attention, [x.double() for x in inputs])
    assert_near(with_gradients(attention_cpu.attention, inputs), truth, ERRORS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_documents(dtype: torch.dtype) -> None:
    """Each document attends to itself alone, whatever its length."""
    lengths = (1, 40, 32, 2, 300, 129)
    documents = Documents.from_cu_seqlens(np.cumsum([0, *lengths]).astype(np.int32), CPU)
    inputs = tensors((sum(lengths), 1, 4, 2, 48), dtype)
    truth = with_gradients(each_document, [x.double() for x in inputs], documents)
    assert_near(with_gradients(attention_cpu.attention, inputs, documents), truth, ERRORS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_result_depends_on_threads_or_strides(dtype: torch.dtype) -> None:
    """Equal bits from one and three threads, from slices, contiguous copies and tensors that are laid out otherwise."""
    inputs = tensors((150, 2, 6, 3, 64), dtype)
    expected = with_gradients(attention_cpu.attention, inputs)
    layouts = [[x.contiguous() for x in inputs], [x.mT.contiguous().mT for x in inputs]]
    results = [with_gradients(attention_cpu.attention, layout) for layout in layouts]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        results.append(with_gradients(attention_cpu.attention, inputs))
    finally:
        torch.set_num_threads(before)
    for result in results:
        for x, y in zip(result, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_later_rows_are_not_seen(dtype: torch.dtype) -> None:
    """What comes later changes no bit of a row, not even where it is not finite; what is seen and NaN shows."""
    q, k, v, _ = tensors((200, 1, 4, 2, 32), dtype)
    expected = attention_cpu.attention(q, k, v)
    k, v = k.clone(), v.clone()
    k[130:] = 1e4
    v[130:] = 1e4
    k[190] = torch.nan
    result = attention_cpu.attention(q, k, v)
    assert torch.equal(result[:130], expected[:130]) and not torch.equal(result[131:], expected[131:])
    assert result[:190].isfinite().all() and result[190:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype: torch.dtype) -> None:
    """Where one key takes all of the weight, errors are those of torch, or of its size: scores reach 2000, so that the
    last bit of their logarithmic sum is 1e-4, and a row's whole error is a few roundings of it."""
    q, k, v, grad = tensors((300, 1, 2, 1, 64), dtype)
    inputs = [100 * q, k, v, grad]
    truth = with_gradients(causal_attention, [x.double() for x in inputs])
    ours, torchs = (with_gradients(f, inputs) for f in (attention_cpu.attention, causal_attention))
    for x, y, z in zip(ours, torchs, truth, strict=True):
        assert (x.double() - z).norm() < 5 * (y.double() - z).norm() + 1e-6 * z.norm()


def test_dtypes_that_it_leaves_to_torch() -> None:
    for dtype in (torch.float64, torch.float16):
        assert "does not compute in" in attention_cpu.obstacle(dtype)
