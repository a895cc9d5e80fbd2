"""Samples: what sample number i of a run is, and its tokens; validation samples in the order of their file.

``blend.py`` says which source gives sample i and which of its samples that is, ``order.py`` which tokens those are,
``dataset/reader.py`` reads them. A training sample is a window of seq_length + 1 tokens, inputs and labels shifted by
one; the loss runs across the documents in it, and so does attention unless a batch says where they lie
(``Batch.documents``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.base.mapping import SURVIVES_CUTS
from megatron_hammer.base.progress import say
from megatron_hammer.config import Config
from megatron_hammer.dataset.format import REMAKE
from megatron_hammer.dataset.reader import IndexedDataset, first_foreign_id
from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.blend import Blend
from megatron_hammer.sampling.cache import IndexStore
from megatron_hammer.sampling.order import DocumentSpan, IndependentOrder, MegatronOrder, SampleId
from megatron_hammer.sampling.plan import WeightUnit, sampling_weights

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


class TrainData:
    """The endless (or, in Megatron-LM's order, num_samples long) sequence of training samples.

    Args:
        sources: prefix of each indexed dataset and its weight in the mix.
        seq_length: s; a sample holds s + 1 tokens.
        seed: of the run.
        order: "independent" or "megatron", see ``sampling/order.py``.
        num_samples: samples the whole run draws; the order "megatron" depends on it, the other ignores it.
        unit: what the weights are, see ``sampling/plan.py``.
        index_folder: where indices of large datasets are kept (``sampling/cache.py``); None: beside each dataset, in
            ``P.index``.
        note: gets remarks about these files.
        document_mask: batches say where documents lie, so that attention keeps them apart.
        vocab_size: all ids that are read must be below; None: nobody asks.

    Raises:
        DataError: a dataset is missing, damaged, empty or holds no token ids.
        ConfigError: the order "megatron" cannot be built.
    """

    def __init__(
        self,
        sources: Mapping[str, float] | Mapping[Path, float],
        seq_length: int,
        seed: int,
        order: Order = "independent",
        num_samples: int | None = None,
        unit: WeightUnit = "share",
        index_folder: str | Path | None = None,
        note: Callable[[str], None] = say,
        document_mask: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        assert sources, "training needs at least one source"
        self.vocab_size = vocab_size
        self.seq_length, self.num_samples = seq_length, num_samples if order == "megatron" else None
        self._document_mask = document_mask
        self.sources = [_open_tokens(prefix) for prefix in sources]
        """One dataset a source: in the order "independent" by fingerprint, so that neither the order in which sources
        are named nor their paths decide which sample comes when; in Megatron-LM's as given."""
        for dataset in self.sources:
            if dataset.num_tokens == 0:
                raise DataError(45, f"{dataset.prefix}.bin", "holds no token", "leave this source out")
        proportions = sampling_weights(list(sources.values()), unit, [dataset.num_tokens for dataset in self.sources])
        weights = dict(zip(self.sources, proportions))
        if order == "independent":
            self.sources.sort(key=lambda dataset: dataset.fingerprint)
        self.fingerprints = tuple(dataset.fingerprint for dataset in self.sources)
        """Content of each source."""
        shares = np.array([weights[dataset] for dataset in self.sources], np.float64)
        shares = shares / shares.sum()  # Blend divides by the sum once more, and so, in float64, does Megatron-LM
        stores = [
            IndexStore(index_folder or f"{dataset.prefix}.index", note, check_built=dataset.check_unchanged)
            for dataset in self.sources
        ]
        self._stores = stores
        self._blend = Blend(shares, "chairman" if order == "independent" else "greedy", stores[0], num_samples)
        self._by_document = order == "independent"
        self._memory = [
            (dataset.tokens, dataset.pointers, dataset.boundaries if self._by_document else None)
            for dataset in self.sources
        ]
        self._orders: list[IndependentOrder] | list[MegatronOrder]
        if order == "independent":
            self._orders = [
                IndependentOrder(dataset.document_lengths, fingerprint, seq_length, seed, store)
                for dataset, fingerprint, store in zip(self.sources, self.fingerprints, stores)
            ]
        else:
            self._orders = self._build_megatron(shares.tolist(), seed, num_samples, stores)

    def _build_megatron(
        self, shares: list[float], seed: int, num_samples: int | None, stores: list[IndexStore]
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
            MegatronOrder(dataset.lengths, self.seq_length, seed, size, store, fingerprint, dataset.forget)
            for dataset, size, store, fingerprint in zip(self.sources, sizes, stores, self.fingerprints)
        ]

    def prepare(self, first: int, count: int) -> None:
        """Build, or find, every index that samples [first, first + count) need, so that reading them builds none."""
        end = first + count if self.num_samples is None else min(first + count, self.num_samples)
        before, after = self._blend.counts(first), self._blend.counts(end)
        for source, (position, end) in enumerate(zip(before.tolist(), after.tolist())):
            if end > position:
                self._orders[source].prepare(position, end - 1)

    def prepare_epochs(self, epochs: int) -> None:
        """The same for the first ``epochs`` passes over every source."""
        for source, dataset in enumerate(self.sources):
            self._orders[source].prepare(0, (epochs * dataset.num_tokens - 1) // self.seq_length)

    @property
    def shares(self) -> np.ndarray:
        """Of the samples, for each of ``sources``; they add up to one."""
        return self._blend.weights

    @property
    def orders(self) -> list[IndependentOrder] | list[MegatronOrder]:
        """The order of each of ``sources``."""
        return self._orders

    def sample_id(self, i: int) -> SampleId:
        """Which window of which source is sample ``i`` of the run (from 0)."""
        return self.sample_ids(i, 1)[0]

    def sample_ids(self, first: int, count: int) -> list[SampleId]:
        """The same of each of samples [first, first + count), at once."""
        ids: list[Any] = [None] * count
        for source, rows, windows in self._windows(first, count):
            total = self._orders[source].num_tokens
            for row, window in zip(rows.tolist(), windows.tolist()):
                ids[row] = SampleId(source, window * self.seq_length // total, window)
        return ids

    def _windows(self, first: int, count: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(source, which of samples [first, first + count) it gives, counted from ``first``, the windows they are)."""
        if first < 0 or count < 1 or (self.num_samples is not None and first + count > self.num_samples):
            raise IndexError(f"samples [{first}, {first + count}) are not in [0, {self.num_samples})")
        if len(self.sources) == 1:
            yield 0, np.arange(count), self._orders[0].windows(first, count)
            return
        sources, positions = self._blend.range(first, count)
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)  # the samples of one source follow each other
            yield source, rows, self._orders[source].windows(int(positions[rows[0]]), len(rows))

    def locate(self, i: int) -> list[DocumentSpan]:
        """The documents that sample ``i`` reads: (document, offset in it, length), in order."""
        sample = self.sample_id(i)
        spans = self._orders[sample.source].locate(sample.window)
        if self._by_document:
            return spans
        dataset = self.sources[sample.source]
        located = []
        for sequence, offset, length in spans:
            document, before = dataset.document_of(sequence)
            located.append(DocumentSpan(document, before + offset, length))
        return located

    def read(self, first: int, count: int, out: np.ndarray | None = None) -> Batch[np.ndarray]:
        """Samples [first, first + count).

        What ``tokens`` gives one by one, at once: compiled, without the GIL, straight from the map into the result.

        Args:
            first: number of a sample, from 0.
            count: at least one.
            out: [count, seq_length + 1] int64 or int32 to fill instead of a new array (pinned memory, say); int32 does
                not do for datasets of 64-bit ids.

        Raises:
            DataError: E350 a file was cut or overwritten; E341 an id is not in the vocabulary, with its place.
        """
        s = self.seq_length
        out = np.empty((count, s + 1), np.int64) if out is None else out
        assert out.shape == (count, s + 1), f"out is {out.shape} for {count} samples"
        sources, ends = np.empty(count, np.int64), []
        if not SURVIVES_CUTS:
            self.check_unchanged(range(len(self.sources)))
        try:
            for source, rows, windows in self._windows(first, count):
                spans, counts = self._orders[source].locate_all(windows)
                index.copy_windows(*self._memory[source], spans, counts, rows, out)
                sources[rows] = source
                if self._document_mask:
                    in_window = np.cumsum(spans[:, 2]) - np.repeat(np.arange(len(rows)) * (s + 1), counts)
                    # The last token of a window is a label only.
                    ends.append(np.repeat(rows * s, counts) + np.minimum(in_window, s))
        except (ValueError, IndexError):
            self.check_unchanged(range(len(self.sources)))  # else the samples are asked for wrongly
            raise
        self.check_unchanged(np.unique(sources).tolist())
        if self.vocab_size is not None and (place := first_foreign_id(out, self.vocab_size)) is not None:
            raise self._foreign_id(first + place // (s + 1), place % (s + 1), int(out.flat[place]), self.vocab_size)
        documents = cumulative_lengths(ends) if self._document_mask else None
        return Batch.from_windows(out, documents=documents, sources=sources)

    def check_unchanged(self, sources: Iterable[int]) -> None:
        """Whether the files of some sources are still those that were opened.

        Raises:
            DataError: E350 one was cut or overwritten.
        """
        for source in sources:
            self.sources[source].check_unchanged()
            self._stores[source].check_unchanged()

    def _foreign_id(self, sample: int, column: int, token_id: int, vocab_size: int) -> DataError:
        """The error for an id that is token ``column`` of a sample."""
        for document, offset, length in self.locate(sample):
            if column < length:
                dataset = self.sources[self.sample_id(sample).source]
                return dataset.foreign_id(token_id, dataset.position_of(document, offset + column), vocab_size)
            column -= length
        raise AssertionError("the pieces of a sample are all of its tokens")

    def tokens(self, i: int) -> np.ndarray:
        """Tokens of sample ``i``: [seq_length + 1] int64."""
        sample = self.sample_id(i)
        dataset = self.sources[sample.source]
        units, offsets, lengths = np.array(self._orders[sample.source].locate(sample.window)).T
        sequences = dataset.first_sequences(units) if self._by_document else units
        starts = dataset.pointers[sequences] // dataset.dtype.itemsize + offsets
        parts = [dataset.tokens[start : start + n] for start, n in zip(starts.tolist(), lengths.tolist())]
        tokens = np.concatenate(parts, dtype=np.int64)
        assert len(tokens) == self.seq_length + 1, f"sample {i} has {len(tokens)} tokens"
        return tokens


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


def open_train_data(config: Config, note: Callable[[str], None] = say) -> TrainData:
    """The training samples of a run whose config names sources; ``note`` gets remarks about index files."""
    assert config.data.train is not None, "data.train is checked before"
    return TrainData(
        config.data.train,
        config.data.seq_length,
        config.train.seed,
        config.data.order,
        config.train.num_steps * config.train.global_batch_size,
        config.data.weights,
        config.data.index_folder,
        note,
        config.data.attention_mask == "document",
        config.model.vocab_size,
    )


def open_valid_data(config: Config) -> list[ValidData]:
    """The validation sets of a run."""
    return [
        ValidData(
            name,
            prefix,
            config.data.seq_length,
            config.train.eval_samples,
            config.data.attention_mask == "document",
            config.model.vocab_size,
        )
        for name, prefix in (config.data.valid or {}).items()
    ]


def _open_tokens(prefix: str | Path) -> IndexedDataset:
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind == "f":
        raise DataError(
            33, f"{dataset.idx_path}: dtype {dataset.dtype.name}", "holds no token ids: they are integers", REMAKE
        )
    return dataset
