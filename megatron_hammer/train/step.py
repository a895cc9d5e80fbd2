"""``train_step``: one update of the parameters from the micro-batches of one global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_hammer.config import Config
from megatron_hammer.model.llama import Model, stages_of
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.corruption import CorruptionCheck, CorruptionReport
from megatron_hammer.train.drift import DriftCheck, DriftReport
from megatron_hammer.train.pipeline import pipelined_forward_backward
from megatron_hammer.train.schedules import MicroBatch, forward_backward, micro_batch
from megatron_hammer.train.source_sums import (
    ONE_SOURCE,
    SMALLEST_SUM,
    Sources,
    mean_loss,
    sum_by_source,
    weights_of,
)


@dataclass(frozen=True)
class StepReport:
    """What one step says of itself; the tensors stay on the device until the loop reads them."""

    loss: Tensor
    """Mean over the global batch, before the update."""
    by_source: Tensor
    """[S, 4] fp64, what that mean is made of: see ``source_sums.py``."""
    grad_norm: Tensor
    """Of the whole model, before clipping."""
    lr: float
    applied: Tensor
    """False: the gradient was not finite, or the step is a spike that is skipped, and nothing changed."""
    drift: DriftReport | None = None
    """What the drift check of this step has found, if there was one."""
    corruption: CorruptionReport | None = None
    """Whether its first micro-batch was the same twice, if it was run twice; else nothing changed."""


@dataclass(frozen=True)
class Checks:
    """What a step is checked for beside its work; each where it is time for it."""

    drift: DriftCheck | None = None
    twice: CorruptionCheck | None = None

    def before_update(self, step: int, optimizer: Optimizer) -> tuple[DriftReport | None, CorruptionReport | None]:
        """What they find; drift before the update repairs copies of what has changed."""
        drift = None if self.drift is None else self.drift.check(step)
        corruption = None if self.twice is None else self.twice.check(step)
        if corruption is not None:
            optimizer.hold_back(corruption.found)
        return drift, corruption


NO_CHECKS = Checks()


def loss_and_gradients(
    model: Model,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch[Tensor]],
    config: Config,
    ctx: ParallelContext,
    run: MicroBatch = micro_batch,
    sources: Sources = ONE_SOURCE,
    corruption: CorruptionCheck | None = None,
) -> tuple[Tensor, Tensor]:
    """Accumulate the gradient of the mean loss over the global batch, weighted where the batches have loss weights.

    A global batch whose weights are all 0 has loss 0 and no gradient. Communicates over dp and pp.

    Returns:
        mean loss, fp32 device scalar, and the table that it is made of (``source_sums.py``), the same on all ranks.
    """
    share = optimizer.scaler.scale / sum_of_weights(micro_batches, optimizer, ctx)
    stages = stages_of(model)
    if ctx.pp.size > 1:
        computed = pipelined_forward_backward(stages, optimizer, micro_batches, config, ctx, share, corruption)
    else:
        (whole,), z_loss = stages, config.train.z_loss
        computed = forward_backward(whole, optimizer, micro_batches, ctx, share, z_loss, run, corruption)
    table = sum_by_source(*computed, sources, ctx.device)
    all_reduce(table, ctx.dp)
    all_reduce(table, ctx.pp)  # of the last stage alone
    return mean_loss(table), table


def sum_of_weights(micro_batches: Sequence[Batch[Tensor]], optimizer: Optimizer, ctx: ParallelContext) -> int | Tensor:
    """By how much all tokens of the global batch count together.

    Without loss weights each token counts 1, every rank has as many, and their number is known on the host. With them
    it is a device scalar for which nobody waits; communicates over dp, so that either all ranks have weights or none.
    """
    if all(batch.loss_weights is None for batch in micro_batches):
        return sum(batch.labels.numel() for batch in micro_batches) * ctx.dp.size
    return optimizer.store.total([weights_of(batch).sum() for batch in micro_batches]).clamp_min(SMALLEST_SUM)


def train_step(
    model: Model,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch[Tensor]],
    config: Config,
    step: int,
    ctx: ParallelContext,
    run: MicroBatch = micro_batch,
    checks: Checks = NO_CHECKS,
    sources: Sources = ONE_SOURCE,
) -> StepReport:
    """One parameter update from grad_accum micro-batches ([b, s] tokens each). Never waits for the device.

    Args:
        run: runs each micro-batch of a whole model: ``cuda_graph.micro_batch_runner`` of the config.
        checks: those that it is time for.
        sources: by which losses are summed.
    """
    loss, by_source = loss_and_gradients(model, optimizer, micro_batches, config, ctx, run, sources, checks.twice)
    grad_norm = optimizer.clip_grad_norm(config.optimizer.clip_grad)
    lr = learning_rate(config, step)
    found = checks.before_update(step, optimizer)
    applied = optimizer.step(lr, loss)
    return StepReport(loss, by_source, grad_norm, lr, applied, *found)
