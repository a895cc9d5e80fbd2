"""The softmax of a chunk of logits in Triton: a program takes a row, reads it twice and writes it once, then the next.

The formulas, arguments and results are those of ``linear_cross_entropy.py``. With one rank, both halves run in one
program, and a logit is to cost 4 bytes of memory traffic: the second reading has to find the row (212 kB at 105,789
pieces in 16 bits) in the L2 cache. So there is one program on a multiprocessor, as large as a block can be (132 rows
are 28 MB; an H100's cache has 50), and the second reading goes backwards, from what was read last.

An H200 can issue some 120 instructions in the time in which its memory moves 8 logits, so instructions are few: every
thread keeps the largest logit and the sum of its own columns, reduced once a row; whole blocks have no masks; the
label's own entry is written over afterwards. Masks are at multiples of the width, never at the odd size of the
vocabulary: loads of 16 bytes would become loads of 2.

Sums are fp32, in a fixed order: deterministic. Proved in Triton's interpreter and by compiling for sm_80 and sm_90,
where loads and stores are of 16 bytes and nothing spills; its speed on a GPU is not measured yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_hammer.kernels.argument_types import Columns
from megatron_hammer.kernels.native.triton_rows import multiprocessors, on_its_gpu

try:
    import triton
    import triton.language as tl
except ImportError:  # then nobody calls what follows: the backend is unavailable
    triton = None

EACH = 8  # neighbouring columns of a thread: 16 bytes in 16 bits
BLOCK = 16384  # columns at a time, two such vectors a thread: 32 KB in flight; an H200 needs about 26
WARPS = 32  # the largest block

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)
    LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: the difference of two is no NaN

    @triton.jit
    def _read(line, column, valid, width, MASKED: tl.constexpr):
        """Logits in fp32; those that stand for no token are minus infinity."""
        if MASKED:
            z = tl.load(line + column, mask=column < width, other=float("-inf")).to(tl.float32)
            return tl.where(column < valid, z, float("-inf"))
        else:
            return tl.load(line + column).to(tl.float32)

    @triton.jit
    def _exp(x):
        """tl.exp(x) without its care for results that are no normal numbers: they become 0."""
        return tl.exp2(x * LOG2_E)

    @triton.jit
    def _add(z, largest, total):
        """The running maximum and sum of each lane, with more logits."""
        higher = tl.maximum(largest, tl.max(z, 1))
        return higher, total * _exp(largest - higher) + tl.sum(_exp(z - higher[:, None]), 1)

    @triton.jit
    def softmax_rows(
        logits,  # [n, width], row_stride apart
        labels,  # [n] int64
        statistics,  # [3, n] fp32, written by SUM alone
        lse_of,  # [n] fp32: read by GRADIENT alone, written by both together
        loss_of,  # [n] fp32, likewise
        weights,  # [n] fp32
        z_loss,
        rows,
        row_stride,
        start,
        valid,
        width,
        SUM: tl.constexpr,
        GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
        EACH: tl.constexpr,
    ):
        """SUM: the statistics of a row. GRADIENT: its logits to gradient. Both: of a row that is whole on this rank."""
        lanes: tl.constexpr = BLOCK // EACH
        place = tl.arange(0, lanes)[:, None] * EACH + tl.arange(0, EACH)[None, :]
        whole = valid // BLOCK  # blocks
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            line = logits + row * tl.cast(row_stride, tl.int64)
            label = tl.load(labels + row) - start
            here = (label >= 0) & (label < valid)
            if SUM:
                # Before the reductions, whose barriers lie between this and the first store of any warp.
                target = tl.load(line + label, mask=here, other=0.0).to(tl.float32)
                largest = tl.full((lanes,), LOWEST, tl.float32)
                total = tl.zeros((lanes,), tl.float32)
                for block in range(whole):
                    z = _read(line, block * BLOCK + place, valid, width, False)
                    largest, total = _add(z, largest, total)
                for first in range(whole * BLOCK, width, BLOCK):
                    z = _read(line, first + place, valid, width, True)
                    largest, total = _add(z, largest, total)
                highest = tl.max(largest, 0)
                sum_of_row = tl.sum(total * _exp(largest - highest), 0)
                if GRADIENT:
                    lse = tl.log(sum_of_row) + highest
                    loss = tl.log(sum_of_row) + (highest - target)
                    tl.store(lse_of + row, lse)
                    tl.store(loss_of + row, loss)
                else:
                    tl.store(statistics + row, highest)
                    tl.store(statistics + rows + row, sum_of_row)
                    tl.store(statistics + 2 * rows + row, target)
            if GRADIENT:
                if not SUM:
                    lse = tl.load(lse_of + row)
                    loss = tl.load(loss_of + row)
                weight = tl.load(weights + row)
                slope = weight * (1 + 2 * z_loss * lse)
                for first in range(whole * BLOCK, width, BLOCK):
                    column = first + place
                    gradient = _exp(_read(line, column, valid, width, True) - lse) * slope
                    gradient = tl.where(column < valid, gradient, 0.0)  # also where lse is not finite
                    tl.store(line + column, gradient.to(logits.dtype.element_ty), mask=column < width)
                for done in range(whole):
                    column = (whole - 1 - done) * BLOCK + place
                    gradient = _exp(_read(line, column, valid, width, False) - lse) * slope
                    tl.store(line + column, gradient.to(logits.dtype.element_ty))
                # p - 1 for the label, by its series where p is close to 1 and the difference would lose its digits.
                series = -loss * (1 - loss / 2 * (1 - loss / 3 * (1 - loss / 4 * (1 - loss / 5))))
                p_less_one = tl.where(loss < 0.1, series, tl.exp(-loss) - 1)
                exact = weight * (p_less_one + 2 * z_loss * lse * tl.exp(-loss))
                tl.debug_barrier()  # another warp has written this place
                tl.store(line + label, exact.to(logits.dtype.element_ty), mask=here)


@on_its_gpu
def _launch(logits: Tensor, labels: Tensor, columns: Columns, *given: Any, total: bool, gradient: bool) -> None:
    statistics, lse, loss, weights, z_loss = given
    assert logits.stride(1) == 1 and labels.is_contiguous(), "rows must lie in memory as they are read"
    rows, width = logits.shape
    if not rows:
        return
    softmax_rows[(min(rows, multiprocessors(logits.device)),)](
        logits,
        labels,
        statistics,
        lse,
        loss,
        weights,
        z_loss,
        rows,
        logits.stride(0),
        columns.start,
        columns.valid,
        width,
        SUM=total,
        GRADIENT=gradient,
        BLOCK=BLOCK,
        EACH=EACH,
        num_warps=WARPS,
    )


def row_statistics(logits: Tensor, labels: Tensor, columns: Columns) -> Tensor:
    """As the torch function."""
    statistics = torch.empty((3, len(labels)), dtype=torch.float32, device=logits.device)
    unused = statistics[0]
    _launch(logits, labels, columns, statistics, unused, unused, unused, 0.0, total=True, gradient=False)
    return statistics


def softmax_gradient_(
    logits: Tensor, labels: Tensor, columns: Columns, lse: Tensor, loss: Tensor, weights: Tensor, z_loss: float = 0.0
) -> None:
    """As the torch function."""
    given = (x.contiguous() for x in (lse, lse, loss, weights))
    _launch(logits, labels, columns, *given, z_loss, total=False, gradient=True)


def loss_and_gradient_(
    logits: Tensor, labels: Tensor, columns: Columns, weights: Tensor, z_loss: float = 0.0
) -> Tensor:
    """As the torch function."""
    lse, loss = torch.empty((2, len(labels)), dtype=torch.float32, device=logits.device).unbind()
    _launch(logits, labels, columns, lse, lse, loss, weights.contiguous(), z_loss, total=True, gradient=True)
    return loss
