"""Evaluation on the named validation sets, comparable between tokenizers.

For the targets t of a set (specials included in the loss, but they stand for no bytes)::

    loss = mean of -ln p(t)      perplexity = e^loss      bits_per_byte = sum of -log2 p(t) / UTF-8 bytes of the targets
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hammer.model.llama import Stage
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.samples import ValidData


@dataclass(frozen=True)
class ValidResult:
    """What one set gave."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    """None without a tokenizer: then nobody knows the bytes."""

    def metrics(self, name: str) -> dict[str, float | None]:
        """The fields of this set in metrics.jsonl."""
        return {f"valid/{name}/{key}": value for key, value in vars(self).items()}


@torch.no_grad()
def evaluate(
    model: Stage,
    data: ValidData,
    micro_batch_size: int,
    piece_bytes: Tensor | None,
    ctx: ParallelContext,
) -> ValidResult:
    """Mean loss over all targets of a set, computed in shares by the data-parallel ranks. Communicates over dp.

    Args:
        piece_bytes: [v] int64 on the device, UTF-8 bytes that each id stands for.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=ctx.device)  # loss, targets, bytes
    mine = range(ctx.samples.rank, len(data), ctx.samples.size)
    for start in range(0, len(mine), micro_batch_size):
        batch = data.read(mine[start : start + micro_batch_size]).shard(ctx.cp.rank, ctx.cp.size).to(ctx.device)
        assert batch.loss_weights is not None
        mask = batch.loss_weights.double()  # [b, s]
        losses = model(batch.tokens, batch.labels, batch.documents)
        totals[0] += (losses.double() * mask).sum()
        totals[1] += mask.sum()
        if piece_bytes is not None:
            totals[2] += (piece_bytes[batch.labels] * mask).sum()
    all_reduce(totals, ctx.dp)
    loss_sum, targets, byte_count = totals.tolist()
    loss = loss_sum / targets
    bits = loss_sum / math.log(2) / byte_count if byte_count else None
    return ValidResult(loss, math.exp(loss) if loss < 700 else math.inf, bits)
