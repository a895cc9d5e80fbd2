"""Phases: each source goes on where it stood, at any edit of what has not been consumed."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.config.phases import BatchSizes, Course, Phase
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.sampling import blend
from megatron_hammer.sampling import samples as samples_module
from megatron_hammer.sampling.cache import IndexStore
from megatron_hammer.sampling.order import IndependentOrder, SampleId
from megatron_hammer.sampling.phases import Mix, SampleOrder, Skips, Source, lay_out
from megatron_hammer.sampling.reads import document_reads
from megatron_hammer.sampling.samples import TrainData, describe_samples
from tests.dataset.written import write_dataset

LENGTHS = ([5, 0, 1, 40, 12, 3, 0, 9], [30] * 7, [6, 2, 2, 11], [90])
SOURCES = [Source(np.array(lengths, np.int32), f"fingerprint {i}") for i, lengths in enumerate(LENGTHS)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mix draws 65,536 samples at once, of which these tests need few."""
    monkeypatch.setattr(blend, "_BLOCK", 64)


def mixes_of(*phases: tuple[int | None, dict[int, float], int]) -> list[Mix]:
    """(samples, weights, seq_length) of each phase, placed one after the other."""
    mixes, first = [], 0
    for samples, weights, seq_length in phases:
        end = None if samples is None else first + samples
        total = sum(weights.values())
        mixes.append(Mix(first, end, seq_length, {source: w / total for source, w in weights.items()}))
        first = end or 0
    return mixes


def order_of(*phases: tuple[int | None, dict[int, float], int]) -> SampleOrder:
    return lay_out(mixes_of(*phases), SOURCES, seed=7)


def read_targets(order: SampleOrder, count: int) -> dict[int, np.ndarray]:
    """Source -> the positions in its endless stream that the first samples have as targets, in the order of reading."""
    found: dict[int, list[np.ndarray]] = {}
    for span, first, end in order.within(0, count):
        for part in order.parts(first, end - first):
            s = span.seq_length
            numbers = (part.windows[:, None] * s + np.arange(s)).ravel()
            found.setdefault(part.source, []).append(part.order.rest.positions(numbers))
    return {source: np.concatenate(parts) for source, parts in found.items()}


def check_passes(order: SampleOrder, count: int) -> int:
    """Of each source: no target read twice, none left out but those that the unfinished pass has still to come."""
    checked = 0
    for source, targets in read_targets(order, count).items():
        span = [s for s, _, _ in order.within(0, count) if source in s.sources][-1]
        place = span.sources.index(source)
        end = count if span.end is None else min(count, span.end)
        drawn_from = span.order_of(source)
        rest = drawn_from.rest_after(span.offsets[place] + span.drawn_before(end)[place])
        unread = [np.arange(p, p + n) for p, n in rest.intervals(0, rest.unfinished)]
        assert len(np.unique(targets)) == len(targets), "a target was read twice"
        whole = np.sort(np.concatenate([targets, *unread]))
        assert np.array_equal(whole, np.arange(1, rest.goes_on_at + 1)), "a target was left out"
        checked += len(targets)
    return checked


REPORTED = {
    "a source is added": [(41, {0: 1, 1: 1}, 8), (None, {0: 1, 1: 1, 2: 1}, 8)],
    "a source is dropped": [(41, {0: 1, 1: 1, 2: 1}, 8), (None, {0: 1, 1: 1}, 8)],
    "1:1 to 1:3 and back": [(41, {0: 1, 1: 1}, 8), (30, {0: 1, 1: 3}, 8), (None, {0: 1, 1: 1}, 8)],
    "a source goes and comes back": [(11, {0: 1, 1: 2}, 8), (9, {0: 1}, 8), (None, {0: 1, 1: 1}, 8)],
    "a longer context": [(13, {0: 1, 1: 1}, 4), (None, {0: 1, 1: 1}, 32)],
    "longer, and shorter again": [(13, {1: 1}, 4), (2, {1: 1}, 32), (None, {1: 1}, 5)],
    "longer than all of a source": [(3, {2: 1}, 4), (None, {2: 1}, 64)],
}


@pytest.mark.parametrize("phases", REPORTED.values(), ids=REPORTED)
def test_what_was_reported_reads_nothing_twice_and_leaves_nothing_out(phases: list) -> None:
    order = order_of(*phases)
    for count in (1, 40, 41, 42, 60, 71, 72, 130):
        assert check_passes(order, count) >= count * 4


def random_phases(rng: np.random.Generator) -> list[tuple[int | None, dict[int, float], int]]:
    phases: list[tuple[int | None, dict[int, float], int]] = []
    for _ in range(int(rng.integers(1, 6))):
        chosen = rng.choice(len(SOURCES), int(rng.integers(1, len(SOURCES) + 1)), replace=False)
        weights = {int(source): float(rng.integers(1, 4)) for source in chosen}
        phases.append((int(rng.integers(1, 30)), weights, int(rng.choice([4, 4, 4, 7, 16]))))
    return [*phases[:-1], (None, *phases[-1][1:])]


def edited(
    rng: np.random.Generator, phases: list[tuple[int | None, dict[int, float], int]], consumed: int
) -> list[tuple[int | None, dict[int, float], int]]:
    """Other phases that are the same up to a sample: what lies behind it is lengthened, cut, changed or made anew."""
    kept, first = [], 0
    for samples, weights, seq_length in phases:
        if samples is not None and first + samples <= consumed:
            kept.append((samples, weights, seq_length))
            first += samples
            continue
        behind = consumed - first
        backwards = dict(reversed([(source, 2 * weight) for source, weight in weights.items()]))  # the same mix
        kept += [(behind + int(rng.integers(0, 20)), backwards, seq_length)] if behind else []
        break
    return [*kept, *random_phases(rng)]


def test_a_thousand_edits_change_nothing_that_is_consumed() -> None:
    """Random edits of random lists of phases: 0 targets read twice, 0 left out, the past the same by name."""
    rng, checked = np.random.default_rng(125), 0
    for _ in range(125):
        phases = random_phases(rng)
        before = order_of(*phases)
        for _ in range(8):
            consumed, more = int(rng.integers(1, 60)), int(rng.integers(1, 25))
            phases = edited(rng, phases, consumed)
            after = order_of(*phases)
            assert after.ids(0, consumed) == before.ids(0, consumed)
            checked += check_passes(after, consumed + more)
            before = after
    assert checked > 250_000, checked


def test_any_way_of_asking_gives_the_same_samples() -> None:
    """At any batch size, rank or start: a sample is named by its number alone."""
    order = order_of((13, {0: 1, 1: 2}, 4), (9, {1: 1, 3: 1}, 16), (None, {0: 1}, 4))
    ids = order.ids(0, 60)
    for first, count in ((0, 60), (5, 20), (12, 2), (21, 3), (59, 1)):
        assert order.ids(first, count) == ids[first : first + count]
    assert [order.ids(i, 1)[0] for i in range(60)] == ids and SampleId(0, 0, 0)._fields == ("source", "epoch", "window")


@pytest.mark.parametrize("left_out", [(), ((0, 3),), ((12, 14),), ((13, 22),), ((5, 6), (10, 25), (40, 41))])
def test_what_is_left_out_only_renumbers(left_out: tuple[tuple[int, int], ...]) -> None:
    """A sample is the i-th place that is not left out, over the ends of spans too, and so is what sources give."""
    phases = (13, {0: 1, 1: 2}, 4), (9, {1: 1, 3: 1}, 16), (None, {0: 1}, 4)
    skips = Skips(left_out)
    order = lay_out(mixes_of(*phases), SOURCES, 7, skips=skips)
    ids = order.ids(0, 60)
    assert ids == [order.whole.ids(skips.place(i), 1)[0] for i in range(60)]
    for first, count in ((7, 11), (0, 1), (59, 1), (2, 50)):
        assert order.ids(first, count) == ids[first : first + count]
        for span, begin, end in order.within(first, first + count):
            given = [sum(name.source == source for name in ids[begin:end]) for source in span.sources]
            before, after = span.drawn_before(begin), span.drawn_before(end)
            assert [high - low for low, high in zip(before, after, strict=True)] == given


def test_a_run_that_had_larger_batches_reads_beyond_its_length() -> None:
    """Its length is that of its steps at the present batch size, of which it may have read more."""
    phases = (20, {0: 1}, 4), (20, {1: 1}, 8), (None, {0: 1, 2: 1}, 4)
    short = lay_out(mixes_of(*phases), SOURCES, 7, num_samples=10)
    assert short.ids(0, 60) == order_of(*phases).ids(0, 60)


def test_phases_of_one_mix_are_one() -> None:
    """A phase that is cut in two, or lengthened by its neighbour, is the same run; so is ``data.train`` alone."""
    whole = order_of((None, {0: 1, 1: 2}, 8))
    cut = order_of((17, {1: 4, 0: 2}, 8), (5, {0: 1, 1: 2}, 8), (None, {0: 1, 1: 2}, 8))
    assert len(cut.spans) == 1 and cut.ids(0, 50) == whole.ids(0, 50)


def test_an_untouched_source_is_as_if_it_had_never_been_shorter() -> None:
    """What was not read before the length changes begins as in a run of the new length."""
    order = order_of((20, {0: 1}, 4), (None, {1: 1}, 8))
    fresh = order_of((None, {1: 1}, 8))
    assert order.ids(20, 30) == fresh.ids(0, 30)


def test_tokens_of_a_rest_are_those_of_its_targets() -> None:
    """Every window is its targets in order, and before them the token that stands before the first."""
    lengths = np.array(LENGTHS[0], np.int32)
    old = IndependentOrder(lengths, "f", 4, 7)
    new = IndependentOrder(lengths, "f", 11, 7, rest=lambda: old.rest_after(9))
    new.prepare(0, 20)

    def stream(position: int) -> tuple[int, int]:
        (span,) = old._locate_tokens(position, 1)
        return span.document, span.offset

    windows = new.windows(0, 12)
    spans, counts = new.locate_all(windows)
    at = 0
    for window, count in zip(windows.tolist(), counts.tolist(), strict=True):
        targets = list(itertools.chain(*(range(p, p + n) for p, n in new.rest.intervals(window * 11, 11))))
        found = [(d, o + i) for d, o, n in spans[at : at + count].tolist() for i in range(n)]
        assert found == [stream(position) for position in (targets[0] - 1, *targets)]
        at += count
    assert new.epochs(windows) == [(new.rest.intervals(w * 11, 1)[0][0] - 1) // 70 for w in windows.tolist()]


def test_a_rest_is_kept_and_found_again(tmp_path: Path) -> None:
    """Of a large source it is made once: a file, keyed by what has been read."""
    lengths = np.array(LENGTHS[0] * 9, np.int32)
    store = IndexStore(tmp_path, smallest=1)
    made, found = (IndependentOrder(lengths, "f", 4, 7, store).rest_after(31) for _ in range(2))
    plain = IndependentOrder(lengths, "f", 4, 7).rest_after(31)
    assert len(list(tmp_path.glob("rest*.index"))) == 1
    for rest in (made, found):
        assert rest.pieces.tolist() == plain.pieces.tolist() and rest.firsts.tolist() == plain.firsts.tolist()
        assert (rest.unfinished, rest.goes_on_at, rest.tag) == (plain.unfinished, plain.goes_on_at, plain.tag)


def test_samples_are_read_and_documents_found_through_all_phases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``read`` across the end of a phase gives what ``tokens`` gives one by one; documents are found at every length,
    and ``documents`` of a batch ends where pieces of a rest that were no neighbours meet."""
    prefixes = [str(tmp_path / name) for name in "ab"]
    for seed, (prefix, lengths) in enumerate(zip(prefixes, LENGTHS, strict=False)):
        write_dataset(prefix, lengths, seed=seed)
    a, b = prefixes
    phases = [
        Phase("0", 0, 9, {a: 1, b: 1}, "share", 4, 1.0, None),
        Phase("1", 9, 16, {b: 2, a: 1}, "share", 4, 1.0, None),
        Phase("2", 16, None, {a: 1, b: 1}, "share", 11, 1.0, None),
    ]
    opened: list[str] = []
    monkeypatch.setattr(
        samples_module, "IndexedDataset", lambda prefix: opened.append(prefix) or IndexedDataset(prefix)
    )
    data = TrainData(phases, 4, 7, document_mask=True)
    assert opened == prefixes, "each once"
    assert [str(dataset.prefix) in prefixes for dataset in data.sources] == [True, True]
    for first, count in ((5, 11), (16, 20)):
        batch = data.read(first, count)
        assert batch.tokens.shape == (count, data.seq_length_at(first)) and batch.sources is not None
        for row, i in enumerate(range(first, first + count)):
            assert batch.windows is not None and batch.windows[row].tolist() == data.tokens(i).tolist()
            assert batch.sources[row] == data.sample_id(i).source
            ends = np.cumsum([n for _, _, n in data.locate(i)])[:-1] + row * batch.tokens.shape[1]
            assert set(ends.tolist()) <= set(batch.documents.tolist()) | {(row + 1) * batch.tokens.shape[1]}
    described = describe_samples(data, 0, 40)
    for source, dataset in enumerate(data.sources):
        for document in range(dataset.num_documents):
            expected = [s["sample"] for s in described if s["source"] == str(dataset.prefix)
                        and any(piece["document"] == document for piece in s["pieces"])]  # fmt: skip
            assert [read.sample for read in document_reads(data, source, document, 0, 40)] == expected


def test_batch_sizes_are_a_function_of_consumed_samples() -> None:
    ramp = BatchSizes(((0, 4), (10, 8), (30, 16)))
    consumed, ends = 0, [0]
    for _ in range(12):
        consumed += ramp.at(consumed)
        ends.append(consumed)
    assert ends[:7] == [0, 4, 8, 12, 20, 28, 36]
    assert [ramp.samples(n) for n in range(13)] == ends
    for sample in range(100):
        assert ramp.step_end(sample) == min(end for end in ends if end >= sample)
        assert ramp.steps(sample) == sum(end < sample for end in ends)
    assert ramp.samples(2, start=9) == 9 + 4 + 8 and ramp.steps(22, start=9) == 3
    # What was done is told as it was, what is to come goes on from there.
    ends = [0, 3, 9, 18, 20, 28, 44, 60, 76]  # the first six steps by another ramp
    course = Course(ramp, 8, range(7), ends[:7])
    assert [course.samples(n) for n in range(9)] == ends and course.num_samples == 76 and not course.is_even
    assert [course.steps(sample) for sample in range(77)] == [sum(end < s for end in ends) for s in range(77)]
    # Where a line is missing, the steps in the gap are told as the ramp has them, and lie in it.
    gap = Course(ramp, 8, (0, 3, 6), (0, 18, 44))
    assert [gap.samples(n) for n in range(9)] == [0, 4, 8, 18, 26, 34, 44, 60, 76]
    assert gap.steps(18) == 3 and gap.steps(44) == 6 and gap.steps(45) == 7
    assert Course(ramp, 9, (0, 7), (0, 20)).steps(20) == 7, "more steps than the ramp has for so many samples"
    assert Course(ramp, 5).is_even and Course(ramp, 5, (0, 6), (0, 36)).num_samples == 36, "a run past its end"
