"""Cross-entropy over a vocabulary that is divided over the ranks: no rank ever holds a full row of logits.

For logits z, label y and the log of the sum of exponentials lse(z) = log sum_i exp(z_i)::

    loss = lse(z) - z_y                    each rank: its own lse and (if it holds column y) its z_y,
    dloss/dz_i = exp(z_i - lse) - [i = y]   combined over the ranks by two small [s, b] all-reduces

Arithmetic is fp32 (fp64 for fp64 logits), a few rows at a time, so that no fp32 copy of the logits exists; the gradient
overwrites the logits. Padding columns are cut off: they take no part and get gradient zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import Group

# Elements of one chunk of logits in flight: 4 MiB of fp32 stays in a CPU core's cache; a GPU wants few launches.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**28}


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, vocab_size: int, group: Group) -> Tensor:
    """Loss of each token.

    Args:
        logits: [s, b, v/t] of this rank, padding columns included; destroyed by backward.
        labels: [s, b] int64, global token ids.
        vocab_size: true v; columns at or beyond it are padding.
        group: the ranks that divide the vocabulary. Communicates twice in forward.

    Returns:
        [s, b] fp32 (fp64 for fp64 logits).
    """
    start = logits.shape[-1] * group.rank
    valid = max(0, min(logits.shape[-1], vocab_size - start))
    return _CrossEntropy.apply(logits, labels, start, valid, group)  # type: ignore[no-any-return]


def _row_chunks(matrix: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_ELEMENTS.get(matrix.device.type, 2**28) // max(1, matrix.shape[-1]))
    return (slice(i, i + rows) for i in range(0, matrix.shape[0], rows))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, start: int, valid: int, group: Group) -> Tensor:
        rows = logits.flatten(0, 1)[:, :valid]  # [s*b, valid]
        local = labels.flatten() - start
        here = (local >= 0) & (local < valid)
        local = torch.where(here, local, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if valid:
            lse = torch.cat([rows[c].to(dtype).logsumexp(-1) for c in _row_chunks(rows)])
            target = torch.where(here, rows.gather(1, local.unsqueeze(1)).squeeze(1).to(dtype), 0)
        else:  # a rank with padding only
            lse = torch.full_like(local, -torch.inf, dtype=dtype)
            target = torch.zeros_like(lse)
        if group.size > 1:
            largest = lse.clone()
            all_reduce(largest, group, op=dist.ReduceOp.MAX)
            sums = torch.stack(((lse - largest).exp(), target))
            all_reduce(sums, group)
            lse, target = sums[0].log() + largest, sums[1]
        ctx.save_for_backward(logits, lse, local, here)
        ctx.valid = valid
        return (lse - target).view_as(labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, lse, local, here = ctx.saved_tensors
        grad_loss = grads[0].flatten()
        rows = logits.flatten(0, 1)
        rows[:, ctx.valid :] = 0
        rows = rows[:, : ctx.valid]
        minus_one = torch.where(here, -grad_loss, 0).unsqueeze(1)
        for c in _row_chunks(rows) if ctx.valid else ():
            softmax = rows[c].to(lse.dtype).sub_(lse[c].unsqueeze(1)).exp_()
            softmax.mul_(grad_loss[c].unsqueeze(1)).scatter_add_(1, local[c].unsqueeze(1), minus_one[c])
            rows[c] = softmax
        return logits, None, None, None, None
