"""The training step, on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_hammer.config import Config
from megatron_hammer.model.llama import Model
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.drift import DriftCheck, DriftReport
from megatron_hammer.train.pipeline import accumulate
from megatron_hammer.train.schedules import MicroBatch, micro_batch
from megatron_hammer.train.source_sums import ONE_SOURCE, Sources


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


def train_step(
    model: Model,
    optimizer: Optimizer,
    micro_batches: Sequence[Batch[Tensor]],
    config: Config,
    step: int,
    ctx: ParallelContext,
    run: MicroBatch = micro_batch,
    drift: DriftCheck | None = None,
    sources: Sources = ONE_SOURCE,
) -> StepReport:
    """One parameter update from grad_accum micro-batches ([b, s] tokens each). Never waits for the device.

    Args:
        run: runs each micro-batch of a whole model: ``cuda_graph.micro_batch_runner`` of the config.
        drift: where it is time for it.
        sources: by which losses are summed.
    """
    loss, by_source = accumulate(model, optimizer, micro_batches, ctx, config.train.z_loss, run, sources)
    grad_norm = optimizer.clip_grad_norm(config.optimizer.clip_grad)
    lr = learning_rate(config, step)
    found = None if drift is None else drift.check(step)  # before the update repairs copies of what has changed
    applied = optimizer.step(lr, loss)
    return StepReport(loss, by_source, grad_norm, lr, applied, found)
