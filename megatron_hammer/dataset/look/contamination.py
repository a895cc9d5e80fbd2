"""Contamination: finds the documents of held-out sets, and long runs of their ids, in a dataset; for ``verify.py``.

Equal documents are found by a 64-bit XXH3 of their ids without bos and eod. Runs of ``NGRAM`` consecutive ids within
one document are found by a 64-bit polynomial hash, modulo 2^64, over random values of the ids. Memory is about 30
bytes for each held-out token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_hammer.base.errors import ConfigError, RefusedError
from megatron_hammer.corpus.documents import read_texts
from megatron_hammer.dataset.look.places import document_starts
from megatron_hammer.dataset.look.verify_report import EXAMPLES, DatasetReport
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.tokenizer.interface import Tokenizer

NGRAM = 50
"""Consecutive ids that count as an overlap: some 35 words of English, 75 Chinese characters; no accident."""

_WINDOWS_AT_ONCE = 1 << 14  # their 64-bit hashes, several times over, stay in the cache
_RATIO = 0x9E3779B97F4A7C15  # odd; of the polynomial and of splitmix64


@dataclass(frozen=True)
class HeldOut:
    """A held-out set: documents that the training data must not hold."""

    name: str
    documents: list[np.ndarray]
    """Ids of each document, without bos and eod, in the dataset's type; none is empty."""


def read_held_out(
    path: str | Path, dataset: IndexedDataset, tokenizer: Tokenizer | None, bos: int | None, eod: int | None
) -> HeldOut:
    """A JSON lines file where ``path`` is a file, else an indexed dataset."""
    documents: Iterable[np.ndarray]
    other = None if Path(path).is_file() else IndexedDataset(path)
    if other is None:
        if tokenizer is None:
            raise ConfigError(
                94, f"--held-out {path}", "is text: it needs --tokenizer", "name the dataset's tokenizer, or a prefix"
            )
        options = dataset.header.options if dataset.header is not None else {}
        key = str(options.get("json_key", "text"))
        documents = (
            np.array(tokenizer.encode(text), np.int64) for texts, _ in read_texts(Path(path), key) for text in texts
        )
    else:
        ours, theirs = (None if set_.header is None else set_.header.tokenizer for set_ in (dataset, other))
        if ours is not None and theirs is not None and ours.fingerprint != theirs.fingerprint:
            raise RefusedError(10, f"held-out set {path}", f"was made with {theirs}, and {dataset.prefix} with {ours}",
                               "prepare it with the same one, or give its text and --tokenizer")  # fmt: skip
        starts = document_starts(other, 0, other.num_documents)
        documents = (other.tokens[a:b] for a, b in zip(starts[:-1].tolist(), starts[1:].tolist()))
    limits = np.iinfo(dataset.dtype)
    kept = []
    for ids in documents:
        ids = ids[1:] if len(ids) and ids[0] == bos else ids
        ids = ids[:-1] if len(ids) and ids[-1] == eod else ids
        if len(ids) and limits.min <= int(ids.min()) and int(ids.max()) <= limits.max:  # else no document can be equal
            kept.append(ids.astype(dataset.dtype))
    if other is not None:
        other.check_unchanged()
    return HeldOut(str(path), kept)


class HeldOutSearch:
    """Searches a dataset for held-out sets; it is shown the documents one group after the other."""

    def __init__(self, sets: list[HeldOut]) -> None:
        self.sets = sets
        largest = max((int(ids.max()) for one in sets for ids in one.documents), default=0)
        self._values = _random_values(min(largest + 2, 1 << 25))  # one more id: what no held-out document has
        ratios = np.full(_WINDOWS_AT_ONCE + NGRAM, _RATIO, np.uint64)
        ratios[0] = 1
        self._powers = np.cumprod(ratios)  # r^i modulo 2^64
        ratios[1:] = pow(_RATIO, -1, 1 << 64)
        self._inverse = np.cumprod(ratios)
        self._of_document = [
            np.array([xxhash.xxh3_64_intdigest(ids.tobytes()) for ids in one.documents], np.uint64) for one in sets
        ]
        self._of_grams = [[self._long_grams(ids) for ids in one.documents] for one in sets]
        self._digests = np.unique(np.concatenate(self._of_document))
        nothing = np.empty(0, np.uint64)
        self._grams = np.unique(np.concatenate([nothing, *(grams for one in self._of_grams for grams in one)]))
        self._met_digests = np.full(len(self._digests), -1, np.int64)  # document of the dataset that met it first
        self._met_grams = np.zeros(len(self._grams), bool)
        self._filter = _Filter(self._grams)
        self.documents_touched = 0
        """Of the dataset, with at least one window of a held-out document."""

    def look(
        self, digests: np.ndarray, numbers: np.ndarray, tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> None:
        """Documents of the dataset, in order: digests, numbers, and where their text begins and ends in ``tokens``."""
        place, met = _search(self._digests, digests)
        for where, number in zip(place[met].tolist(), numbers[met].tolist()):
            if self._met_digests[where] < 0:
                self._met_digests[where] = number
        if len(self._grams) == 0 or len(begins) == 0:
            return
        touched = np.zeros(len(begins), bool)
        for first in range(int(begins[0]), int(ends[-1]) - NGRAM + 1, _WINDOWS_AT_ONCE):
            windows = self._window_hashes(tokens[first : min(first + _WINDOWS_AT_ONCE + NGRAM - 1, int(ends[-1]))])
            passed = self._filter.passed(windows)
            place, met = _search(self._grams, windows[passed])
            at = first + passed[met]
            document = np.searchsorted(begins, at, side="right") - 1
            inside = at + NGRAM <= ends[document]
            self._met_grams[place[met][inside]] = True
            touched[document[inside]] = True
        self.documents_touched += int(touched.sum())

    def describe(self, report: DatasetReport) -> dict[str, Any]:
        """Facts of each set; documents met go into the report as problems, windows met as remarks."""
        facts: dict[str, Any] = {}
        for one, digests, grams in zip(self.sets, self._of_document, self._of_grams):
            met = self._met_digests[np.searchsorted(self._digests, digests)]
            shares = [self._met_grams[np.searchsorted(self._grams, of)] for of in grams]
            touched = [of for of in shares if of.any()]
            windows = sum(map(len, shares))
            facts[one.name] = {
                "documents": len(digests),
                "documents_found": int((met >= 0).sum()),
                "documents_sharing_a_window": len(touched),
                "window_tokens": NGRAM,
                "windows": windows,
                "windows_found": sum(int(of.sum()) for of in touched),
            }
            if (met >= 0).any():
                which = ", ".join(
                    f"{int(i):,} is document {int(met[i]):,}" for i in np.flatnonzero(met >= 0)[:EXAMPLES]
                )
                report.contaminated.append(
                    f"{int((met >= 0).sum()):,} of the {len(digests):,} documents of {one.name} (with text: {which})"
                )
            if touched:
                report.remarks.append(
                    f"{len(touched):,} of {len(digests):,} documents of {one.name} share {NGRAM} consecutive tokens "
                    f"with the dataset, {sum(int(of.sum()) for of in touched):,} of its {windows:,} windows"
                )
        return facts

    def _long_grams(self, ids: np.ndarray) -> np.ndarray:
        parts = [
            self._window_hashes(ids[first : first + _WINDOWS_AT_ONCE + NGRAM - 1])
            for first in range(0, max(len(ids) - NGRAM + 1, 0), _WINDOWS_AT_ONCE)
        ]
        return np.concatenate([np.empty(0, np.uint64), *parts])

    def _window_hashes(self, ids: np.ndarray) -> np.ndarray:
        """uint64 [n - NGRAM + 1]: sum of value(id) r^j over the NGRAM ids of each window, modulo 2^64."""
        terms = np.zeros(len(ids) + 1, np.uint64)
        np.take(self._values, ids, mode="clip", out=terms[1:])
        terms[1:] *= self._powers[: len(ids)]
        np.cumsum(terms, out=terms)
        return (terms[NGRAM:] - terms[:-NGRAM]) * self._inverse[: len(ids) - NGRAM + 1]


class _Filter:
    """One bit for each value of the leading bits of a hash: lets all known hashes pass, and 1 % of the others."""

    def __init__(self, known: np.ndarray) -> None:
        bits = min(max((64 * len(known)).bit_length(), 10), 29)  # 64 MB at most
        self._shift, self._byte_shift = np.uint64(64 - bits), np.uint64(64 - bits + 3)
        self._table = np.zeros(1 << bits - 3, np.uint8)
        np.bitwise_or.at(self._table, known >> self._byte_shift, self._bit(known))

    def passed(self, hashes: np.ndarray) -> np.ndarray:
        """Places of the hashes that may be known."""
        places = (hashes >> self._byte_shift).view(np.int64)
        return np.flatnonzero(np.take(self._table, places, mode="clip") & self._bit(hashes))  # clip: the fastest mode

    def _bit(self, hashes: np.ndarray) -> np.ndarray:
        return np.uint8(1) << ((hashes >> self._shift).astype(np.uint8) & np.uint8(7))


def _random_values(count: int) -> np.ndarray:
    """uint64 [count]: splitmix64 (Steele, Lea and Flood 2014) of 1, 2, ..."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_RATIO)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _search(known: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each value would stand among the sorted ``known`` ones, and whether it is one of them."""
    place = np.searchsorted(known, values)
    inside = place < len(known)
    met = np.zeros(len(values), bool)
    met[inside] = known[place[inside]] == values[inside]
    return place, met
