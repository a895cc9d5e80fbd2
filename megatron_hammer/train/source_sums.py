"""Sums the losses, targets and bytes of a step by the data source that each target comes from.

The table of a step has a row for each source and four columns, over all targets t of the global batch, w their weights
(1 where there are none)::

    loss     sum of w x loss(t)          bytes        sum of w x UTF-8 bytes that t stands for
    weight   sum of w                    characters   sum of w x characters that t stands for

Specials count in the loss but stand for no text, as in evaluation. The sum of the whole table is the loss of the step,
so that the figures of sources and the loss cannot disagree.

A loss is rounded to a multiple of 2^-22 (2.4e-7; fp32 itself is coarser from 4 nats on), a weight too, and the sums are
fp64. Such sums are exact up to 2^31: global batches of 180 million tokens at a loss of 12. So they are the same bits
in any order: for every number of data-, context- and pipeline-parallel ranks, on CPUs and by a GPU's atomic additions.

One all-reduce of the table replaces that of the loss. Nothing here waits for the device. Legend: n micro-batches of b
samples of s targets, S sources, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.sampling.batch import Batch
from megatron_hammer.tokenizer.interface import Tokenizer

QUANTA = 2.0**22
"""In 1: what losses and weights are multiples of."""
LOSS, WEIGHT, BYTES, CHARACTERS = range(4)
SMALLEST_SUM = 1e-20  # of weights that mean something; a loss scale of 2^60 divided by it is still finite in fp32


@dataclass(frozen=True)
class Sources:
    """What sums by source need to know."""

    count: int = 1
    """S; batches that do not say where their samples come from are all of source 0."""
    sizes: Tensor | None = None
    """[v] int64 on the device: 2^32 x the bytes that an id stands for, plus its characters, so that one look-up gives
    both; None without a tokenizer."""


ONE_SOURCE = Sources()


def sizes_of(tokenizer: Tokenizer, vocab_size: int, sentinels: Sequence[int] = ()) -> Tensor:
    """``Sources.sizes``, on the CPU; ids beyond the tokenizer's and ``sentinels`` stand for nothing."""
    sizes = torch.zeros(vocab_size, dtype=torch.int64)
    packed = torch.from_numpy(tokenizer.piece_bytes()).long() << 32 | torch.from_numpy(tokenizer.piece_characters())
    sizes[: tokenizer.vocab_size] = packed
    sizes[list(sentinels)] = 0
    return sizes


def unpack(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes, characters), of ``Sources.sizes`` or sums of them below 2^31, as fp64."""
    return (sizes >> 32).double(), (sizes & 0xFFFF_FFFF).double()


@torch.no_grad()
def sum_by_source(
    batches: Sequence[Batch[Tensor]], losses: Sequence[Tensor], sources: Sources, device: torch.device
) -> Tensor:
    """This rank's part of the table: [S, 4] fp64.

    Args:
        batches: those whose losses this rank has, all of one shape; none on a stage without a head.
        losses: [b, s] of each.
    """
    table = torch.zeros(sources.count, 4, dtype=torch.float64, device=device)
    if not losses:
        return table
    found = torch.stack(list(losses)).double()  # [n, b, s]
    labels = torch.stack([batch.labels for batch in batches]) if sources.sizes is not None else None
    sizes = sources.sizes[labels] if sources.sizes is not None else torch.zeros_like(found, dtype=torch.int64)
    of_samples = all(batch.sources is None or batch.sources.dim() == 1 for batch in batches)
    if all(batch.loss_weights is None for batch in batches):
        columns = [_rounded(found), torch.ones_like(found)]
        if of_samples:  # packed: the sizes of a sample's tokens stay below 2^31
            columns, sizes = [column.sum(-1) for column in columns], sizes.sum(-1)
        columns += unpack(sizes)
    else:
        w = torch.stack([weights_of(batch) for batch in batches]).double()
        exact = _rounded(w)
        columns = [_rounded(found * w), exact, *(exact * size for size in unpack(sizes))]
        if of_samples:
            columns = [column.sum(-1) for column in columns]
    numbers = torch.stack([_numbers(batch, of_samples) for batch in batches]).flatten()
    return table.index_add_(0, numbers, torch.stack([column.flatten() for column in columns], dim=1))


def _rounded(values: Tensor) -> Tensor:
    return values.mul(QUANTA).round_().div_(QUANTA)


def weights_of(batch: Batch[Tensor]) -> Tensor:
    """By how much each of its targets counts: [b, s] fp32."""
    weights = batch.loss_weights
    return torch.ones_like(batch.labels, dtype=torch.float32) if weights is None else weights


def _numbers(batch: Batch[Tensor], of_samples: bool) -> Tensor:
    """The source of each sample, or of each target."""
    if batch.sources is None:
        shape = batch.labels.shape[:1] if of_samples else batch.labels.shape
        return torch.zeros(shape, dtype=torch.int64, device=batch.labels.device)
    return batch.sources if of_samples or batch.sources.dim() == 2 else batch.sources[:, None].expand_as(batch.labels)


def mean_loss(table: Tensor) -> Tensor:
    """Of the global batch, from the whole table: fp32 device scalar; 0 where nothing counts."""
    total = table.sum(0)
    return (total[LOSS] / total[WEIGHT].clamp_min(SMALLEST_SUM)).float()


def source_figures(
    names: Sequence[str], table: Sequence[Sequence[float]], consumed: Mapping[int, int]
) -> dict[str, Any]:
    """What metrics.jsonl says of the sources that gave something to a step; the others are left out.

    Args:
        names: of all sources.
        table: that of the step, on the host.
        consumed: number of each source in the step -> targets that the run has read from it up to here.
    """
    figures: dict[str, Any] = {}
    for number in sorted(consumed):
        loss, weight, num_bytes, characters = table[number]
        bits, key = loss / math.log(2), f"source/{names[number]}"
        figures[f"{key}/loss"] = loss / weight if weight else None
        figures[f"{key}/bits_per_byte"] = bits / num_bytes if num_bytes else None
        figures[f"{key}/bits_per_character"] = bits / characters if characters else None
        figures[f"{key}/tokens"] = consumed[number]
    return figures
