"""Evaluation on the named validation sets, comparable between tokenizers.

For the targets t of a set (specials included in the loss, but they stand for no bytes)::

    loss = mean of -ln p(t)      perplexity = e^loss      bits_per_byte = sum of -log2 p(t) / UTF-8 bytes of the targets
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.model.llama import Stage
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.samples import ValidData, cumulative_lengths


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
    document_mask: bool = False,
) -> ValidResult:
    """Mean loss over all targets of a set, computed in shares by the data-parallel ranks. Communicates over dp.

    Args:
        piece_bytes: [v] int64 on the device, UTF-8 bytes that each id stands for.
        document_mask: each document is read alone, as in training with data.attention_mask=document; the model's
            attention was chosen for one or the other.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=ctx.device)  # loss, targets, bytes
    mine = range(ctx.dp.rank, len(data), ctx.dp.size)
    for start in range(0, len(mine), micro_batch_size):
        windows = mine[start : start + micro_batch_size]
        samples = [data.get(j) for j in windows]
        documents = None
        if document_mask:
            cu_seqlens = cumulative_lengths(np.concatenate([data.piece_lengths(j) for j in windows]))
            documents = PackedSequences.from_cu_seqlens(cu_seqlens, ctx.device)
        tokens = torch.from_numpy(np.stack([t for t, _ in samples])).to(ctx.device)  # [b, s + 1]
        mask = torch.from_numpy(np.stack([m for _, m in samples])).to(ctx.device, torch.float64)  # [b, s]
        labels = tokens[:, 1:]
        losses = model(tokens[:, :-1], labels, documents)
        totals[0] += (losses.double() * mask).sum()
        totals[1] += mask.sum()
        if piece_bytes is not None:
            totals[2] += (piece_bytes[labels] * mask).sum()
    all_reduce(totals, ctx.dp)
    loss_sum, targets, byte_count = totals.tolist()
    loss = loss_sum / targets
    bits = loss_sum / math.log(2) / byte_count if byte_count else None
    return ValidResult(loss, math.exp(loss) if loss < 700 else math.inf, bits)
