"""The softmax of a chunk of logits in Triton: one program a row, which reads the row twice and writes it once.

The formulas, arguments and results are those of ``linear_cross_entropy.py``. With one rank, both halves run in one
program: the second reading of the row (212 kB at 105,789 pieces in 16 bits) finds it in the L2 cache where all rows in
flight fit, and then a logit costs 4 bytes of memory traffic. Sums are fp32, in a fixed order: deterministic.

Proved in Triton's interpreter and by compiling for sm_80 and sm_90; its speed on a GPU is not measured yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_hammer.kernels.linear_cross_entropy import Columns

try:
    import triton
    import triton.language as tl
except ImportError:  # then nobody calls what follows: select_loss asks first
    triton = None

BLOCK, WARPS = 4096, 8  # columns at a time, 16 a thread; chosen by eye

if triton is not None:

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
    ):
        """SUM: the statistics of a row. GRADIENT: its logits to gradient. Both: of a row that is whole on this rank."""
        row = tl.program_id(0).to(tl.int64)
        line = logits + row * row_stride
        label = tl.load(labels + row) - start
        if SUM:
            largest = tl.full((), float("-inf"), tl.float32)
            total = tl.full((), 0.0, tl.float32)
            target = tl.full((), 0.0, tl.float32)
            for first in range(0, valid, BLOCK):
                column = first + tl.arange(0, BLOCK)
                z = tl.load(line + column, mask=column < valid, other=float("-inf")).to(tl.float32)
                higher = tl.maximum(largest, tl.max(z, 0))
                total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0)
                target += tl.sum(tl.where((column == label) & (column < valid), z, 0.0), 0)
                largest = higher
            if GRADIENT:
                tl.store(lse_of + row, tl.log(total) + largest)
                tl.store(loss_of + row, tl.log(total) + (largest - target))
            else:
                tl.store(statistics + row, largest)
                tl.store(statistics + rows + row, total)
                tl.store(statistics + 2 * rows + row, target)
        if GRADIENT:
            if SUM:
                lse = tl.log(total) + largest
                loss = tl.log(total) + (largest - target)
            else:
                lse = tl.load(lse_of + row)
                loss = tl.load(loss_of + row)
            weight = tl.load(weights + row)
            # p - 1 for the label, by its series where p is close to 1 and the difference would lose its digits.
            series = -loss * (1 - loss / 2 * (1 - loss / 3 * (1 - loss / 4 * (1 - loss / 5))))
            p_less_one = tl.where(loss < 0.1, series, tl.exp(-loss) - 1)
            exact = weight * (p_less_one + 2 * z_loss * lse * tl.exp(-loss))
            slope = weight * (1 + 2 * z_loss * lse)
            for first in range(0, width, BLOCK):
                column = first + tl.arange(0, BLOCK)
                z = tl.load(line + column, mask=column < valid, other=float("-inf")).to(tl.float32)
                gradient = tl.where(column == label, exact, tl.exp(z - lse) * slope)
                gradient = tl.where(column < valid, gradient, 0.0)
                tl.store(line + column, gradient.to(logits.dtype.element_ty), mask=column < width)


def _launch(logits: Tensor, labels: Tensor, columns: Columns, *given: Any, total: bool, gradient: bool) -> None:
    statistics, lse, loss, weights, z_loss = given
    assert logits.stride(1) == 1 and labels.is_contiguous(), "rows must lie in memory as they are read"
    rows, width = logits.shape
    softmax_rows[(rows,)](
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
    lse, loss = torch.empty((2, len(labels)), dtype=torch.float32, device=logits.device)
    _launch(logits, labels, columns, lse, lse, loss, weights.contiguous(), z_loss, total=True, gradient=True)
    return loss
