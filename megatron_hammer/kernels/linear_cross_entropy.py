"""Softmax and cross-entropy of one chunk of logits, the gradient written over the logits themselves.

For a row of logits z, its label y and the log of the sum of exponentials lse(z) = log sum_i exp(z_i)::

    loss = lse - z_y                                    dloss/dz_i = exp(z_i - lse) - [i = y]

and for z_loss c (arXiv 2204.02311) the gradient of c lse^2 beside it, 2 c lse exp(z_i - lse). A rank holds columns
[start, start + valid) of the vocabulary and after them padding, which takes no part and gets gradient zero. With one
rank loss and gradient come in one pass; with several the ranks exchange three numbers a row between the two.

Arithmetic is fp32 (fp64 for fp64 logits), a few rows at a time, so that no fp32 copy of a chunk exists. Memory traffic
on one rank is one read and one write of each logit where such a block stays in cache. Deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.argument_types import Columns
from megatron_hammer.kernels.backend import CPU, CUDA, HALVES, Backend
from megatron_hammer.kernels.native import devices as native
from megatron_hammer.kernels.native import triton_rows

# Tokens whose logits exist at once. On an H200 each chunk costs 0.4 ms for 0.87 GB of fp32 gradient read and written
# (1.4B model, predicted). On 2 Xeon cores 256 and 512 are as fast as 1024 at 8,192 and at 32,000 pieces, and 256 needs
# 40 (bf16) to 120 MB (fp32) less at 32,000. On an EPYC without AMX a bf16 step with 512 takes 0.8 % less than with 256
# at 8,192 pieces and 2.3 % less at 32,000 (benchmarks/results/cpu_parts-epyc-2cores-2026-11-29.md).
CHUNK_TOKENS = {"cpu": 512, "cuda": 2048}

# Elements of one fp32 block: 1 MiB stays in a CPU core's own cache (a third faster than 4 MiB on a Xeon with 2 MiB a
# core); on a GPU without Triton 8 MiB stay in its L2 cache, and a chunk stays within 0.5 GiB.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**21}


def row_statistics(logits: Tensor, labels: Tensor, columns: Columns) -> Tensor:
    """Of each row on this rank: largest logit, sum of exp(z - largest), logit of the label or 0; [3, n], fp32 or fp64.

    Args:
        logits: [n, v/t], padding columns included; unchanged.
        labels: [n] int64 token ids.
    """
    column, here = columns.find(labels)
    statistics = torch.zeros((3, len(labels)), dtype=_wide(logits), device=logits.device)
    if columns.valid == 0:  # a rank with padding only
        statistics[0] = -torch.inf
        return statistics
    rows = logits[:, : columns.valid]
    statistics[2] = torch.where(here, rows.gather(1, column.unsqueeze(1)).squeeze(1), 0)
    for c in _row_blocks(rows):
        block = rows[c].to(statistics.dtype, copy=True)
        torch.amax(block, -1, out=statistics[0, c])
        torch.sum(block.sub_(statistics[0, c].unsqueeze(1)).exp_(), -1, out=statistics[1, c])
    return statistics


def combine_statistics(parts: Tensor) -> tuple[Tensor, Tensor]:
    """The ranks' statistics [t, 3, n] -> lse and loss of whole rows, [n] each."""
    largest = parts[:, 0].amax(0)
    log_sums = (parts[:, 1] * (parts[:, 0] - largest).exp()).sum(0).log()
    return log_sums + largest, log_sums + (largest - parts[:, 2].sum(0))  # a small loss keeps its digits


def softmax_gradient_(
    logits: Tensor, labels: Tensor, columns: Columns, lse: Tensor, loss: Tensor, weights: Tensor, z_loss: float = 0.0
) -> None:
    """Turn logits into the gradient of sum(weights * (loss + z_loss * lse^2)), in place.

    Args:
        lse, loss, weights: [n], of whole rows.
    """
    slope = weights * (1 + 2 * z_loss * lse)
    rows = logits[:, : columns.valid]
    for c in _row_blocks(rows):
        block = rows[c].to(lse.dtype, copy=True)
        rows[c] = block.sub_(lse[c].unsqueeze(1)).exp_().mul_(slope[c].unsqueeze(1))
    _finish_gradient(logits, labels, columns, lse, loss, weights, z_loss)


def loss_and_gradient_(
    logits: Tensor, labels: Tensor, columns: Columns, weights: Tensor, z_loss: float = 0.0
) -> Tensor:
    """All of the above on a rank that holds the whole vocabulary, each logit exponentiated once: loss [n]."""
    rows = logits[:, : columns.valid]
    lse, loss = torch.empty((2, len(labels)), dtype=_wide(logits), device=logits.device).unbind()
    target = rows.gather(1, labels.unsqueeze(1)).squeeze(1)
    for c in _row_blocks(rows):
        block = rows[c].to(lse.dtype, copy=True)
        largest = block.amax(-1, keepdim=True)
        sums = block.sub_(largest).exp_().sum(-1, keepdim=True)
        log_sums, largest = sums.log().squeeze(1), largest.squeeze(1)
        torch.add(log_sums, largest, out=lse[c])
        torch.add(log_sums, largest.sub_(target[c]), out=loss[c])  # a small loss keeps its digits
        slope = weights[c] * (1 + 2 * z_loss * lse[c])
        rows[c] = block.mul_(slope.unsqueeze(1).div_(sums))
    _finish_gradient(logits, labels, columns, lse, loss, weights, z_loss)
    return loss


def _finish_gradient(
    gradient: Tensor, labels: Tensor, columns: Columns, lse: Tensor, loss: Tensor, weights: Tensor, z_loss: float
) -> None:
    """Padding, and the label's own entry in full precision: p - 1 would lose all to rounding where p is close to 1."""
    gradient[:, columns.valid :] = 0
    if columns.valid:
        column, here = columns.find(labels)
        exact = weights * (torch.expm1(-loss) + 2 * z_loss * lse * (-loss).exp())
        row = torch.arange(len(labels), device=labels.device)
        gradient[row, column] = torch.where(here, exact.to(gradient.dtype), gradient[row, column])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _row_blocks(matrix: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS.get(matrix.device.type, 2**21) // max(1, matrix.shape[1]))
    return (slice(i, i + rows) for i in range(0, matrix.shape[0], rows))


@dataclass(frozen=True)
class LossKernels:
    """What the head and loss of a model are computed with."""

    name: str = "torch"
    """Value of ``kernels.loss``."""
    chunk_tokens: int = CHUNK_TOKENS["cpu"]
    row_statistics: Callable[[Tensor, Tensor, Columns], Tensor] = row_statistics
    softmax_gradient_: Callable[..., None] = softmax_gradient_
    loss_and_gradient_: Callable[..., Tensor] = loss_and_gradient_


def _triton(device: torch.device) -> LossKernels:
    from megatron_hammer.kernels.native import linear_cross_entropy_triton as fast

    return LossKernels(
        "triton", CHUNK_TOKENS["cuda"], fast.row_statistics, fast.softmax_gradient_, fast.loss_and_gradient_
    )


def _fused(device: torch.device) -> LossKernels:
    kernels = native.library(device)
    return LossKernels(
        "fused",
        CHUNK_TOKENS["cpu"],
        kernels.row_statistics,
        kernels.softmax_gradient_,
        kernels.loss_and_gradient_,
    )


BACKENDS = (
    Backend("fused", _fused, CPU, native.DTYPES["cpu"], unavailable=native.unavailable),
    Backend("triton", _triton, CUDA, HALVES | {torch.float32}, unavailable=triton_rows.unavailable),
    Backend("torch", lambda device: LossKernels()),
)


def with_chunks(loss: LossKernels, kernels: KernelsConfig, device: torch.device) -> LossKernels:
    """These kernels with the chunk that the config asks for, or the device's own."""
    return replace(loss, chunk_tokens=kernels.loss_chunk_tokens or CHUNK_TOKENS[device.type])
