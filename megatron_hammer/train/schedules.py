"""Forward and backward over the micro-batches of one step; a pipeline schedule would be another function here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.model.head_loss import Objective
from megatron_hammer.model.llama import Stage
from megatron_hammer.optim.distributed import DistributedOptimizer
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import ParallelContext

# Tokens and labels, [b, s] int64 on the device, and under data.attention_mask=document where the documents lie.
DeviceBatch = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, PackedSequences | None]


def forward_backward(
    model: Stage,
    optimizer: DistributedOptimizer,
    micro_batches: Sequence[DeviceBatch],
    ctx: ParallelContext,
    z_loss: float = 0.0,
) -> Tensor:
    """Accumulate the gradient of the mean loss over the global batch.

    Every sample has the same number of targets, so the mean over the global batch is the sum over ranks and
    micro-batches divided by a known count. The last micro-batch's backward starts the reduction of the gradients.

    Returns:
        Mean loss of the global batch, fp32 device scalar, the same on all ranks. Communicates over dp.
    """
    count = sum(batch[1].numel() for batch in micro_batches) * ctx.dp.size
    objective = Objective(optimizer.loss_scale / count, z_loss)
    total = torch.zeros((), device=ctx.device)
    for i, batch in enumerate(micro_batches):
        optimizer.start_micro_batch(first=i == 0, last=i == len(micro_batches) - 1)
        losses = model(*batch, objective=objective)
        (losses * objective.weight).sum().backward()
        total += losses.detach().sum() / count
    all_reduce(total, ctx.dp)
    return total
