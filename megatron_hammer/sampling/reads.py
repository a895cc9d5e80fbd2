"""Finds the samples and steps in which a run reads a given document: the inverse of ``TrainData.locate``.

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
from megatron_hammer.config.phases import Course
from megatron_hammer.sampling.order import DocumentSpan, IndependentOrder, MegatronOrder
from megatron_hammer.sampling.phases import MixSpan
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
    dataset = data.dataset(source)
    if not 0 <= document < dataset.num_documents:
        raise ConfigError(96, f"document {document} of {dataset.prefix}",
                          f"must lie in 0 to {dataset.num_documents} minus 1", "count documents from 0")  # fmt: skip
    reads: list[Read] = []
    for span, begin, until in data.order.within(start, end):
        share = span.share_of(source)
        if share == 0:
            continue
        order = span.order_of(source)
        if isinstance(order, MegatronOrder):
            first, last = (int(x) for x in dataset.document_indices[document : document + 2])
            windows = _megatron_windows(order, first, last)
        else:
            offset = span.offsets[span.sources.index(source)]
            low = max(0, math.floor(share * span.in_mix(begin)) - _LAG)
            high = math.ceil(share * span.in_mix(until)) + _LAG
            windows = _independent_windows(order, document, offset + low, offset + high)
        for position, window in windows:
            i = _sample_of(span, source, position, share, begin, until)
            if i is None:
                continue
            spans = [part for part in data.locate(i) if part.document == document]
            if spans:
                (epoch,) = order.epochs(np.array([window]))
                reads.append(Read(i, epoch, window, spans))
    return sorted(reads, key=lambda read: read.sample)


def _independent_windows(order: IndependentOrder, document: int, first: int, last: int) -> list[tuple[int, int]]:
    """(position, window) of the source's samples that may hold the document, around positions [first, last]."""
    length, s, total = int(order.lengths[document]), order.seq_length, order.num_tokens
    if length == 0:
        return []
    passes = list(order.passes(first, last))
    lowest = min(order.epochs(np.array([begin]))[0] for begin, _ in passes)
    highest = order.epochs(np.array([passes[-1][1]]))[0] + s // total + 1  # epochs that a window goes on into
    wanted: set[int] = set()
    for epoch in range(lowest, highest + 1):
        begin = epoch * total + _tokens_before(order, document, epoch)
        # A token is a target, or stands before the first target of a window.
        for target, count in order.rest.targets_at(begin, length + 1):
            wanted.update(range(target // s, (target + count - 1) // s + 1))
    found = []
    for begin, end in passes:
        windows = order.windows(begin, end - begin)
        at = np.flatnonzero(np.isin(windows, [window for window in wanted if begin <= window < end]))
        found += [(begin + int(place), int(windows[place])) for place in at]
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


def _megatron_windows(order: MegatronOrder, first: int, last: int) -> list[tuple[int, int]]:
    """As ``_independent_windows``, for a document of sequences [first, last): of the whole run."""
    places = np.flatnonzero((order.index.documents >= first) & (order.index.documents < last))
    boundaries = order.index.samples[:, 0].astype(np.int64)  # rising: where each window starts
    low = np.searchsorted(boundaries, places, side="left") - 1
    high = np.searchsorted(boundaries, places, side="right") - 1
    windows = sorted({w for a, b in zip(low.tolist(), high.tolist()) for w in range(max(a, 0), b + 1)})
    at = np.flatnonzero(np.isin(order.index.shuffle, windows))
    return list(zip(at.tolist(), order.index.shuffle[at].tolist()))


def _sample_of(span: MixSpan, source: int, position: int, share: float, start: int, end: int) -> int | None:
    """The sample of the run that is sample ``position`` of a source; None where it is not in [start, end)."""
    place = span.sources.index(source)
    position -= span.offsets[place]
    if position < 0:
        return None
    low = max(span.in_mix(start), math.floor((position - _LAG) / share))
    high = min(span.in_mix(end), math.ceil((position + _LAG + 1) / share))
    if high <= low:
        return None
    sources, positions = span.blend.range(low, high - low)
    at = np.flatnonzero((sources == place) & (positions == position))
    return span.first + low + int(at[0]) - span.start if len(at) else None


def describe_read(read: Read, course: Course) -> dict[str, Any]:
    """Plain values; steps are counted from 1."""
    return {
        "step": course.steps(read.sample + 1),
        "sample": read.sample,
        "epoch": read.epoch,
        "window": read.window,
        "pieces": [span._asdict() for span in read.spans],
    }
