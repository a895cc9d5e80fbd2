"""Which window of which source is sample i of a run, over all its phases.

::

    samples         0 ------------ a ------------- b --------->      a span: samples that one mix gives
    source zh         7 of 10        1 of 2          -               each has a blend that begins with it, and the place
    source en         3 of 10        1 of 2          1               in its order at which each source goes on

A span begins each source where those before have left it, so that the passes over a source are the same whatever
phases draw from it. Phases of one mix that follow each other are one span: a phase that is cut in two, or whose
neighbour continues it, changes nothing. Where the length of samples changes, a source goes on with what is unread
(``rest.py``). A source is known by its content, so a path that moves, or another place in the mix, changes nothing.

A run may leave samples of this order out (``ledger.py``): its spans are then cut there, and numbered without them.

All of this is a function of the phases and the sources: the number of a sample alone says its place. Which samples
belong to which step is decided above this room, by ``RunState``, which counts them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatron_hammer.sampling.blend import Blend
from megatron_hammer.sampling.cache import IndexStore
from megatron_hammer.sampling.ledger import Range, Rewind
from megatron_hammer.sampling.order import IndependentOrder, MegatronOrder, SampleId

SourceOrder = IndependentOrder | MegatronOrder


@dataclass(frozen=True)
class Mix:
    """What a phase says of its samples."""

    first: int
    end: int | None
    """Number of the sample behind the last; None: it goes on."""
    seq_length: int
    shares: Mapping[int, float]
    """Source, by its place among those of the run -> share of the samples."""

    def goes_on_as(self, other: Mix) -> bool:
        """Whether another mix has the same shares and length of samples."""
        return self.seq_length == other.seq_length and dict(self.shares) == dict(other.shares)


def merged(mixes: Sequence[Mix]) -> list[Mix]:
    """The same, with neighbours that draw alike in one, and empty ones left out."""
    found: list[Mix] = []
    for mix in mixes:
        if mix.end is not None and mix.end <= mix.first:
            continue
        if found and found[-1].goes_on_as(mix):
            found[-1] = Mix(found[-1].first, mix.end, mix.seq_length, found[-1].shares)
        else:
            found.append(mix)
    return found


@dataclass(frozen=True, eq=False)
class MixSpan:
    """Samples [first, end) of the run, which one mix gives."""

    first: int
    end: int | None
    seq_length: int
    sources: tuple[int, ...]
    """Those of the mix, by their places among those of the run."""
    blend: Blend
    offsets: tuple[int, ...]
    """Of each of ``sources``: samples that the mixes before have taken from its order."""
    orders: Sequence[SourceOrder]
    """Of each of ``sources``."""
    start: int = 0
    """Which sample of the mix the first one is."""

    def share_of(self, source: int) -> float:
        """Of its samples; 0 where the source is not in the mix."""
        return float(self.blend.weights[self.sources.index(source)]) if source in self.sources else 0.0

    def order_of(self, source: int) -> SourceOrder:
        """The order of a source of the mix."""
        return self.orders[self.sources.index(source)]

    def in_mix(self, sample: int) -> int:
        """Which sample of the mix a sample of the run is."""
        return sample - self.first + self.start

    def drawn_before(self, sample: int) -> list[int]:
        """How many samples each of ``sources`` gives to the mix before a sample of the run, or before ``end``."""
        counts: list[int] = self.blend.counts(self.in_mix(sample)).tolist()
        return counts


@dataclass(frozen=True, eq=False)
class SourceWindows:
    """Consecutive samples' windows of one source."""

    source: int
    order: SourceOrder
    rows: np.ndarray
    """Which of the samples asked for, counted from the first of them."""
    windows: np.ndarray
    """Which windows of the order these are."""


@dataclass(frozen=True)
class Skips:
    """What the lines of a ledger leave out, together: the numbers of a run's samples, and their places in the order."""

    ranges: tuple[Range, ...] = ()
    """Rising and apart."""

    @classmethod
    def of(cls, ledger: Sequence[Rewind]) -> Skips:
        """Those of a ledger."""
        return cls(tuple(sorted(part for rewind in ledger for part in rewind.skipped)))

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Where samples [first, first + count) of the run lie in the order: (place, how many from there on)."""
        left_out = 0
        for start, end in self.ranges:
            taken = min(count, start - left_out - first)
            if taken > 0:
                yield first + left_out, taken
                first, count = first + taken, count - taken
                if count == 0:
                    return
            left_out += end - start
        yield first + left_out, count

    def place(self, number: int) -> int:
        """Of one sample of the run in the order."""
        return next(self.pieces(number, 1))[0]

    def end(self, number: int) -> int:
        """The place behind the samples of the run before ``number``: what is left out from there on lies behind it."""
        return self.place(number - 1) + 1 if number > 0 else 0


NO_SKIPS = Skips()


def without(spans: Sequence[MixSpan], skips: Skips) -> list[MixSpan]:
    """The spans of a run that leaves places of these out: cut there, and numbered without them."""
    kept: list[MixSpan] = []
    begins, stops, number = [0, *(end for _, end in skips.ranges)], [*(first for first, _ in skips.ranges), None], 0
    for span in spans:
        for begin, stop in zip(begins, stops, strict=True):
            low = max(begin, span.first)
            high = min((place for place in (stop, span.end) if place is not None), default=None)
            if high is None or low < high:
                end = None if high is None else number + high - low
                kept.append(replace(span, first=number, end=end, start=low - span.first))
                number = end or number  # behind one without an end comes none
    return kept


class SampleOrder:
    """The samples of a run, span after span.

    Args:
        spans: where nothing is left out.
        num_samples: length of the run where its order ends with it; None: it has no end.
        skips: what the run leaves out.
    """

    def __init__(self, spans: Sequence[MixSpan], num_samples: int | None = None, skips: Skips = NO_SKIPS) -> None:
        self.spans, self.num_samples, self.skips = without(spans, skips), num_samples, skips
        self._laid_out = spans

    @property
    def whole(self) -> SampleOrder:
        """The order with nothing left out: its numbers are the places of which ``skips`` and the ledger speak."""
        return SampleOrder(self._laid_out, self.num_samples)

    def within(self, first: int, end: int) -> Iterator[tuple[MixSpan, int, int]]:
        """(span, first, end) of the parts of samples [first, end)."""
        at = bisect_right(self.spans, first, key=lambda span: span.first) - 1
        while first < end:
            if at == len(self.spans):
                raise IndexError(f"samples [{first}, {end}) are behind the end of the run")
            span = self.spans[at]
            until = end if span.end is None else min(end, span.end)
            yield span, first, until
            first, at = until, at + 1

    def span_at(self, sample: int) -> MixSpan:
        """The span that holds a sample."""
        return next(self.within(sample, sample + 1))[0]

    def parts(self, first: int, count: int) -> Iterator[SourceWindows]:
        """The windows that samples [first, first + count) are, by source."""
        if first < 0 or count < 1 or (self.num_samples is not None and first + count > self.num_samples):
            raise IndexError(f"samples [{first}, {first + count}) are not in [0, {self.num_samples})")
        for span, begin, end in self.within(first, first + count):
            number, before, in_mix = end - begin, begin - first, begin - span.first + span.start
            if len(span.sources) == 1:
                order, rows = span.orders[0], np.arange(before, before + number)
                yield SourceWindows(span.sources[0], order, rows, order.windows(span.offsets[0] + in_mix, number))
                continue
            places, positions = span.blend.range(in_mix, number)
            for place in np.unique(places).tolist():
                rows = np.flatnonzero(places == place)  # the samples of one source follow each other
                order, at = span.orders[place], span.offsets[place] + int(positions[rows[0]])
                yield SourceWindows(span.sources[place], order, rows + before, order.windows(at, len(rows)))

    def ids(self, first: int, count: int) -> list[SampleId]:
        """The names of samples [first, first + count)."""
        named: list[SampleId | None] = [None] * count
        for part in self.parts(first, count):
            epochs, windows = part.order.epochs(part.windows), part.windows.tolist()
            for row, epoch, window in zip(part.rows.tolist(), epochs, windows, strict=True):
                named[row] = SampleId(part.source, epoch, window)
        return [name for name in named if name is not None]

    def prepare(self, first: int, end: int) -> None:
        """Build, or find, every index that samples [first, end) need."""
        for span, begin, until in self.within(first, end):
            before, after = span.drawn_before(begin), span.drawn_before(until)
            for order, offset, low, high in zip(span.orders, span.offsets, before, after, strict=True):
                if high > low:
                    order.prepare(offset + low, offset + high - 1)


@dataclass(frozen=True, eq=False)
class Source:
    """What the order of a source follows from."""

    lengths: np.ndarray
    """Tokens of each document."""
    fingerprint: str
    store: IndexStore | None = None


def lay_out(
    mixes: Sequence[Mix],
    sources: Sequence[Source],
    seed: int,
    num_samples: int | None = None,
    skips: Skips = NO_SKIPS,
) -> SampleOrder:
    """The order of a run in phases.

    Args:
        mixes: one after the other from sample 0.
        sources: those of all mixes.
        seed: of the run.
        num_samples: length of the run, as its present batch size gives it: counts of a mix without an end are kept
            for it at once. The samples do not depend on it; a run that had larger batches has read more already.
        skips: what the run leaves out; a mix has so many more places as are left out in it.
    """
    if num_samples is not None:
        num_samples = skips.end(num_samples)
    mixes = [
        replace(mix, first=skips.end(mix.first), end=None if mix.end is None else skips.end(mix.end)) for mix in mixes
    ]
    spans: list[MixSpan] = []
    orders: dict[int, IndependentOrder] = {}
    taken = [0] * len(sources)  # samples of the present order of each source
    for mix in merged(mixes):
        drawn_from = tuple(sorted(mix.shares))
        for place in drawn_from:
            source, order = sources[place], orders.get(place)
            if order is None or order.seq_length != mix.seq_length:
                rest = {} if order is None else {"rest": partial(order.rest_after, taken[place])}
                orders[place] = IndependentOrder(
                    source.lengths, source.fingerprint, mix.seq_length, seed, source.store, **rest
                )
                taken[place] = 0
        end = num_samples if mix.end is None else mix.end
        length = None if end is None else max(0, end - mix.first)
        shares = np.array([mix.shares[place] for place in drawn_from])
        store = next((store for place in drawn_from if (store := sources[place].store) is not None), None)
        blend = Blend(shares, "chairman", store, length)
        offsets = tuple(taken[place] for place in drawn_from)
        span = MixSpan(
            mix.first, mix.end, mix.seq_length, drawn_from, blend, offsets, [orders[place] for place in drawn_from]
        )
        spans.append(span)
        if mix.end is not None:
            for place, drawn in zip(drawn_from, span.drawn_before(mix.end), strict=True):
                taken[place] += drawn
    return SampleOrder(spans, skips=skips)
