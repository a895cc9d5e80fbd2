"""Forward and backward over the micro-batches of one step on a rank that has the whole model; ``pipeline.py`` has the
one for stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_hammer.model.head_loss import Objective
from megatron_hammer.model.llama import Stage
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch

SMALLEST_SUM = 1e-20  # of weights that mean something; a loss scale of 2^60 divided by it is still finite in fp32

MicroBatch = Callable[[Stage, Batch[Tensor], Tensor, float], Tensor]
"""``micro_batch``, or something else that does the same (``cuda_graph.py``)."""


def micro_batch(model: Stage, batch: Batch[Tensor], share: Tensor, z_loss: float) -> Tensor:
    """Forward and backward of one micro-batch; its gradients go to the store.

    Args:
        share: what the loss of a token of weight 1 is multiplied by: fp32 device scalar.

    Returns:
        sum of weight x loss: fp32 device scalar.
    """
    objective = objective_of(batch, share, z_loss)
    losses = model(batch.tokens, batch.labels, batch.documents, objective)  # [b, s] fp32
    (losses * objective.weight).sum().backward()
    return counted(batch, losses.detach())


def objective_of(batch: Batch[Tensor], share: Tensor, z_loss: float) -> Objective:
    """What is minimised of a micro-batch."""
    weights = batch.loss_weights
    return Objective(share if weights is None else weights * share, z_loss)


def counted(batch: Batch[Tensor], losses: Tensor) -> Tensor:
    """Sum of weight x loss: fp32 device scalar."""
    return (losses if batch.loss_weights is None else losses * batch.loss_weights).sum()


def forward_backward(
    model: Stage,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch[Tensor]],
    ctx: ParallelContext,
    z_loss: float = 0.0,
    run: MicroBatch = micro_batch,
) -> Tensor:
    """Accumulate the gradient of the mean loss over the global batch, weighted where the batches have loss weights.

    The last micro-batch's backward starts the reduction of the gradients. A global batch whose weights are all 0 has
    loss 0 and no gradient.

    Returns:
        Mean loss of the global batch, fp32 device scalar, the same on all ranks. Communicates over dp.
    """
    whole = sum_of_weights(micro_batches, optimizer, ctx)
    share = optimizer.loss_scale / whole  # of a token of weight 1
    losses, (store,) = list(torch.zeros(len(micro_batches), device=ctx.device)), optimizer.store.of_stages
    for turn, i in enumerate(store.order(len(micro_batches))):
        ctx.journal.mark(f"forward and backward, micro-batch {turn + 1} of {len(micro_batches)}")
        store.begin(first=turn == 0, last=turn == len(micro_batches) - 1)
        losses[i] = run(model, micro_batches[i], share, z_loss) / whole
    return store.total(losses)


def sum_of_weights(micro_batches: Sequence[Batch[Tensor]], optimizer: Optimizer, ctx: ParallelContext) -> int | Tensor:
    """By how much all tokens of the global batch count together.

    Without loss weights each token counts 1, every rank has as many, and their number is known on the host. With them
    it is a device scalar for which nobody waits; communicates over dp, so that either all ranks have weights or none.
    """
    if all(batch.loss_weights is None for batch in micro_batches):
        return sum(batch.labels.numel() for batch in micro_batches) * ctx.dp.size
    weights = [
        torch.full((), float(batch.labels.numel()), device=ctx.device)
        if batch.loss_weights is None
        else batch.loss_weights.sum()
        for batch in micro_batches
    ]
    return optimizer.store.total(weights).clamp_min(SMALLEST_SUM)
