"""Evaluation on the named validation sets, comparable between tokenizers.

For the targets t of a set (specials included in the loss, but they stand for no bytes)::

    loss = mean of -ln p(t)      perplexity = e^loss      bits_per_byte = sum of -log2 p(t) / UTF-8 bytes of the targets
                                                          bits_per_character likewise, by the characters of the targets

The samples of a micro-batch are the same for every number of ranks, and the micro-batches are summed in the order of
their numbers, so the results are, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hammer.model.llama import Model, stages_of
from megatron_hammer.parallel.collectives import all_reduce, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.sum_tree import fold
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.samples import ValidData
from megatron_hammer.train.pipeline import pipelined_losses
from megatron_hammer.train.source_sums import unpack
from megatron_hammer.train.stopping import StopCheck

PIPELINED_AT_ONCE = 32  # micro-batches: stages wait for each other once for so many, and their tokens are in memory


@dataclass(frozen=True)
class ValidResult:
    """What an evaluation gave on one validation set."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    """None without a tokenizer: then the bytes are unknown."""
    bits_per_character: float | None

    def metrics(self, name: str) -> dict[str, float | None]:
        """The fields of this set in metrics.jsonl."""
        return {f"valid/{name}/{key}": value for key, value in vars(self).items()}


def perplexity(loss: float) -> float:
    """e^loss; infinite where fp64 has no such number."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: Model,
    data: ValidData,
    micro_batch_size: int,
    sizes: Tensor | None,
    ctx: ParallelContext,
    stop: StopCheck | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> ValidResult:
    """Mean loss over all targets of a set, computed in shares by the data-parallel ranks. Communicates over dp and pp.

    Args:
        sizes: of the text that each id stands for (``source_sums.Sources``); None without a tokenizer.
        stop: asked now and then; communicates over the world.
        advance: called with the number of micro-batches that this rank has computed.

    Raises:
        CutShort: on all ranks alike, after a stop signal.
    """
    starts = range(0, len(data), micro_batch_size)
    sums = torch.zeros(len(starts), 4, dtype=torch.float64, device=ctx.device)  # loss, targets, bytes, characters
    # All ranks compute equally often, since they may have to gather weights from each other (parallel.shard=weights):
    # who has no micro-batch left computes the last one and does not count it.
    mine = range(ctx.samples.rank, len(starts) + -len(starts) % ctx.samples.size, ctx.samples.size)

    def count(batch: Batch[Tensor], losses: Tensor) -> None:
        if number[id(batch)] >= len(starts):
            return
        assert batch.loss_weights is not None
        mask = batch.loss_weights.double()  # [b, s]
        found = sums[number[id(batch)]]
        found[0] = (losses.double() * mask).sum()
        found[1] = mask.sum()
        if sizes is not None:
            found[2], found[3] = ((size * mask).sum() for size in unpack(sizes[batch.labels]))

    at_once = 1 if ctx.pp.size == 1 else PIPELINED_AT_ONCE
    for first in range(0, len(mine), at_once):
        if stop is not None:
            stop.now_and_then()
        ctx.status.mark(f"evaluation, micro-batch {first + 1} of {len(mine)}")
        numbers = mine[first : first + at_once]
        begins = [starts[min(i, len(starts) - 1)] for i in numbers]
        shares = [range(begin, min(begin + micro_batch_size, len(data))) for begin in begins]
        batches = [data.read(share).shard(ctx.cp.rank, ctx.cp.size).to(ctx.device) for share in shares]
        number = {id(batch): i for batch, i in zip(batches, numbers, strict=True)}
        if ctx.pp.size > 1:
            pipelined_losses(stages_of(model), batches, ctx, count)  # on the ranks of the last stage
        else:
            (whole,), (batch,) = stages_of(model), batches
            count(batch, whole(batch.tokens, batch.labels, batch.documents))
        advance(len(numbers))
    all_reduce(sums, ctx.dp)
    all_reduce(sums, ctx.pp)
    totals = fold(sums)
    loss_sum, targets, byte_count, characters = read_back(totals, ctx.world)
    loss, bits = loss_sum / targets, loss_sum / math.log(2)
    per_byte = bits / byte_count if byte_count else None
    per_character = bits / characters if characters else None
    return ValidResult(loss, perplexity(loss), per_byte, per_character)
