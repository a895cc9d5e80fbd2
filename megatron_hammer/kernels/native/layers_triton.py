"""Norm, RoPE and SwiGLU in Triton: twins of ``csrc/kernels`` for a GPU where nvcc did not build those.

The functions below the kernels have the names and arguments of ``LayerKernels`` (``autograd.py``), and round where the
CUDA sources do: arithmetic in fp32, each result once, and T(s r) of the norm before its weight, as in Hugging Face.

A program takes whole rows, so that a row stays in registers between its reduction and its use. Memory, in units of the
rows: norm forward 4 (2 without a branch), backward 4 (3); RoPE the turned heads twice, backward all heads twice; SwiGLU
3 halves and 5 halves. The norm's backward has few programs that stay, each with its own sum for the weight's gradient:
two such rows of fp32 a multiprocessor and 4 programs on it are 3 % of the traffic at 16,384 rows.

Sums go in a fixed order: the same bits from run to run on one kind of GPU. Proved in Triton's interpreter against the
checks of the CUDA kernels and by compiling for sm_80 and sm_90; **not yet run on a GPU**, so its speed is not known.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hammer.kernels.native.triton_rows import multiprocessors, on_its_gpu

try:
    import triton
    import triton.language as tl
except ImportError:  # then nobody calls what follows: the backend is unavailable
    triton = None

PROGRAMS = 4  # of the norm's backward on a multiprocessor: chosen by eye, for about 40 KB in flight
PAIRS = 512  # that RoPE turns at a time: 16 bytes of each half for 64 threads
COLUMNS = 1024  # of a program of SwiGLU: 16 bytes for each of 128 threads

if triton is not None:

    @triton.jit
    def norm_forward(
        x,  # [rows, h]
        branch,  # the same; not read without HAS_BRANCH, nor summed written
        weight,  # [h]
        normed,
        summed,
        rstd,  # [rows] fp32
        eps,
        inverse_h,
        h,
        HAS_BRANCH: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """A row: its sum, and its normalised form."""
        row = tl.program_id(0)
        start = row.to(tl.int64) * h
        column = tl.arange(0, BLOCK)
        inside = column < h
        dtype = x.dtype.element_ty
        value = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            other = tl.load(branch + start + column, mask=inside, other=0.0).to(tl.float32)
            rounded = (value + other).to(dtype)
            tl.store(summed + start + column, rounded, mask=inside)
            value = rounded.to(tl.float32)
        r = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) * inverse_h + eps)
        tl.store(rstd + row, r)
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + start + column, (w * (value * r).to(dtype).to(tl.float32)).to(dtype), mask=inside)

    @triton.jit
    def norm_backward(
        grad_normed,  # [rows, h]
        grad_summed,  # the same; not read without HAS_SUMMED
        summed,
        weight,  # [h]
        rstd,  # [rows] fp32
        grad_x,
        partial,  # [programs, h] fp32: what each program adds to the weight's gradient
        rows,
        inverse_h,
        h,
        HAS_SUMMED: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Every so-manieth row; its gradient, and the sum of what the weight has of all of them."""
        program = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        inside = column < h
        dtype = summed.dtype.element_ty
        w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        of_weight = tl.zeros((BLOCK,), tl.float32)
        for row in range(program, rows, tl.num_programs(0)):
            start = tl.cast(row, tl.int64) * h
            grad = tl.load(grad_normed + start + column, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(summed + start + column, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(rstd + row)
            scaled = value * r
            of_weight += grad * scaled.to(dtype).to(tl.float32)
            grad *= w
            result = r * (grad - scaled * (tl.sum(grad * scaled, 0) * inverse_h))
            if HAS_SUMMED:
                result += tl.load(grad_summed + start + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x + start + column, result.to(dtype), mask=inside)
        tl.store(partial + program.to(tl.int64) * h + column, of_weight, mask=inside)

    @triton.jit
    def _turn_heads(
        source, source_stride, target, target_stride, cos, sin, heads, half,
        BACK: tl.constexpr, HEADS: tl.constexpr, PLACES: tl.constexpr,
    ):  # fmt: skip
        """(a, b) -> (a cos - b sin, b cos + a sin) for each head of a row, some at a time; BACK: minus the angle."""
        pair = tl.arange(0, PLACES)
        inside = pair < half
        c = tl.load(cos + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
        s = tl.load(sin + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
        if BACK:
            s = -s
        for first in range(0, heads, HEADS):
            head = (first + tl.arange(0, HEADS))[:, None]
            here = (head < heads) & inside[None, :]
            come = source + head * source_stride + pair[None, :]
            go = target + head * target_stride + pair[None, :]
            a = tl.load(come, mask=here, other=0.0).to(tl.float32)
            b = tl.load(come + half, mask=here, other=0.0).to(tl.float32)
            tl.store(go, (a * c - b * s).to(target.dtype.element_ty), mask=here)
            tl.store(go + half, (b * c + a * s).to(target.dtype.element_ty), mask=here)

    @triton.jit
    def rope_row(
        qkv, cos, sin, batch, heads, turned, half, HEADS: tl.constexpr, PLACES: tl.constexpr
    ):  # fmt: skip
        """The first ``turned`` heads of a row (position, sample) in place."""
        row = tl.program_id(0)
        here = qkv + row.to(tl.int64) * (heads * 2 * half)
        angle = (row // batch) * half
        _turn_heads(here, 2 * half, here, 2 * half, cos + angle, sin + angle, turned, half, False, HEADS, PLACES)

    @triton.jit
    def rope_row_backward(
        grad_q, q_s, q_b, q_h, heads,  # each gradient, its strides and its number of heads
        grad_k, k_s, k_b, k_h, groups,
        grad_v, v_s, v_b, v_h,
        cos, sin, grad_qkv, batch, half,
        HEADS: tl.constexpr, PLACES: tl.constexpr,
    ):  # fmt: skip
        """All heads of a row: queries and keys turned back, values copied."""
        row = tl.program_id(0)
        s, b, d = (row // batch).to(tl.int64), (row % batch).to(tl.int64), 2 * half
        c, t = cos + s * half, sin + s * half
        go = grad_qkv + row.to(tl.int64) * ((heads + 2 * groups) * d)
        _turn_heads(grad_q + s * q_s + b * q_b, q_h, go, d, c, t, heads, half, True, HEADS, PLACES)
        _turn_heads(grad_k + s * k_s + b * k_b, k_h, go + heads * d, d, c, t, groups, half, True, HEADS, PLACES)
        go += (heads + groups) * d
        come = grad_v + s * v_s + b * v_b
        column = tl.arange(0, 2 * PLACES)
        for first in range(0, groups, HEADS):
            head = (first + tl.arange(0, HEADS))[:, None]
            here = (head < groups) & (column < d)[None, :]
            value = tl.load(come + head * v_h + column[None, :], mask=here, other=0.0)
            tl.store(go + head * d + column[None, :], value, mask=here)

    @triton.jit
    def swiglu_row(gate_up, product, f, BLOCK: tl.constexpr):
        """A part of a row: silu(gate) up."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < f
        gate = tl.load(gate_up + row * (2 * f) + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * (2 * f) + f + column, mask=inside, other=0.0).to(tl.float32)
        result = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(product + row * f + column, result.to(product.dtype.element_ty), mask=inside)

    @triton.jit
    def swiglu_row_backward(grad, gate_up, grad_gate_up, f, BLOCK: tl.constexpr):
        """The gradients of both halves of the same part."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < f
        dtype = gate_up.dtype.element_ty
        g = tl.load(grad + row * f + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + row * (2 * f) + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + row * (2 * f) + f + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        of_gate = g * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
        tl.store(grad_gate_up + row * (2 * f) + column, of_gate.to(dtype), mask=inside)
        tl.store(grad_gate_up + row * (2 * f) + f + column, (g * (gate * sigmoid)).to(dtype), mask=inside)


def _power(n: int) -> int:
    """The least power of two that is not below n: the sizes that Triton's blocks have."""
    return 1 << max(0, n - 1).bit_length()


def _warps(block: int) -> int:
    """8 elements a thread, which are 16 bytes in 16 bits, in at least one warp and at most half the largest block."""
    return max(1, min(16, block // 256))


def _check(like: Tensor, *tensors: Tensor | None) -> None:
    for x in tensors:
        assert x is None or (x.is_contiguous() and x.dtype == like.dtype), f"expected contiguous {like.dtype}: {x}"


@on_its_gpu
def add_rms_norm_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, normed: Tensor, summed: Tensor | None, rstd: Tensor
) -> None:
    """normed, summed [rows, h] and rstd [rows] fp32 from x and branch [rows, h]; without a branch, no summed."""
    _check(x, x, branch, weight, normed, summed)
    rows, h = x.shape
    if not rows:
        return
    block, given = _power(h), (x if branch is None else branch, x if summed is None else summed)
    norm_forward[(rows,)](
        x, given[0], weight, normed, given[1], rstd, eps, 1.0 / h, h,
        HAS_BRANCH=branch is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip


@on_its_gpu
def add_rms_norm_backward(
    grad_normed: Tensor, grad_summed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor,
    grad_x: Tensor, grad_weight: Tensor,
) -> None:  # fmt: skip
    """grad_x [rows, h] and grad_weight [h] from the gradients of both results; grad_summed may be absent."""
    _check(summed, grad_normed, grad_summed, summed, weight, grad_x, grad_weight)
    rows, h = summed.shape
    programs = min(rows, PROGRAMS * multiprocessors(summed.device))
    if not rows:
        grad_weight.zero_()
        return
    partial, block = torch.empty((programs, h), dtype=torch.float32, device=summed.device), _power(h)
    norm_backward[(programs,)](
        grad_normed, summed if grad_summed is None else grad_summed, summed, weight, rstd, grad_x, partial,
        rows, 1.0 / h, h, HAS_SUMMED=grad_summed is not None, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    grad_weight.copy_(partial.sum(0))


@on_its_gpu
def rope_forward(qkv: Tensor, cos: Tensor, sin: Tensor, turned: int) -> None:
    """Turn the first ``turned`` heads of qkv [s, b, heads, d] in place; cos, sin: [s, d/2]."""
    _check(qkv, qkv, cos, sin)
    s, b, heads, d = qkv.shape
    places = _power(d // 2)
    at_once = max(1, PAIRS // places)
    if qkv.numel():
        rope_row[(s * b,)](
            qkv, cos, sin, b, heads, turned, d // 2, HEADS=at_once, PLACES=places, num_warps=_warps(at_once * places)
        )


@on_its_gpu
def rope_backward(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, grad_qkv: Tensor) -> None:
    """grad_qkv [s, b, n + 2g, d] from gradients [s, b, n or g, d], of which the last dimension is contiguous."""
    _check(grad_qkv, grad_qkv, cos, sin)
    s, b, heads, d = grad_qkv.shape
    assert heads == sum(x.shape[2] for x in (grad_q, grad_k, grad_v)) and grad_k.shape == grad_v.shape
    assert all(x.stride(3) == 1 or d == 1 for x in (grad_q, grad_k, grad_v)), "a head must lie in one piece"
    places = _power(d // 2)
    at_once = max(1, PAIRS // places)
    if grad_qkv.numel():
        rope_row_backward[(s * b,)](
            grad_q, *grad_q.stride()[:3], grad_q.shape[2], grad_k, *grad_k.stride()[:3], grad_k.shape[2],
            grad_v, *grad_v.stride()[:3], cos, sin, grad_qkv, b, d // 2,
            HEADS=at_once, PLACES=places, num_warps=_warps(at_once * places),
        )  # fmt: skip


@on_its_gpu
def swiglu_forward(gate_up: Tensor, product: Tensor) -> None:
    """[rows, 2f] -> [rows, f]."""
    _check(gate_up, gate_up, product)
    rows, f = product.shape
    block = min(COLUMNS, _power(f))
    if rows:
        swiglu_row[(rows, -(-f // block))](gate_up, product, f, BLOCK=block, num_warps=_warps(block))


@on_its_gpu
def swiglu_backward(grad: Tensor, gate_up: Tensor, grad_gate_up: Tensor) -> None:
    """[rows, f], [rows, 2f] -> [rows, 2f]."""
    _check(gate_up, grad, gate_up, grad_gate_up)
    rows, f = grad.shape
    block = min(COLUMNS, _power(f))
    if rows:
        swiglu_row_backward[(rows, -(-f // block))](
            grad, gate_up, grad_gate_up, f, BLOCK=block, num_warps=_warps(block)
        )
