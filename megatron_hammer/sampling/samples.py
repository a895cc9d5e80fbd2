"""Samples: what sample number i of a run is, and its tokens; validation samples in the order of their file.

``phases.py`` and ``blend.py`` say which source gives sample i and which of its samples that is, ``order.py`` which
tokens those are, ``dataset/reader.py`` reads them. A training sample is a window of seq_length + 1 tokens, inputs and
labels shifted by one; the loss runs across the documents in it, and so does attention unless a batch says where they
lie (``Batch.documents``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.base.mapping import SURVIVES_CUTS
from megatron_hammer.base.progress import say
from megatron_hammer.config import Config
from megatron_hammer.config.phases import Course, Phase
from megatron_hammer.dataset.format import REMAKE
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.absent import AbsentSource
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.blend import Blend
from megatron_hammer.sampling.cache import IndexStore
from megatron_hammer.sampling.fill_in_the_middle import FillInTheMiddle, Infill, open_fim, source_key
from megatron_hammer.sampling.ledger import Rewind
from megatron_hammer.sampling.order import DocumentSpan, MegatronOrder, SampleId
from megatron_hammer.sampling.phases import NO_SKIPS, Mix, MixSpan, SampleOrder, Skips, Source, SourceWindows, lay_out
from megatron_hammer.sampling.plan import WeightUnit, sampling_weights
from megatron_hammer.sampling.sources import SourceKey, keys_in_mix, source_keys, source_names
from megatron_hammer.tokenizer.interface import Tokenizer

__all__ = [
    "DocumentSpan",
    "Order",
    "SampleId",
    "TrainData",
    "ValidData",
    "check_tokenizer",
    "describe_samples",
    "open_train_data",
    "open_valid_data",
]

Order = Literal["independent", "megatron"]

MEGATRON_SURPLUS = 0.005  # Megatron-LM builds each source this much longer than its share, as its mix is not exact


def cumulative_lengths(ends: Sequence[np.ndarray]) -> np.ndarray:
    """[documents + 1] int32, from where documents end among the tokens of a batch, in any order and repeated or not."""
    return np.unique(np.concatenate([[0], *ends])).astype(np.int32)


def first_foreign_id(ids: np.ndarray, vocab_size: int) -> int | None:
    """Place of the first id in a flat view of ``ids`` (contiguous) that is not in [0, vocab_size); None: all are.

    One pass over ids that have just been written: 1 us for a sample of 2,049.
    """
    unsigned = ids.reshape(-1).view(f"u{ids.itemsize}")  # a negative id is a very large one
    if unsigned.size == 0 or int(unsigned.max()) < vocab_size:
        return None
    return int(np.argmax(unsigned >= vocab_size))


class _CopiedPart(NamedTuple):
    """Samples of one source that have been read."""

    part: SourceWindows
    lengths: np.ndarray
    """Tokens of each of their pieces, one sample after the other."""
    counts: np.ndarray
    """Pieces of each sample."""


def _document_bounds(copied: Iterable[_CopiedPart], seq_length: int) -> np.ndarray:
    """``Batch.documents`` of samples of so many targets."""
    ends = []
    for part, lengths, counts in copied:
        in_window = np.cumsum(lengths) - np.repeat(np.arange(len(counts)) * (seq_length + 1), counts)
        # The last token of a window is a label only.
        ends.append(np.repeat(part.rows * seq_length, counts) + np.minimum(in_window, seq_length))
    return cumulative_lengths(ends)


class TrainData:
    """The endless (or, in Megatron-LM's order, num_samples long) sequence of training samples.

    Args:
        phases: of the run; or prefix of each indexed dataset and its weight in the mix, which is one phase.
        seq_length: s of that one phase; a sample holds s + 1 tokens. Phases have lengths of their own.
        seed: of the run.
        order: "independent" or "megatron", see ``sampling/order.py``; this one has one phase.
        num_samples: samples the whole run draws; the order "megatron" depends on it, the other ignores it.
        unit: what the weights of that one phase are, see ``sampling/plan.py``.
        index_folder: where indices of large datasets are kept (``sampling/cache.py``); None: beside each dataset, in
            ``P.index``.
        note: gets remarks about these files.
        document_mask: batches say where documents lie, so that attention keeps them apart.
        vocab_size: all ids that are read must be below; None: nobody asks.
        skips: what the run leaves out of this order. Samples are named by their number in the run everywhere here.
        fim: what is done with the pieces of some sources, by prefix.
        absent: sources that only samples draw from which nobody reads any more, by prefix; they are not opened.

    Raises:
        DataError: a dataset is missing, damaged, empty or holds no token ids.
        ConfigError: the order "megatron" cannot be built.
    """

    def __init__(
        self,
        phases: Sequence[Phase] | Mapping[str, float] | Mapping[Path, float],
        seq_length: int,
        seed: int,
        order: Order = "independent",
        num_samples: int | None = None,
        unit: WeightUnit = "share",
        index_folder: str | Path | None = None,
        note: Callable[[str], None] = say,
        document_mask: bool = False,
        vocab_size: int | None = None,
        skips: Skips = NO_SKIPS,
        fim: Mapping[str, FillInTheMiddle] | None = None,
        absent: Mapping[str, AbsentSource] | None = None,
    ) -> None:
        assert phases, "training needs at least one source"
        if isinstance(phases, Mapping):
            only = {str(prefix): weight for prefix, weight in phases.items()}
            phases = [Phase("data", 0, None, only, unit, seq_length, 0.0, None)]
        self.vocab_size = vocab_size
        self.num_samples = num_samples if order == "megatron" else None
        self._document_mask, self._by_document = document_mask, order == "independent"
        self.sources, shares = open_sources(phases, self._by_document, absent)
        """One dataset a source, over all phases: in the order "independent" by fingerprint, so that neither the order
        in which sources are named nor their paths decide which sample comes when; in Megatron-LM's as given. Its place
        here is the number of a source, in ``Batch.sources`` and everywhere."""
        self.fingerprints = tuple(dataset.fingerprint for dataset in self.sources)
        """Content of each source."""
        self._absent = absent or {}
        self._fim = {place: (of, source_key(seed, self.keys[place])) for prefix, of in (fim or {}).items()
                     for place in self._places_of(prefix)}  # fmt: skip
        self._present = {i: dataset for i, dataset in enumerate(self.sources) if not isinstance(dataset, AbsentSource)}
        self._stores = {
            i: IndexStore(index_folder or f"{dataset.prefix}.index", note, check_built=dataset.check_unchanged)
            for i, dataset in self._present.items()
        }
        self._memory = {
            i: (dataset.tokens, dataset.pointers, dataset.boundaries if self._by_document else None)
            for i, dataset in self._present.items()
        }
        if order == "independent":
            mixes = [Mix(p.first, p.end, p.seq_length, of_phase) for p, of_phase in zip(phases, shares, strict=True)]
            sources = [
                Source(dataset.document_lengths, dataset.fingerprint, self._stores.get(i))
                for i, dataset in enumerate(self.sources)
            ]
            self._lay_out = partial(lay_out, mixes, sources, seed, num_samples)
            self.order = self._lay_out(skips)
            """Which window of which source each sample is."""
        else:
            length, only_shares = phases[0].seq_length, list(shares[0].values())
            orders = self._build_megatron(only_shares, length, seed, num_samples)
            blend = Blend(only_shares, "greedy", self._stores[0], num_samples)
            places = tuple(range(len(self.sources)))
            assert not skips.ranges, "Megatron-LM's order has as many samples as the run reads"
            self.order = SampleOrder([MixSpan(0, None, length, places, blend, (0,) * len(places), orders)], num_samples)

    def _places_of(self, prefix: str) -> list[int]:
        """Of a source, by its path, or by its content where a later phase has it under another path."""
        places = [place for place, dataset in enumerate(self.sources) if dataset.prefix == Path(prefix)]
        return places or [self.fingerprints.index(_open_source(prefix, self._absent).fingerprint)]

    def _build_megatron(
        self, shares: list[float], seq_length: int, seed: int, num_samples: int | None
    ) -> list[MegatronOrder]:
        """A source alone is not blended there, which asks it for num_samples without the surplus."""
        if num_samples is None or num_samples < 1:
            raise ConfigError(72, f"num_samples={num_samples}", "must be at least 1 for data.order=megatron",
                              "set train.num_steps, or use data.order=independent")  # fmt: skip
        sizes = [num_samples]
        if len(self.sources) > 1:
            sizes = [math.ceil(math.ceil(num_samples * share) * (1 + MEGATRON_SURPLUS)) for share in shares]
        # The mix never draws more: it only draws from a source that has at most share * i samples before sample i.
        return [
            MegatronOrder(dataset.lengths, seq_length, seed, size, self._stores[i], dataset.fingerprint, dataset.forget)
            for (i, dataset), size in zip(self._present.items(), sizes, strict=True)
        ]

    def prepare(self, first: int, count: int) -> None:
        """Build, or find, every index that samples [first, first + count) need, so that reading them builds none."""
        end = first + count if self.num_samples is None else min(first + count, self.num_samples)
        self.order.prepare(first, end)

    def prepare_epochs(self, epochs: int) -> None:
        """The same for the first ``epochs`` passes over every source."""
        for span in self.order.spans:
            for source, order in zip(span.sources, span.orders, strict=True):
                self.dataset(source)
                order.prepare(0, (epochs * self.sources[source].num_tokens - 1) // span.seq_length)

    def dataset(self, source: int) -> IndexedDataset:
        """The files of a source.

        Raises:
            DataError: E330: they are gone, because the run needs them no more.
        """
        found = self.sources[source]
        if isinstance(found, AbsentSource):
            raise found.refusal()
        return found

    def _parts(self, first: int, count: int) -> list[SourceWindows]:
        """The windows that some samples are, by source, all of which are there."""
        parts = list(self.order.parts(first, count))
        for part in parts:
            if part.source not in self._present:
                self.dataset(part.source)  # says why it is gone
        return parts

    def seq_length_at(self, i: int) -> int:
        """Targets in sample ``i``."""
        return self.order.span_at(i).seq_length

    @cached_property
    def names(self) -> list[str]:
        """What each of ``sources`` is called."""
        return source_names([dataset.prefix for dataset in self.sources])

    @cached_property
    def keys(self) -> list[str]:
        """What each of ``sources`` is counted under: its content."""
        return source_keys(self.fingerprints)

    def tokens_of_sources(self, end: int) -> list[int]:
        """How many targets of samples [0, end) come from each of ``sources``."""
        counts = [0] * len(self.sources)
        for span, first, until in self.order.within(0, end):
            before, after = span.drawn_before(first), span.drawn_before(until)
            for source, low, high in zip(span.sources, before, after, strict=True):
                counts[source] += (high - low) * span.seq_length
        return counts

    def sample_id(self, i: int) -> SampleId:
        """Which window of which source is sample ``i`` of the run (from 0)."""
        return self.sample_ids(i, 1)[0]

    def sample_ids(self, first: int, count: int) -> list[SampleId]:
        """The same of each of samples [first, first + count), at once."""
        return self.order.ids(first, count)

    def with_skips(self, skips: Skips) -> TrainData:
        """The same datasets, of which another run leaves out something else, or the same."""
        if skips == self.order.skips:  # as for nearly every run, and for all in Megatron-LM's order
            return self
        other = copy.copy(self)
        other.order = self._lay_out(skips)
        return other

    def locate(self, i: int) -> list[DocumentSpan]:
        """The documents that sample ``i`` reads: (document, offset in it, length), in order."""
        (part,) = self._parts(i, 1)
        spans = part.order.locate(int(part.windows[0]))
        if self._by_document:
            return spans
        dataset = self.dataset(part.source)
        located = []
        for sequence, offset, length in spans:
            document, before = dataset.document_of(sequence)
            located.append(DocumentSpan(document, before + offset, length))
        return located

    def read(self, first: int, count: int) -> Batch[np.ndarray]:
        """Samples [first, first + count), at least one, all of one length.

        What ``tokens`` gives one by one, at once: compiled, without the GIL, straight from the map into the result.

        Raises:
            DataError: E350 a file was cut or overwritten; E341 an id is not in the vocabulary, with its place.
        """
        if not SURVIVES_CUTS:
            self.check_unchanged(self._present)
        try:
            parts = self._parts(first, count)
            s, *others = {part.order.seq_length for part in parts}
            assert not others, f"samples [{first}, {first + count}) differ in seq_length"
            samples, sources, copied = np.empty((count, s + 1), np.int64), np.empty(count, np.int64), []
            for part in parts:
                spans, counts = part.order.locate_all(part.windows)
                index.copy_windows(*self._memory[part.source], spans, counts, part.rows, samples)
                sources[part.rows] = part.source
                copied.append(_CopiedPart(part, spans[:, 2], counts))
        except (ValueError, IndexError):
            self.check_unchanged(self._present)  # else the samples are asked for wrongly
            raise
        foreign = None if self.vocab_size is None else first_foreign_id(samples, self.vocab_size)
        self.check_unchanged({part.source for part in parts})
        if foreign is not None:  # and was there when the file was opened
            raise self._foreign_id(first + foreign // (s + 1), foreign % (s + 1), int(samples.flat[foreign]))
        if self._fim:
            self._rearrange(copied, samples)
        documents = _document_bounds(copied, s) if self._document_mask else None
        return Batch.from_windows(samples, documents=documents, sources=sources)

    def _rearrange(self, copied: Sequence[_CopiedPart], samples: np.ndarray) -> list[Infill]:
        """Fill-in-the-middle in some samples, in place, where their sources have it."""
        found: list[Infill] = []
        for part, lengths, counts in copied:
            if part.source in self._fim:
                fim, key = self._fim[part.source]
                found += fim.apply(samples, part.rows, part.windows, lengths, counts, key)
        return found

    def infills(self, i: int) -> list[Infill]:
        """What is rearranged in sample ``i``; reads its tokens where a source has fill-in-the-middle."""
        return self._sample(i)[1] if self._fim else []

    @property
    def sentinel_ids(self) -> list[int]:
        """Ids that fill-in-the-middle puts between texts; they stand for none."""
        return sorted({token for fim, _ in self._fim.values() for token in fim.ids})

    def check_unchanged(self, sources: Iterable[int]) -> None:
        """Whether the files of some sources, which are there, are still those that were opened.

        Raises:
            DataError: E350 one was cut or overwritten.
        """
        for source in sources:
            for part in self._present[source].maps:
                part.check()
            for index_file in self._stores[source].maps:
                if (mapped := index_file()) is not None:
                    mapped.check()

    def _foreign_id(self, sample: int, column: int, token_id: int) -> DataError:
        """The error for an id that is token ``column`` of a sample."""
        assert self.vocab_size is not None
        for document, offset, length in self.locate(sample):
            if column < length:
                dataset = self.dataset(self.sample_id(sample).source)
                return dataset.foreign_id(token_id, dataset.position_of(document, offset + column), self.vocab_size)
            column -= length
        raise AssertionError("the pieces of a sample are all of its tokens")

    def tokens(self, i: int) -> np.ndarray:
        """Tokens of sample ``i``: [seq_length + 1] int64."""
        return self._sample(i)[0]

    def _sample(self, i: int) -> tuple[np.ndarray, list[Infill]]:
        (part,) = self._parts(i, 1)
        dataset = self.dataset(part.source)
        units, offsets, lengths = np.array(part.order.locate(int(part.windows[0]))).T
        sequences = dataset.first_sequences(units) if self._by_document else units
        starts = dataset.pointers[sequences] // dataset.dtype.itemsize + offsets
        parts = [dataset.tokens[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist())]
        tokens = np.concatenate(parts, dtype=np.int64)
        assert len(tokens) == part.order.seq_length + 1, f"sample {i} has {len(tokens)} tokens"
        return tokens, self._rearrange([_CopiedPart(part, lengths, np.array([len(lengths)]))], tokens[None])


def describe_samples(data: TrainData, start: int, count: int) -> list[dict[str, Any]]:
    """Samples [start, start + count) as plain values: where every token of them lies. For people and outside programs.

    Raises:
        ConfigError: there are no such samples.
    """
    end = start + count
    if start < 0 or count < 1 or (data.num_samples is not None and end > data.num_samples):
        has = "no end" if data.num_samples is None else f"{data.num_samples} samples"
        raise ConfigError(73, f"samples [{start}, {end})", f"are not in this order, which has {has}",
                          "choose --start of at least 0 and --count of at least 1 within it")  # fmt: skip
    described = []
    for i in range(start, end):
        sample = data.sample_id(i)
        described.append(
            {
                "sample": i,
                "source": str(data.sources[sample.source].prefix),
                "epoch": sample.epoch,
                "window": sample.window,
                "pieces": [span._asdict() for span in data.locate(i)],
            }
        )
        if infills := data.infills(i):
            described[-1]["infills"] = [asdict(infill) for infill in infills]
    return described


class ValidData:
    """A validation set: its windows in the order of the file, each target once.

    Args:
        name: what the set is called in the metrics.
        prefix: of its indexed dataset.
        seq_length: s; window j covers tokens [j s, j s + s].
        max_samples: only so many windows from the start; None: all.
        document_mask: batches say where documents lie, as in ``TrainData``.
        vocab_size: as there.

    Raises:
        DataError: the dataset is missing, damaged or too short to have a target.
    """

    def __init__(
        self,
        name: str,
        prefix: str | Path,
        seq_length: int,
        max_samples: int | None = None,
        document_mask: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.name, self.seq_length, self._document_mask = name, seq_length, document_mask
        self.dataset = _open_tokens(prefix)
        if self.dataset.num_tokens < 2:
            raise DataError(45, f"{prefix}.bin of {self.dataset.num_tokens} tokens", "is too short: a target needs two",
                            "give this validation set more text")  # fmt: skip
        windows = -(-(self.dataset.num_tokens - 1) // seq_length)
        self._num_samples = windows if max_samples is None else min(windows, max_samples)

    def __len__(self) -> int:
        return self._num_samples

    def read(self, windows: Sequence[int]) -> Batch[np.ndarray]:
        """Some of the windows; the end of the last one is padded with id 0, which counts nothing and is a document.

        Raises:
            DataError: as for ``TrainData.read``.
        """
        s, ends = self.seq_length, list[np.ndarray]()
        tokens, weights = np.zeros((len(windows), s + 1), np.int64), np.zeros((len(windows), s), np.float32)
        if not SURVIVES_CUTS:
            self.dataset.check_unchanged()
        for row, j in enumerate(windows):
            if not 0 <= j < len(self):
                raise IndexError(f"window {j} is not in [0, {len(self)})")
            taken = self.dataset.tokens[j * s : (j + 1) * s + 1]
            tokens[row, : len(taken)] = taken
            weights[row, : len(taken) - 1] = 1
            if self._document_mask:
                inside = np.searchsorted(self._document_ends, [j * s, (j + 1) * s], side="right")
                ends += [self._document_ends[slice(*inside)] + (row - j) * s, np.array([(row + 1) * s])]
        self.dataset.check_unchanged()
        if self.vocab_size is not None and (place := first_foreign_id(tokens, self.vocab_size)) is not None:
            position = windows[place // (s + 1)] * s + place % (s + 1)
            raise self.dataset.foreign_id(int(tokens.flat[place]), position, self.vocab_size)
        return Batch.from_windows(tokens, weights, cumulative_lengths(ends) if self._document_mask else None)

    @cached_property
    def _document_ends(self) -> np.ndarray:
        """int64, where each document ends in the stream of the file."""
        return np.cumsum(self.dataset.document_lengths, dtype=np.int64)


def check_tokenizer(
    dataset: IndexedDataset, fingerprint: str | None, vocab_size: int, name: str = "the run's tokenizer"
) -> str | None:
    """Refuse a dataset whose ids another tokenizer made, or that holds ids beyond the vocabulary.

    A dataset without a header does not say who made it; its ids are read once (seconds a gigabyte).

    Args:
        fingerprint: of the run's tokenizer; None where the run has none and only the ids can be checked.
        vocab_size: of the model, without padding.
        name: of the run's tokenizer, for the error.

    Returns:
        A note for the user where the tokenizer could not be compared, else None.

    Raises:
        RefusedError: the header names another tokenizer.
        DataError: an id is not in the vocabulary.
    """
    recorded = dataset.header.tokenizer if dataset.header is not None else None
    if recorded is not None and fingerprint not in (None, recorded.fingerprint):
        raise RefusedError(
            10,
            f"{dataset.prefix}.meta.json: the tokenizer that made it, {recorded},",
            f"is not {name} (fingerprints {recorded.fingerprint} and {fingerprint})",
            "set tokenizer.path to the tokenizer that prepared this dataset, or prepare it again",
        )
    largest = dataset.max_token_id()
    if largest >= vocab_size:
        raise DataError(
            41,
            f"{dataset.bin_path}: token id {largest}",
            f"must be below the vocabulary's size {vocab_size}",
            "use the tokenizer that belongs to this dataset, or prepare it again",
        )
    if recorded is None:
        why = "has no header of ours" if dataset.header is None else "does not say which tokenizer made it"
        return f"{dataset.prefix} {why}: only its ids could be checked, all are below {vocab_size}"
    return None


def open_train_data(
    config: Config,
    note: Callable[[str], None] = say,
    ledger: Sequence[Rewind] = (),
    tokenizer: Tokenizer | None = None,
    absent: Mapping[str, AbsentSource] | None = None,
    course: Course | None = None,
) -> TrainData:
    """The training samples of a run whose config names sources.

    Args:
        note: gets remarks about index files.
        ledger: what the run leaves out.
        tokenizer: the config's, where it has been loaded: fill-in-the-middle asks it for its tokens.
        absent: sources that the rest of the run does without, by prefix.
        course: of the run; absent: one that begins with this config.
    """
    if ledger and config.data.order == "megatron":
        rule = "is not for data.order=megatron, which has as many samples as the run reads"
        raise ConfigError(23, f"a ledger of {len(ledger)} rewinds", rule, "set data.order=independent")
    return TrainData(
        config.phases,
        config.data.seq_length,
        config.train.seed,
        config.data.order,
        (course or config.course()).num_samples,
        index_folder=config.data.index_folder,
        note=note,
        document_mask=config.data.attention_mask == "document",
        vocab_size=config.model.vocab_size,
        skips=Skips.of(ledger),
        fim=open_fim(config, tokenizer),
        absent=absent,
    )


def open_valid_data(
    config: Config,
    sets: Mapping[str, str] | None = None,
    samples: int | None = None,
) -> list[ValidData]:
    """The validation sets of a run.

    Args:
        sets: name -> prefix, in place of ``data.valid``.
        samples: of each at most so many, in place of ``train.eval_samples``.

    Raises:
        DataError: as ``ValidData``.
    """
    named = (config.data.valid or {}) if sets is None else sets
    size, limit = config.model.vocab_size, config.train.eval_samples if samples is None else samples
    mask = config.data.attention_mask == "document"
    return [ValidData(name, prefix, config.data.seq_length, limit, mask, size) for name, prefix in named.items()]


def open_sources(
    phases: Sequence[Phase], sort: bool = True, absent: Mapping[str, AbsentSource] | None = None
) -> tuple[list[IndexedDataset | AbsentSource], list[dict[int, float]]]:
    """The training sources of a run, each once, and of each phase the shares of those that it draws from.

    Sources are told apart by what they hold: one that has another path in a later phase is still the same, with the
    later path. Its place in the list is its number.

    Args:
        sort: by fingerprint; else in the order in which they are named.
        absent: those that are not opened, by prefix.

    Raises:
        DataError: E345 a source is empty; or it is missing, damaged or holds no token ids.
    """
    prefixes = dict.fromkeys(prefix for phase in phases for prefix in phase.train)
    opened = {prefix: _open_source(prefix, absent or {}) for prefix in prefixes}
    known: dict[SourceKey, IndexedDataset | AbsentSource] = {}  # the number tells apart what one mix names twice
    weights: list[dict[SourceKey, float]] = []
    for phase in phases:
        datasets = [opened[prefix] for prefix in phase.train]
        for dataset in datasets:
            if dataset.num_tokens == 0:
                raise DataError(45, f"{dataset.prefix}.bin", "holds no token", "leave this source out")
        keys = keys_in_mix([dataset.fingerprint for dataset in datasets])
        known |= {key: dataset for key, dataset in zip(keys, datasets, strict=True)
                  if key not in known or not isinstance(dataset, AbsentSource)}  # fmt: skip
        tokens = [dataset.num_tokens for dataset in datasets]
        weights.append(dict(zip(keys, sampling_weights(list(phase.train.values()), phase.unit, tokens), strict=True)))
    keys = sorted(known) if sort else list(known)
    numbers = {key: number for number, key in enumerate(keys)}
    shares = []
    for of_phase in weights:
        ordered = sorted(of_phase, key=numbers.__getitem__)
        values = np.array([of_phase[key] for key in ordered], np.float64)
        values = values / values.sum()  # Blend divides by the sum once more, and so, in float64, does Megatron-LM
        shares.append({numbers[key]: float(share) for key, share in zip(ordered, values, strict=True)})
    return [known[key] for key in keys], shares


def _open_source(prefix: str, absent: Mapping[str, AbsentSource]) -> IndexedDataset | AbsentSource:
    return absent[prefix] if prefix in absent else _open_tokens(prefix)


def _open_tokens(prefix: str | Path) -> IndexedDataset:
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind == "f":
        raise DataError(
            33, f"{dataset.idx_path}: dtype {dataset.dtype.name}", "holds no token ids: they are integers", REMAKE
        )
    return dataset
