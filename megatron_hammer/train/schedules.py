"""Forward and backward over the micro-batches of one step on a rank that has the whole model.

``pipeline.py`` does the same on a rank that has stages of a pipeline; ``step.py`` chooses between the two, and adds up
the losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megatron_hammer.model.head_loss import Objective
from megatron_hammer.model.llama import Stage
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.corruption import CorruptionCheck

Computed = tuple[list[Batch[Tensor]], list[Tensor]]
"""Micro-batches, and the losses [b, s] of each; both empty on a rank whose stages have no head."""
MicroBatch = Callable[[Stage, Batch[Tensor], Tensor, float], Tensor]
"""``micro_batch``, or something else that does the same (``cuda_graph.py``)."""


def micro_batch(model: Stage, batch: Batch[Tensor], share: Tensor, z_loss: float) -> Tensor:
    """Forward and backward of one micro-batch; its gradients go to the store.

    Args:
        share: what the loss of a token of weight 1 is multiplied by: fp32 device scalar.

    Returns:
        losses of the tokens: [b, s] fp32.
    """
    objective = objective_of(batch, share, z_loss)
    losses: Tensor = model(batch.tokens, batch.labels, batch.documents, objective)  # [b, s] fp32
    (losses * objective.weight).sum().backward()
    return losses.detach()


def objective_of(batch: Batch[Tensor], share: Tensor, z_loss: float) -> Objective:
    """What is minimised of a micro-batch."""
    weights = batch.loss_weights
    return Objective(share if weights is None else weights * share, z_loss)


def forward_backward(
    model: Stage,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch[Tensor]],
    ctx: ParallelContext,
    share: Tensor,
    z_loss: float,
    run: MicroBatch,
    corruption: CorruptionCheck | None,
) -> Computed:
    """Losses of the micro-batches, and their gradients in the store; the last backward starts the reduction of these.

    Args:
        share: of the objective of the global batch that a token of weight 1 has: fp32 device scalar.
        corruption: runs the first micro-batch once more, before all others.
    """
    losses, (store,) = [], optimizer.store.of_stages
    order = store.order(len(micro_batches))
    if corruption is not None:
        ctx.status.mark("forward and backward, micro-batch 1 alone")
        store.begin(first=True, last=len(order) == 1, watch=corruption.alone)
        corruption.alone.output(0, run(model, micro_batches[order[0]], share, z_loss))
    for turn, i in enumerate(order):
        ctx.status.mark(f"forward and backward, micro-batch {turn + 1} of {len(micro_batches)}")
        watch = corruption.again if corruption is not None and turn == 0 else None
        store.begin(first=turn == 0, last=turn == len(micro_batches) - 1, watch=watch)
        losses.append(run(model, micro_batches[i], share, z_loss))
        if watch is not None:
            watch.output(0, losses[0])
    return [micro_batches[i] for i in order], losses
