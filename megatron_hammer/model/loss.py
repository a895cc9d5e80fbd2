"""Cross-entropy over a vocabulary that is divided over the ranks: no rank ever holds a full row of logits.

For logits z, label y and the log of the sum of exponentials lse(z) = log sum_i exp(z_i)::

    loss = lse(z) - z_y                    each rank: its own lse and (if it holds column y) its z_y,
    dloss/dz_i = exp(z_i - lse) - [i = y]   combined over the ranks by two small [s, b] all-reduces

Arithmetic is fp32 (fp64 for fp64 logits), a few rows at a time, so that no fp32 copy of the logits exists. Each logit
is exponentiated once: forward leaves exp(z_i - m), m the rank's largest of the row, in the place of the logits, and
backward turns that into the gradient by one factor a row, exp(m - lse). Padding columns are cut off: they take no part
and get gradient zero.
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
        logits: [s, b, v/t] of this rank, padding columns included; destroyed.
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
        rows = logits.detach().flatten(0, 1)[:, :valid]  # [s*b, valid]
        local = labels.flatten() - start
        here = (local >= 0) & (local < valid)
        local = torch.where(here, local, 0)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        largest = torch.full_like(local, -torch.inf, dtype=dtype)  # stays so on a rank with padding only
        sums, target = torch.zeros_like(largest), torch.zeros_like(largest)
        if valid:
            target = torch.where(here, rows.gather(1, local.unsqueeze(1)).squeeze(1).to(dtype), 0)
            for c in _row_chunks(rows):
                chunk = rows[c].to(dtype, copy=True)
                largest[c] = chunk.amax(-1)
                sums[c] = chunk.sub_(largest[c].unsqueeze(1)).exp_().sum(-1)
                rows[c] = chunk
        lse, target = _combine(largest, sums, target, group)
        loss = lse - target
        ctx.save_for_backward((largest - lse).exp(), loss, local, here)
        ctx.exponentials, ctx.valid = logits.detach(), valid
        return loss.view_as(labels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        factor, loss, local, here = ctx.saved_tensors
        grad, grad_loss = ctx.exponentials, grads[0].flatten()
        ctx.exponentials = None
        rows = grad.flatten(0, 1)
        rows[:, ctx.valid :] = 0
        if ctx.valid:
            rows, factor = rows[:, : ctx.valid], (factor * grad_loss).unsqueeze(1)
            for c in _row_chunks(rows):  # torch multiplies bf16 by fp32 slowly in place
                rows[c] = rows[c].to(factor.dtype).mul_(factor[c])
            # The label's own entry in full precision: p - 1 would lose everything to rounding where p is close to 1.
            row = torch.arange(len(local), device=local.device)
            exact = (torch.expm1(-loss) * grad_loss).to(rows.dtype)
            rows[row, local] = torch.where(here, exact, rows[row, local])
        return grad, None, None, None, None


def _combine(largest: Tensor, sums: Tensor, target: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Each rank's maximum, sum of exponentials and label logit -> lse and label logit of whole rows, [s*b] each."""
    if group.size == 1:
        return sums.log() + largest, target
    overall = largest.clone()
    all_reduce(overall, group, op=dist.ReduceOp.MAX)
    parts = torch.stack((sums * (largest - overall).exp(), target))
    all_reduce(parts, group)
    return parts[0].log() + overall, parts[1]
