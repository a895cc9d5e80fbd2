"""AdamW and the square sum in Triton: twins of ``csrc/kernels`` for a GPU where nvcc did not build those.

The formulas, arguments and results are those of ``kernels/adamw.py``; what is the same for all elements (the factors
that correct the bias) is computed by each program in fp64, because b^k is close to 1. 30 bytes an element, each once;
where ``skip`` is not 0 nothing is read or written. The square sum takes 4 bytes an element and goes in an order that
depends on the number of elements alone, so that its bits are the same on every GPU.

Proved in Triton's interpreter against the checks of the CUDA kernels and by compiling for sm_80 and sm_90; **not yet
run on a GPU**, so its speed is not known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_hammer.kernels.native.triton_rows import on_its_gpu

try:
    import triton
    import triton.language as tl
except ImportError:  # then nobody calls what follows: the backend is unavailable
    triton = None

ELEMENTS = 1024  # at a time: 16 bytes of fp32 for each of 256 threads, in two loads of 128
TIMES = 16  # that a program does so, for one correction of the bias
SUMS = 4096  # programs of a square sum at most: 31 a multiprocessor of an H100, the last of which costs little

if triton is not None:

    @triton.jit
    def adamw_elements(
        master,  # [n] fp32, as are the next three
        grad,
        exp_avg,
        exp_avg_sq,
        param,  # [n] in 16 bits; not written without HAS_PARAM
        divisor,  # fp32 scalars on the device, as are the next two
        skip,
        updates,
        lr,
        one_minus_beta1,
        beta2,
        one_minus_beta2,
        eps,
        decay,  # times lr
        n,
        LOG_BETA1: tl.constexpr,
        LOG_BETA2: tl.constexpr,
        HAS_PARAM: tl.constexpr,
        ELEMENTS: tl.constexpr,
        TIMES: tl.constexpr,
    ):
        """An update of neighbouring elements, or nothing."""
        if tl.load(skip) == 0.0:
            k = tl.load(updates).to(tl.float64) + 1.0
            step_size = lr / (1.0 - tl.exp(k * tl.full((), LOG_BETA1, tl.float64))).to(tl.float32)
            root = 1.0 / tl.sqrt((1.0 - tl.exp(k * tl.full((), LOG_BETA2, tl.float64))).to(tl.float32))
            by = tl.load(divisor)
            first = tl.program_id(0).to(tl.int64) * (ELEMENTS * TIMES)
            for time in range(TIMES):
                at = first + time * ELEMENTS + tl.arange(0, ELEMENTS)
                inside = at < n
                g = tl.div_rn(tl.load(grad + at, mask=inside, other=0.0), by)
                m = tl.load(exp_avg + at, mask=inside, other=0.0)
                v = tl.load(exp_avg_sq + at, mask=inside, other=0.0)
                w = tl.load(master + at, mask=inside, other=0.0)
                m += one_minus_beta1 * (g - m)
                v = beta2 * v + one_minus_beta2 * g * g
                w -= decay * w
                w -= tl.div_rn(step_size * m, tl.sqrt_rn(v) * root + eps)
                tl.store(exp_avg + at, m, mask=inside)
                tl.store(exp_avg_sq + at, v, mask=inside)
                tl.store(master + at, w, mask=inside)
                if HAS_PARAM:
                    tl.store(param + at, w.to(param.dtype.element_ty), mask=inside)

    @triton.jit
    def sum_squares(part, partial, n, BLOCK: tl.constexpr):
        """What each program's blocks add."""
        total = tl.zeros((BLOCK,), tl.float32)
        stride = tl.num_programs(0).to(tl.int64) * BLOCK
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, n, stride):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(part + at, mask=at < n, other=0.0)
            total += x * x
        tl.store(partial + tl.program_id(0), tl.sum(total, 0))

    @triton.jit
    def add_partial_sums(partial, count, out, BLOCK: tl.constexpr):
        """One program: out += sum(partial), in fp64."""
        at = tl.arange(0, BLOCK)
        total = tl.sum(tl.load(partial + at, mask=at < count, other=0.0).to(tl.float64), 0)
        tl.store(out, (tl.load(out).to(tl.float64) + total).to(tl.float32))


@on_its_gpu
def adamw(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor | None, lr: float,
    beta1: float, beta2: float, eps: float, decay: float, divisor: Tensor, skip: Tensor, updates: Tensor,
) -> None:  # fmt: skip
    """Update flat fp32 tensors, and ``param`` from the new weights; ``updates`` is the count before this one."""
    for x in (master, grad, exp_avg, exp_avg_sq, param):
        assert x is None or (x.is_contiguous() and x.shape == master.shape), "flat tensors of one size"
    n = master.numel()
    if n:
        adamw_elements[(-(-n // (ELEMENTS * TIMES)),)](
            master, grad, exp_avg, exp_avg_sq, master if param is None else param, divisor, skip, updates,
            lr, 1 - beta1, beta2, 1 - beta2, eps, lr * decay, n, LOG_BETA1=_log(beta1), LOG_BETA2=_log(beta2),
            HAS_PARAM=param is not None, ELEMENTS=ELEMENTS, TIMES=TIMES, num_warps=4,
        )  # fmt: skip


def _log(beta: float) -> float:
    """Finite for 0, of which every power is 0."""
    return math.log(beta) if beta > 0 else -1e4


@on_its_gpu
def add_square_sum(part: Tensor, out: Tensor) -> None:
    """out, an fp32 scalar, += sum(part^2): part flat fp32."""
    n = part.numel()
    if not n:
        return
    assert part.is_contiguous() and part.dtype == torch.float32, "a flat fp32 tensor"
    programs = min(SUMS, -(-n // ELEMENTS))
    partial = torch.empty(programs, dtype=torch.float32, device=part.device)
    sum_squares[(programs,)](part, partial, n, BLOCK=ELEMENTS, num_warps=4)
    add_partial_sums[(1,)](partial, programs, out, BLOCK=SUMS, num_warps=8)
