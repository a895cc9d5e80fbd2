"""Records a step whose loss or gradient was not finite, or was a spike: ``OUT/incidents/step-N.json``.

The micro-batches of the step are read again, every rank runs its own forward once more, and each module's output is
looked at: the first that is not finite is named, with the rank, the micro-batch, and the documents of its samples with
the text files that they came from. Where all of forward is finite the gradient was not, and the weights whose gradient
is not finite are named instead. Nothing of the run's state changes. On a GPU the step after this one may have changed
the weights already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.config import Config
from megatron_hammer.dataset.look.places import document_source
from megatron_hammer.model.llama import Model, stages_of
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.agreement import gather_values
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.loader import micro_batches
from megatron_hammer.sampling.samples import TrainData, describe_samples
from megatron_hammer.train.incident_file import incident_path, write_down
from megatron_hammer.train.pipeline import pipelined_losses

SHOWN_SAMPLES = 32  # in one file, so that people can read it
SHOWN_WEIGHTS = 8  # of a rank


def write_incident(
    config: Config,
    record: dict[str, Any],
    first_sample: int,
    model: Model,
    optimizer: Optimizer | None,
    data: TrainData,
    ctx: ParallelContext,
    rewinds: int = 0,
) -> str:
    """Look for what was wrong with a step, on all ranks, and write it down on rank 0. Communicates over the world.

    That a disk does not take it changes nothing about what is done with the step.

    Args:
        record: what is known of the step, as JSON values; ``step`` names the file.
        first_sample: of the step's global batch.
        optimizer: where it still has the gradients of the step.
        rewinds: how often the run has gone back before.

    Returns:
        where, for people, or that it could not be written there and why: on all ranks the same.
    """
    step_samples, size = config.batch_sizes.at(first_sample), config.train.micro_batch_size
    mine = micro_batches(data, first_sample, step_samples, size, ctx.samples.rank, ctx.samples.size)
    batches = [batch.shard(ctx.cp.rank, ctx.cp.size).to(ctx.device) for batch in mine]
    index, module = _first_bad_output(model, batches, ctx)
    weights = [] if module or optimizer is None else list(_bad_gradients(optimizer))[:SHOWN_WEIGHTS]
    found: dict[str, Any] = {"rank": ctx.world.rank, "micro_batch": index, "module": module, "gradients": weights}
    if index is not None:
        found["first_sample"] = first_sample + (index * ctx.samples.size + ctx.samples.rank) * size
    ranks = [rank for rank in gather_values(ctx, found) if rank["module"] or rank["gradients"]]
    tree: dict[str, Any] = {}
    if ctx.world.rank == 0:
        starts = sorted({rank["first_sample"] for rank in ranks if "first_sample" in rank})
        wanted = [i for start in starts for i in range(start, start + size)]
        wanted = wanted or list(range(first_sample, first_sample + step_samples))
        samples = [_describe(data, i) for i in wanted[:SHOWN_SAMPLES]]
        tree = record | {"ranks": ranks, "samples": samples, "samples_left_out": max(0, len(wanted) - SHOWN_SAMPLES)}
    return write_down(incident_path(config, record["step"], rewinds), tree, ctx)


def _describe(data: TrainData, sample: int) -> dict[str, Any]:
    """Where the tokens of a sample come from: dataset, documents, and the text file of each where that is recorded."""
    (tree,) = describe_samples(data, sample, 1)
    dataset = data.dataset(data.sample_id(sample).source)
    for piece in tree["pieces"]:
        if (origin := document_source(dataset, piece["document"])) is not None:
            piece["file"], piece["document_of_file"] = origin
    return tree


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _is_bad(value: Any) -> bool:
    return any(t.is_floating_point() and not bool(t.isfinite().all()) for t in _tensors(value))


@torch.no_grad()
def _first_bad_output(model: Model, batches: Sequence[Any], ctx: ParallelContext) -> tuple[int | None, str | None]:
    """The first micro-batch and module of this rank whose output is not finite; of a pipeline the module alone."""
    stages, bad = stages_of(model), list[str]()
    hooks = []
    for stage in stages:
        for name, module in stage.named_modules():

            def look(_: Any, __: Any, output: Any, name: str = name or "head and loss") -> None:
                if not bad and _is_bad(output):
                    bad.append(name)

            hooks.append(module.register_forward_hook(look))
    try:
        if ctx.pp.size > 1:
            pipelined_losses(stages, batches, ctx, lambda batch, losses: None)
            return None, bad[0] if bad else None
        found: tuple[int | None, str | None] = (None, None)
        for i, batch in enumerate(batches):  # all of them: other ranks wait for this one's collectives
            stages[0](batch.tokens, batch.labels, batch.documents)
            if bad and found[0] is None:
                found = i, bad[0]
        return found
    finally:
        for hook in hooks:
            hook.remove()


def _bad_gradients(optimizer: Optimizer) -> Iterator[str]:
    """The weights in whose summed gradient this rank's shard is not finite."""
    for stretch in optimizer.rule.stretches:
        at = 0
        for part in stretch.parts:
            length = part.stop - part.start
            if _is_bad(stretch.grad[at : at + length]):
                yield part.parameter.name
            at += length
