"""When does a run read this document: the inverse of ``TrainData.locate``.

For each epoch: the place of the document in the stream, the windows over it, the samples of the source that are those
windows, the samples of the run that are those samples. Nothing is stored for it; an epoch costs one pass over its
permutations (some 20 ns a document and a window).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.sampling.order import DocumentSpan, IndependentOrder, MegatronOrder, SampleId
from megatron_hammer.sampling.samples import TrainData

_DOCUMENTS_AT_ONCE = 1 << 20
_LAG = 3  # samples by which a source may be ahead or behind its share; the mixes stay below 1 and 1.5


@dataclass(frozen=True)
class Read:
    """A sample of the run that holds tokens of the document."""

    sample: int
    epoch: int
    window: int
    spans: list[DocumentSpan]
    """Of this document only."""


def find_source(data: TrainData, name: str) -> int:
    """The source whose prefix is ``name``, or ends with it as a path does.

    Raises:
        ConfigError: E296 none or several.
    """
    prefixes = [str(dataset.prefix) for dataset in data.sources]
    found = [i for i, prefix in enumerate(prefixes) if prefix == name]
    found = found or [i for i, prefix in enumerate(prefixes) if prefix.endswith(f"/{name}")]
    if len(found) != 1:
        raise ConfigError(96, f"source {name}", f"is {'none' if not found else 'more than one'} of data.train",
                          f"name one of {', '.join(prefixes)}")  # fmt: skip
    return found[0]


def document_reads(data: TrainData, source: int, document: int, start: int, end: int) -> list[Read]:
    """The samples [start, end) of the run that read a document, in order.

    Args:
        data: the run's samples.
        source: its place among ``data.sources``.
        document: its number in that source.

    Raises:
        ConfigError: E296 no such document.
    """
    dataset, order = data.sources[source], data.orders[source]
    if not 0 <= document < dataset.num_documents:
        raise ConfigError(96, f"document {document} of {dataset.prefix}",
                          f"must lie in 0 to {dataset.num_documents} minus 1", "count documents from 0")  # fmt: skip
    share = float(data.shares[source])
    if isinstance(order, MegatronOrder):
        first, last = (int(x) for x in dataset.document_indices[document : document + 2])
        windows = _megatron_windows(order, first, last)
    else:
        positions = max(0, math.floor(share * start) - _LAG), math.ceil(share * end) + _LAG
        windows = _independent_windows(order, document, *positions)
    reads = []
    for position, sample_id in windows:
        i = _sample_of(data, SampleId(source, *sample_id), position, share, start, end)
        if i is not None:
            spans = [span for span in data.locate(i) if span.document == document]
            if spans:
                reads.append(Read(i, *sample_id, spans))
    return sorted(reads, key=lambda read: read.sample)


def _independent_windows(
    order: IndependentOrder, document: int, first: int, last: int
) -> list[tuple[int, tuple[int, int]]]:
    """(position, (epoch, window)) of the source's samples that hold the document, around positions [first, last]."""
    length, s, total = int(order.lengths[document]), order.seq_length, order.num_tokens
    if length == 0:
        return []
    reach = s // total + 1  # epochs that a window goes on into
    epochs = range(first * s // total, last * s // total + reach + 1)
    wanted: dict[int, list[int]] = {}
    for epoch in epochs:
        begin = epoch * total + _tokens_before(order, document, epoch)
        for window in range(max(0, -(-(begin - s) // s)), (begin + length - 1) // s + 1):
            wanted.setdefault(window * s // total, []).append(window)
    found = []
    for epoch, of_epoch in wanted.items():
        position, behind = (-(-e * total // s) for e in (epoch, epoch + 1))  # samples before this epoch and the next
        windows = order.windows(position, behind - position)
        at = np.flatnonzero(np.isin(windows, of_epoch))
        found += [(position + int(place), (epoch, int(windows[place]))) for place in at]
    return found


def _tokens_before(order: IndependentOrder, document: int, epoch: int) -> int:
    """Tokens of an epoch's stream before a document."""
    before = 0
    for first in range(0, len(order.lengths), _DOCUMENTS_AT_ONCE):
        block = order.documents(epoch, first, min(_DOCUMENTS_AT_ONCE, len(order.lengths) - first))
        here = np.flatnonzero(block == document)
        if len(here):
            block = block[: here[0]]
        before += int(order.lengths[block].sum(dtype=np.int64))
        if len(here):
            return before
    raise AssertionError("a permutation holds every document")


def _megatron_windows(order: MegatronOrder, first: int, last: int) -> list[tuple[int, tuple[int, int]]]:
    """As ``_independent_windows``, for a document of sequences [first, last): of the whole run."""
    places = np.flatnonzero((order.index.documents >= first) & (order.index.documents < last))
    boundaries = order.index.samples[:, 0].astype(np.int64)  # rising: where each window starts
    low = np.searchsorted(boundaries, places, side="left") - 1
    high = np.searchsorted(boundaries, places, side="right") - 1
    windows = sorted({w for a, b in zip(low.tolist(), high.tolist()) for w in range(max(a, 0), b + 1)})
    at = np.flatnonzero(np.isin(order.index.shuffle, windows))
    found = order.index.shuffle[at].tolist()
    return [(p, (w * order.seq_length // order.num_tokens, w)) for p, w in zip(at.tolist(), found)]


def _sample_of(data: TrainData, wanted: SampleId, position: int, share: float, start: int, end: int) -> int | None:
    """The sample of the run that is sample ``position`` of a source; None where it is not in [start, end)."""
    if len(data.sources) == 1:
        return position if start <= position < end else None
    low, high = math.floor((position - _LAG) / share), math.ceil((position + _LAG + 1) / share)
    return next((i for i in range(max(low, start), min(high, end)) if data.sample_id(i) == wanted), None)


def describe_read(read: Read, global_batch_size: int) -> dict[str, Any]:
    """Plain values; steps are counted from 1 and all have the same size."""
    return {
        "step": read.sample // global_batch_size + 1,
        "sample": read.sample,
        "epoch": read.epoch,
        "window": read.window,
        "pieces": [span._asdict() for span in read.spans],
    }
