"""Forward and backward over the micro-batches of one step on a rank of a pipeline, and forward alone in evaluation.

``parallel/pipeline.py`` says which stage and micro-batch come when; here each is computed, and what the next stage
needs is sent. Every rank of a pipeline reads the same batches: the first stage looks up the tokens, the last one knows
the labels, and all know where documents begin. Between two stages travel the hidden states and, the other way round,
their gradient: [s/t, b, h] each.

Receives are posted ahead, in the order of need. A rank waits for the message that it computes with next and for nothing
else; on a GPU it is the stream that waits and not Python. A stage keeps what its layers keep, what it has received, and
of what it has sent the place in autograd's graph alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_hammer.config import Config
from megatron_hammer.model.llama import Stage
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.collectives import start_receive, start_send
from megatron_hammer.parallel.context import Links, ParallelContext
from megatron_hammer.parallel.pipeline import Action, Pipeline, posted_ahead
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train import schedules
from megatron_hammer.train.corruption import CorruptionCheck, Pass


def pipelined_forward_backward(
    stages: Sequence[Stage],
    optimizer: Optimizer,
    micro_batches: Sequence[Batch[Tensor]],
    config: Config,
    ctx: ParallelContext,
    share: Tensor,
    corruption: CorruptionCheck | None,
) -> schedules.Computed:
    """``schedules.forward_backward`` for the stages of this rank, in the order of its ``Config.pipeline``.

    Communicates over pp.
    """
    pipeline, z_loss = config.pipeline(ctx.pp.rank), config.train.z_loss
    if corruption is not None:
        order = pipeline.alone()
        _run(pipeline, order, stages, optimizer, micro_batches[:1], ctx, share, z_loss, corruption.alone)
    again = None if corruption is None else corruption.again
    order = pipeline.training(len(micro_batches))
    return _run(pipeline, order, stages, optimizer, micro_batches, ctx, share, z_loss, again)


def _run(
    pipeline: Pipeline,
    order: Sequence[Action],
    stages: Sequence[Stage],
    optimizer: Optimizer,
    micro_batches: Sequence[Batch[Tensor]],
    ctx: ParallelContext,
    share: Tensor,
    z_loss: float,
    watch: Pass | None,
) -> schedules.Computed:
    """This rank's actions, in their order.

    Args:
        watch: is shown what the first micro-batch computes here.
    """
    done: list[Batch[Tensor]] = []
    losses: list[Tensor] = []
    stores, last = optimizer.store.of_stages, len(micro_batches) - 1
    messages = Messages(pipeline, order, stages, micro_batches, ctx.links)
    kept: dict[tuple[int, int], tuple[Tensor | None, Tensor | GradientEdge]] = {}
    for action, arrived in messages.in_turn():
        n = action.stage // pipeline.ranks
        stage, store, shown = stages[n], stores[n], watch if action.micro_batch == 0 else None
        batch, key = micro_batches[action.micro_batch], (action.stage, action.micro_batch)
        ctx.status.mark(f"{action.kind} of stage {action.stage}, micro-batch {action.micro_batch + 1}")
        if action.kind == "forward" or not stage.placement.has_head:  # the head writes its gradient in forward
            store.begin(first=action.micro_batch == 0, last=action.micro_batch == last, watch=shown)
        if action.kind == "forward":
            received = None if arrived is None else arrived.requires_grad_()
            objective = schedules.objective_of(batch, share, z_loss)
            output = stage(batch.tokens, batch.labels, batch.documents, objective, received)
            if shown is not None:
                shown.output(n, output.detach())
            if stage.placement.has_head:
                kept[key] = received, (output * objective.weight).sum()
                done.append(batch)
                losses.append(output.detach())
            else:
                kept[key] = received, get_gradient_edge(output)
                messages.send(action, output.detach())
        else:
            received, result = kept.pop(key)
            torch.autograd.backward(result, arrived)
            if received is not None:
                assert received.grad is not None
                if shown is not None:
                    shown.sent_back(n, received.grad)
                messages.send(action, received.grad)
    messages.finish()
    return done, losses


@torch.no_grad()
def pipelined_losses(
    stages: Sequence[Stage],
    micro_batches: Sequence[Batch[Tensor]],
    ctx: ParallelContext,
    take: Callable[[Batch[Tensor], Tensor], None],
) -> None:
    """Losses [b, s] of batches of any shape; ``take(batch, losses)`` gets them on the ranks of the last stage."""
    pipeline = Pipeline(ctx.pp.rank, ctx.pp.size, len(stages))
    messages = Messages(pipeline, pipeline.evaluation(len(micro_batches)), stages, micro_batches, ctx.links)
    for action, arrived in messages.in_turn():
        batch, stage = micro_batches[action.micro_batch], stages[action.stage // pipeline.ranks]
        ctx.status.mark(f"evaluation, stage {action.stage}, micro-batch {action.micro_batch + 1}")
        output = stage(batch.tokens, batch.labels, batch.documents, received=arrived)
        if stage.placement.has_head:
            take(batch, output)
        else:
            messages.send(action, output)
    messages.finish()


class Messages:
    """What this rank receives and sends while it does its actions in turn."""

    def __init__(
        self,
        pipeline: Pipeline,
        actions: Sequence[Action],
        stages: Sequence[Stage],
        micro_batches: Sequence[Batch[Tensor]],
        links: Links,
    ) -> None:
        self.pipeline, self.actions, self.stages, self.links = pipeline, actions, stages, links
        self.micro_batches = micro_batches
        self.receives, self.taken = pipeline.receives(actions), 0
        self.posted: deque[tuple[Any, Tensor]] = deque()
        self.sent: deque[tuple[Any, Tensor]] = deque()

    def in_turn(self) -> Iterator[tuple[Action, Tensor | None]]:
        """Each action with what it needs of another stage."""
        self._post_ahead()
        for action in self.actions:
            arrived = None
            if action.receives(self.pipeline.num_stages):
                handle, arrived = self.posted.popleft()
                self.taken += 1
                self._post_ahead()
                handle.wait()
            yield action, arrived

    def send(self, action: Action, tensor: Tensor) -> None:
        """Start to send what an action computed to the stage that needs it."""
        if len(self.sent) >= self.pipeline.sends_kept:
            self.sent.popleft()[0].wait()  # over: see there
        link = self.links.forward_out if action.kind == "forward" else self.links.backward_out
        tensor = tensor.contiguous()
        self.sent.append((start_send(tensor, link), tensor))

    def finish(self) -> None:
        """After the last action: everything has left."""
        assert self.taken == len(self.receives)
        while self.sent:
            self.sent.popleft()[0].wait()

    def _post_ahead(self) -> None:
        while len(self.posted) < posted_ahead(self.receives, self.taken):
            action = self.receives[self.taken + len(self.posted)]
            link = self.links.forward_in if action.kind == "forward" else self.links.backward_in
            batch = self.micro_batches[action.micro_batch]
            buffer = self.stages[0].empty_hidden(batch.tokens, packed=batch.documents is not None)
            self.posted.append((start_receive(buffer, link), buffer))
