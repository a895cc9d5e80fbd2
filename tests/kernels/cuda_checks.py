"""Checks of the operations in ``csrc/kernels`` against torch, on whatever device they run.

``test_cuda_sources.py`` runs them on a CPU, where the very kernel sources are emulated; ``test_fused_gpu.py`` on a GPU.
Each takes the namespace of operations, the device and a seed, and is sized for an emulator.

References compute in fp64 from the same rounded inputs. An element may then differ by the roundings to its own type,
half a unit each (``roundings``), and by fp32's in between, relative to the largest value (``noise``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.adamw import adamw_
from megatron_hammer.kernels.argument_types import AdamWState
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.norm import add_rms_norm
from megatron_hammer.kernels.rope import rope
from megatron_hammer.kernels.swiglu import swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOISE = 4e-6  # about 30 units of fp32: a sum of some thousand terms in another order
MARGIN = 64  # bytes around every array
GARBAGE = 0xFF  # NaN in every type: what is read outside shows in results, what is not written too


@dataclass
class Memory:
    """Arrays between margins, on addresses that are aligned for vectors or not."""

    device: torch.device
    generator: torch.Generator
    buffers: list[tuple[Tensor, int, int]] = field(default_factory=list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Contiguous garbage, ``offset`` elements after an aligned address."""
        count = torch.Size(shape).numel() * dtype.itemsize
        start = MARGIN + offset * dtype.itemsize
        buffer = torch.full((start + count + MARGIN,), GARBAGE, dtype=torch.uint8, device=self.device)
        assert buffer.data_ptr() % 16 == 0
        self.buffers.append((buffer, start, start + count))
        return buffer[start : start + count].view(dtype).view(shape)

    def put(self, value: Tensor, dtype: torch.dtype | None = None, offset: int = 0) -> Tensor:
        """A copy of a tensor."""
        return self.empty(value.shape, dtype or value.dtype, offset).copy_(value)

    def random(self, shape: Sequence[int], dtype: torch.dtype, offset: int = 0, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(torch.Size(shape), generator=self.generator, dtype=torch.float64) * scale
        return self.put(drawn, dtype, offset)

    def check(self) -> None:
        """Nothing outside the arrays was written."""
        for buffer, start, stop in self.buffers:
            assert bool((buffer[:start] == GARBAGE).all()), "written before the start of an array"
            assert bool((buffer[stop:] == GARBAGE).all()), "written after the end of an array"


def memory(device: torch.device, seed: int) -> Memory:
    return Memory(device, torch.Generator().manual_seed(seed))


def near(actual: Tensor, expected: Tensor, roundings: float = 1, noise: float = NOISE, scale: Any = None) -> None:
    """Elementwise: half a unit of the type for every rounding, and fp32's noise relative to the largest value of a row.

    Args:
        scale: what the noise is relative to, where that is not the largest expected value.
    """
    info = torch.finfo(actual.dtype)
    expected = expected.to(torch.float64)
    size = expected.abs()
    if scale is None and size.numel():
        scale = size.amax(-1, keepdim=True) if size.dim() else size
    bound = roundings * 0.5 * info.eps * (size + info.smallest_normal) + noise * (0.0 if scale is None else scale)
    bound = bound + 1e-36  # exp(-x) overflows in fp32 below x = -88.7, where silu is above -3e-37
    error = (actual.to(torch.float64) - expected).abs()
    wrong = ~(error <= bound)  # NaN is wrong too
    if bool(wrong.any()):
        worst = float((error / bound).nan_to_num(nan=float("inf")).max())
        pytest.fail(f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, the worst by {worst:.3g} bounds")


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def largest(output: Tensor) -> Tensor:
    return output.abs().max().float()


def gradients(function: Callable[..., Any], inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of the inputs in fp64, for these gradients of the outputs."""
    wide = [x.double().requires_grad_() for x in inputs]
    outputs = function(*wide)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.autograd.grad(outputs, wide, [g.double() for g in grads])


# ---- residual add and RMSNorm ----


def norm(
    k: Any, device: torch.device, dtype: torch.dtype, rows: int, h: int, updated: bool, offset: int, seed: int
) -> None:
    """Forward and backward; the sum is exact, the norm rounds twice, its gradients once."""
    m = memory(device, seed)
    x, weight = m.random((rows, h), dtype, offset), m.random((h,), dtype, offset)
    branch = m.random((rows, h), dtype, offset) if updated else None
    normed, rstd = m.empty((rows, h), dtype, offset), m.empty((rows,), torch.float32)
    summed = m.empty((rows, h), dtype, offset) if updated else None
    amax = m.empty((), torch.float32)
    k.add_rms_norm_forward(x, branch, weight, 1e-5, normed, summed, rstd, amax)
    again, without = m.empty((rows, h), dtype, offset), m.empty((rows,), torch.float32)
    k.add_rms_norm_forward(x, branch, weight, 1e-5, again, summed, without)
    assert same(normed, again) and same(rstd, without), "twice the same, with amax and without"

    residual = x if summed is None else summed
    if branch is not None:
        assert same(residual, x + branch), "the sum is rounded to the type first"
    expected, _ = add_rms_norm(residual.double(), None, weight.double(), 1e-5)
    near(normed, expected, roundings=2.02)
    near(rstd, torch.rsqrt(residual.double().square().mean(-1) + 1e-5), roundings=4, noise=1e-6)
    assert torch.equal(amax, largest(normed))

    grad_normed = m.random((rows, h), dtype, offset)
    for through in (m.random((rows, h), dtype, offset), None):
        grads = [grad_normed, torch.zeros_like(x) if through is None else through]
        results = [(m.empty((rows, h), dtype, offset), m.empty((h,), dtype)) for _ in range(2)]
        for grad_x, grad_weight in results:
            k.add_rms_norm_backward(grad_normed, through, residual, weight, rstd, grad_x, grad_weight)
        (grad_x, grad_weight), twice = results
        assert same(grad_x, twice[0]) and same(grad_weight, twice[1]), "deterministic"
        expected_x, expected_weight = gradients(lambda x, w: add_rms_norm(x, None, w, 1e-5), (residual, weight), grads)
        parts = (grad_normed.double() * weight.double() * rstd.double()[:, None]).abs() + grads[1].double().abs()
        near(grad_x, expected_x, scale=parts.amax(-1, keepdim=True))  # its terms may cancel
        terms = (grad_normed.double() * residual.double() * rstd.double()[:, None]).abs().sum(0)  # each rounded once
        rounding = 0.5 * torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
        near(grad_weight, expected_weight, scale=terms, noise=NOISE + rounding)
    m.check()


# ---- RoPE ----


def turns(m: Memory, s: int, half: int, dtype: torch.dtype, offset: int) -> tuple[Tensor, Tensor]:
    angle = m.random((s, half), torch.float64, scale=3.0)
    return m.put(angle.cos(), dtype, offset), m.put(angle.sin(), dtype, offset)


def rope_forward(
    k: Any, device: torch.device, dtype: torch.dtype, s: int, b: int, heads: int, groups: int, d: int, offset: int,
    seed: int,
) -> None:  # fmt: skip
    """In place; values keep their bits."""
    m = memory(device, seed)
    qkv = m.random((s, b, heads + 2 * groups, d), dtype, offset)
    cos, sin = turns(m, s, d // 2, dtype, offset)
    before = qkv.clone()
    k.rope_forward(qkv, cos, sin, heads + groups)
    angle = [x.double().view(s, 1, 1, d // 2) for x in (cos, sin)]
    near(qkv, torch.cat(rope(before.double(), *angle, heads, groups), dim=2), noise=1e-6)
    assert same(qkv[:, :, heads + groups :], before[:, :, heads + groups :])
    m.check()


def rope_backward(
    k: Any, device: torch.device, dtype: torch.dtype, s: int, b: int, heads: int, groups: int, d: int, offset: int,
    layout: str, seed: int,
) -> None:  # fmt: skip
    """Gradients as attention leaves them: contiguous, [b, heads, s, d] in memory, one for all, or parts of rows."""
    m = memory(device, seed)

    def grad(count: int) -> Tensor:
        if layout == "transposed":
            return m.random((b, count, s, d), dtype, offset).permute(2, 0, 1, 3)
        if layout == "expanded":
            return m.random((1, 1, 1, d), dtype, offset).expand(s, b, count, d)
        if layout == "parts":  # rows are an odd number of elements apart
            return m.random((s, b, count, d + 3), dtype, offset)[..., 1 : d + 1]
        if layout == "gaps":  # so are these, but the first is aligned
            return m.random((s, b, count, d + 3), dtype, offset)[..., :d]
        return m.random((s, b, count, d), dtype, offset)

    grads = [grad(heads), grad(groups), grad(groups)]
    cos, sin = turns(m, s, d // 2, dtype, offset)
    angle = [x.double().view(s, 1, 1, d // 2) for x in (cos, sin)]
    out = m.empty((s, b, heads + 2 * groups, d), dtype, offset)
    k.rope_backward(*grads, cos, sin, out)
    (expected,) = gradients(lambda qkv: rope(qkv, *angle, heads, groups), [out.nan_to_num()], grads)
    near(out, expected, noise=1e-6)
    assert same(out[:, :, heads + groups :], grads[2]), "values are copied"
    m.check()


# ---- SwiGLU ----


def swiglu_both(k: Any, device: torch.device, dtype: torch.dtype, rows: int, f: int, offset: int, seed: int) -> None:
    """Forward and backward, and gates so large that the sigmoid is 0 or 1."""
    m = memory(device, seed)
    gate_up = m.random((rows, 2 * f), dtype, offset)
    gate_up[0, :f] *= 30 if dtype == torch.float16 else 100
    product, again = m.empty((rows, f), dtype, offset), m.empty((rows, f), dtype, offset)
    amax = m.empty((), torch.float32)
    k.swiglu_forward(gate_up, product, amax)
    k.swiglu_forward(gate_up, again)
    assert same(product, again) and torch.equal(amax, largest(product))
    near(product, swiglu(gate_up.double()))
    grad, out = m.random((rows, f), dtype, offset), m.empty((rows, 2 * f), dtype, offset)
    k.swiglu_backward(grad, gate_up, out)
    near(out, *gradients(swiglu, [gate_up], [grad]))
    m.check()


# ---- AdamW and the norm before it ----


def adamw(
    k: Any, device: torch.device, param_dtype: torch.dtype | None, n: int, offsets: Sequence[int], seed: int
) -> None:
    """Four steps as torch's fused AdamW makes them, the third skipped; ``offsets`` of the five arrays."""
    m = memory(device, seed)
    config = OptimizerConfig(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    lr, divisor = 3e-3, torch.tensor(1.7, device=device)
    arrays = [m.put(torch.zeros(n), torch.float32, offset) for offset in offsets[:4]]
    arrays[0].copy_(torch.randn(n, generator=m.generator))
    param = None if param_dtype is None else m.put(torch.zeros(n), param_dtype, offsets[4])
    reference = AdamWState(*(x.clone() for x in arrays), True, None if param is None else param.clone())
    updates = torch.zeros((), device=device)
    for step in range(4):
        skip = torch.tensor(float(step == 2), device=device)
        arrays[1].copy_(torch.randn(n, generator=m.generator) * 10 ** (step - 2))
        reference.grad.copy_(arrays[1])
        before = [x.clone() for x in (*arrays, param) if x is not None]
        k.adamw(*arrays, param, lr, config.beta1, config.beta2, config.eps, config.weight_decay, divisor, skip, updates)
        adamw_([reference], updates, lr, config, divisor, skip)
        if step == 2:
            now = [x for x in (*arrays, param) if x is not None]
            assert all(same(a, b) for a, b in zip(now, before, strict=True)), "skipped: nothing changes"
        assert same(arrays[1], before[1]), "the gradient is only read"
        pairs = ((arrays[0], reference.weight), (arrays[2], reference.exp_avg), (arrays[3], reference.exp_avg_sq))
        for mine, torchs in pairs:  # the reference is fp32 too: both round, in some other order
            near(mine, torchs, roundings=8, noise=2e-7)
        assert float(updates) == (1, 2, 2, 3)[step], "updates is left to the caller"
        if param is not None:
            assert same(param, arrays[0].to(param.dtype))
    m.check()


def square_sum(k: Any, device: torch.device, n: int, offset: int, seed: int) -> None:
    m = memory(device, seed)
    part = m.random((n,), torch.float32, offset)
    outs = [m.put(torch.tensor(0.5)) for _ in range(2)]
    for out in outs:
        k.add_square_sum(part, out)
    near(outs[0], 0.5 + part.double().square().sum(), roundings=2, noise=2e-7)
    assert same(*outs)
    m.check()


# ---- fp8 ----


def amax(k: Any, device: torch.device, dtype: torch.dtype, n: int, offset: int, seed: int) -> None:
    m = memory(device, seed)
    x, out = m.random((n,), dtype, offset), m.empty((), torch.float32)
    k.amax(x, out)
    assert torch.equal(out, largest(x) if n else torch.zeros((), device=device))
    for value in (-1e4, float("-inf"), float("nan")):
        if n:
            x[n // 2] = value
            k.amax(x, out)
            assert torch.equal(out.nan_to_num(7e7), largest(x).nan_to_num(7e7))
    m.check()


def cast_fp8(
    k: Any, device: torch.device, dtype: torch.dtype, to: torch.dtype, rows: int, columns: int, offset: int,
    both: bool, seed: int,
) -> None:  # fmt: skip
    """Equal bits with torch's cast of the clamped product, subnormal numbers, the largest and NaN included."""
    m = memory(device, seed)
    x = m.random((rows, columns), dtype, offset)
    x *= torch.exp2(torch.randint(-14, 12, x.shape, generator=m.generator)).to(device)
    scale = m.put(torch.tensor(3.7))
    out, transposed = m.empty((rows, columns), to, offset), m.empty((columns, rows), to, offset)
    for special in ((1e4, -1e4, 0.0), (float("inf"), float("-inf"), float("nan"))):
        for i, value in enumerate(special):
            x.view(-1)[i * 5 % x.numel()] = value
        k.cast_fp8(x, scale, out, transposed if both else None)
        bound = torch.finfo(to).max
        expected = (x.float() * scale).clamp(-bound, bound).to(to)
        numbers = ~expected.float().isnan()
        assert torch.equal(out.float().isnan(), ~numbers)
        assert torch.equal(out.view(torch.uint8)[numbers], expected.view(torch.uint8)[numbers])
        if both:
            assert same(transposed, out.t())
    m.check()


# ---- in a model ----


def through_autograd(k: Any, device: torch.device, dtype: torch.dtype, seed: int) -> None:
    """Through ``autograd.py``: outputs and gradients of the three operations, in a model's shapes."""
    m = memory(device, seed)
    s, b, n, g, d, h = 5, 2, 4, 2, 16, 64
    angle = [x.view(s, 1, 1, d // 2) for x in turns(m, s, d // 2, dtype, 0)]
    x, weight = m.random((s, b, h), dtype), m.random((h,), dtype)
    qkv, gate_up = m.random((s, b, n + 2 * g, d), dtype), m.random((s, b, 48), dtype)
    turn = [x.double() for x in angle]
    for mine, reference, inputs in (
        (lambda *t: fused.add_rms_norm(k, *t, 1e-5), lambda *t: add_rms_norm(*t, 1e-5), (x, x.flip(0), weight)),
        (lambda x, w: fused.add_rms_norm(k, x, None, w, 1), lambda x, w: add_rms_norm(x, None, w, 1), (x, weight)),
        (lambda t: fused.rope(k, t, *angle, n, g), lambda t: rope(t, *turn, n, g), (qkv,)),
        (lambda t: (fused.swiglu(k, t),), lambda t: (swiglu(t),), (gate_up,)),
    ):  # fmt: skip
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        outputs = mine(*leaves)
        grads = [m.random(out.shape, dtype) for out in outputs]
        for got, expected in zip(outputs, reference(*(t.double() for t in inputs)), strict=True):
            near(got, expected, roundings=4.02)  # the norm: of the sum, of the norm and of its product
        found = torch.autograd.grad(outputs, leaves, grads)
        for got, expected in zip(found, gradients(reference, inputs, grads), strict=True):
            near(got, expected, roundings=2, noise=2 * torch.finfo(dtype).eps)  # of the sum, whose parts may cancel
    m.check()


# ---- arguments ----


def refuses(k: Any, device: torch.device) -> None:
    """What the operations do not take, and what they say."""
    x, w, r = (torch.zeros(shape, device=device) for shape in ((4, 8), (8,), (4,)))
    one, half = torch.ones((), device=device), torch.zeros(4, 8, device=device, dtype=torch.bfloat16)
    qkv, angle = torch.zeros(4, 1, 4, 8, device=device), torch.zeros(4, 4, device=device)
    q, kv = qkv[:, :, :2], qkv[:, :, :1]
    eight = torch.zeros(4, 8, device=device).to(torch.float8_e4m3fn)
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("x must have rows of 8", lambda: k.add_rms_norm_forward(x[:, :4], None, w, 1e-5, x, None, r)),
        ("x must be contiguous", lambda: k.add_rms_norm_forward(x.expand(2, 4, 8), None, w, 1e-5, x, None, r)),
        ("normed must be Float, not BFloat16", lambda: k.add_rms_norm_forward(x, None, w, 1e-5, half, None, r)),
        ("rstd must have 4 elements, not 8", lambda: k.add_rms_norm_forward(x, None, w, 1e-5, x, None, w)),
        ("summed is written where", lambda: k.add_rms_norm_forward(x, x, w, 1e-5, x, None, r)),
        ("summed is written where", lambda: k.add_rms_norm_forward(x, None, w, 1e-5, x, x, r)),
        ("amax must be Float", lambda: k.add_rms_norm_forward(x, None, w, 1e-5, x, None, r, one.double())),
        ("x must be float32, bf", lambda: k.add_rms_norm_forward(x.double(), None, w, 1e-5, x, None, r)),
        ("grad_weight must have 8", lambda: k.add_rms_norm_backward(x, None, x, w, r, x.clone(), r)),
        ("grad_summed must be Float", lambda: k.add_rms_norm_backward(x, half, x, w, r, x.clone(), w.clone())),
        ("turned must be between", lambda: k.rope_forward(qkv, angle, angle, 5)),
        ("cos must have 16", lambda: k.rope_forward(qkv, angle[:2], angle, 4)),
        ("must be .s, b, heads, d. with an even d", lambda: k.rope_forward(qkv[..., :7], angle, angle, 4)),
        ("grad_qkv must have the heads", lambda: k.rope_backward(q, kv, q, angle, angle, qkv)),
        ("grad_q must be contiguous in d", lambda: k.rope_backward(q.mT.contiguous().mT, kv, kv, angle, angle, qkv)),
        ("grad_k must have grad_qkv's type", lambda: k.rope_backward(q, kv.double(), kv, angle, angle, qkv)),
        ("gate_up must have rows of 16", lambda: k.swiglu_forward(x, x)),
        ("grad_gate_up must have 32", lambda: k.swiglu_backward(x[:, :4].contiguous(), x, x[0].clone())),
        ("exp_avg must be Float", lambda: k.adamw(x, x, half, x, None, 0, 0, 0, 0, 0, one, one, one)),
        ("param must be bfloat16 or", lambda: k.adamw(x, x, x, x, x.double(), 0, 0, 0, 0, 0, one, one, one)),
        ("skip must have 1 elements", lambda: k.adamw(x, x, x, x, None, 0, 0, 0, 0, 0, one, r, one)),
        ("part must be Float", lambda: k.add_square_sum(half, one)),
        ("out must have 1 elements", lambda: k.amax(half, r)),
        ("out must be float8", lambda: k.cast_fp8(x, one, x)),
        ("transposed must be Float8_e4m3fn", lambda: k.cast_fp8(x, one, eight, eight.to(torch.float8_e5m2))),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
