"""Verifies an indexed dataset as a whole: every byte against its checksum, every id and every document, in one pass.

::

    .idx, .meta.json --> structure, counts, checksum
    .bin, 64 MiB at a time --> checksum of the block | ids counted | documents that end in it: first and last id,
                                                                   | digest of what is between, n-grams
    counts of ids x pieces --> characters by script, U+FFFD, byte fallback

What is found goes into one report (``verify_report.py``). The methods:

- Exact duplicates are found by a 64-bit XXH3 of a document's ids without its first bos and last eod. The chance that
  any two different documents among n are taken for equal is n^2 / 2^65 (0.03 at 10^9). A document takes 16 bytes: in
  memory for up to ``IN_MEMORY`` documents, beyond that in ``BUCKETS`` files of the scratch folder, which are sorted one
  by one. Nothing is sampled.
- Held-out sets are searched by the same digests and by runs of ids (``contamination.py``).
- Scripts are counted without decoding: each id is counted, and it is known which characters its piece has.

The pages of a block are given back once it is done, so memory does not grow with the dataset. No torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.files import hash_file, writing
from megatron_hammer.base.progress import Progress
from megatron_hammer.base.reading import open_regular
from megatron_hammer.dataset.format import HASH_BLOCK_BYTES, DatasetHeader, path_of, read_header
from megatron_hammer.dataset.look.contamination import HeldOutSearch, read_held_out
from megatron_hammer.dataset.look.matching import check_matching
from megatron_hammer.dataset.look.places import (
    TokenMap,
    document_of_token,
    document_spans,
    document_starts,
    iterate_starts,
)
from megatron_hammer.dataset.look.script_counts import ScriptCounts
from megatron_hammer.dataset.look.verify_report import EXAMPLES, DatasetReport, counted
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.tokenizer.interface import Tokenizer

IN_MEMORY = 1 << 23
"""Documents whose digests stay in memory: 128 MB."""
BUCKETS = 256
"""Files that digests go to beyond that, by their first byte."""

_DOCUMENTS_AT_ONCE = 1 << 16  # some megabytes of their facts
_TOKENS_AT_ONCE = 1 << 18  # of a block counted together: its temporaries stay in the cache
_LARGEST_COUNTED = 1 << 24  # no vocabulary is larger; its counts take 128 MB
_ENTRY = np.dtype([("digest", "<u8"), ("document", "<i8")])


# ---- the whole of it ----


def verify_dataset(
    prefix: str | Path,
    tokenizer: Tokenizer | None = None,
    held_out: Sequence[str | Path] = (),
    scratch: str | Path | None = None,
) -> DatasetReport:
    """Read a dataset from end to end and report everything that is wrong with it.

    Args:
        prefix: P of P.bin and P.idx.
        tokenizer: of the ids; None: neither scripts nor replacement characters, and ids are held against the header.
        held_out: JSON lines files, or prefixes of indexed datasets, that must have no document in common with it.
        scratch: folder for digests of more than ``IN_MEMORY`` documents; None: the system's.

    Raises:
        ConfigError: E294 held-out text without a tokenizer.
        DataError: the dataset is missing or holds no ids; a held-out set is missing or malformed.
        RefusedError: E510 another tokenizer than the dataset's, given or of a held-out set.
    """
    report = DatasetReport(str(prefix))
    try:
        dataset = IndexedDataset(prefix)
    except DataError as error:
        if error.number in (30, 33):  # nothing there, or nothing that could be verified
            raise
        report.problems.append(f"{error.what} {error.rule}")
        _check_unreadable(Path(prefix), report)
        return report
    if dataset.dtype.kind == "f":
        raise DataError(33, f"{dataset.idx_path}: dtype {dataset.dtype.name}", "holds no token ids: they are integers",
                        "name a dataset of token ids")  # fmt: skip
    if tokenizer is not None:
        check_matching(dataset, tokenizer)
    record = dataset.header.tokenizer if dataset.header is not None else None
    vocab_size = tokenizer.vocab_size if tokenizer is not None else record.vocab_size if record is not None else None
    marks: Any = tokenizer if tokenizer is not None else record
    bos, eod = (None, None) if marks is None else (marks.bos_id, marks.eos_id)
    sets = [read_held_out(path, dataset, tokenizer, bos, eod) for path in held_out]
    report.facts |= {
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "tokenizer": "not recorded" if record is None else record.fingerprint,
    }
    _check_index(dataset, report)
    with tempfile.TemporaryDirectory(prefix="hammer-verify-", dir=scratch) as folder:
        ids = _IdCounter(vocab_size)
        tokens = TokenMap(dataset)
        documents = _DocumentChecker(dataset, tokens.all, bos, eod, Path(folder), HeldOutSearch(sets) if sets else None)
        characters = None if tokenizer is None else ScriptCounts(tokenizer)
        hashes = _block_hashes(dataset.header, report)
        with Progress(f"verifying {dataset.bin_path}", dataset.num_tokens * dataset.dtype.itemsize) as progress:
            for block, first, part in tokens.blocks(HASH_BLOCK_BYTES):
                if hashes is not None and xxhash.xxh3_128(part.data).hexdigest() != hashes[block]:
                    report.problems.append(_damaged(dataset, block, first, first + len(part)))
                counts = ids.add(first, part)
                if characters is not None:
                    characters.add_spelt(counts, tokens.all, first, first + len(part))
                documents.advance(first + len(part))
                progress.advance(part.nbytes)
            documents.advance(dataset.num_tokens)
        _report_ids(dataset, ids, vocab_size, report)
        _report_documents(dataset, tokens, documents, ids, report)
        _report_duplicates(dataset, documents, report)
    if characters is not None:
        report.facts["characters"] = characters.describe(ids.counts, dataset.num_tokens)
        if report.facts["characters"]["replacement_characters"]:
            count = report.facts["characters"]["replacement_characters"]
            report.remarks.append(f"{counted(count, 'replacement character')} U+FFFD: text lost by a wrong decoding")
    if documents.overlap is not None:
        report.facts["held_out"] = documents.overlap.describe(report)
        report.facts["documents_sharing_a_window"] = documents.overlap.documents_touched
    return report


def _check_index(dataset: IndexedDataset, report: DatasetReport) -> None:
    """What the header says about the index; opening has checked the structure and the counts."""
    header = dataset.header
    if header is None:
        report.remarks.append("no header of ours: no checksums, and nothing says which tokenizer made the ids")
        return
    if hash_file(dataset.idx_path) != header.idx_hash:
        report.problems.append(f"{dataset.idx_path} has changed since it was written: its checksum differs")
    try:
        _ = dataset.fingerprint
    except DataError as error:
        report.problems.append(f"{error.what} {error.rule}")
    stated = sum(source.documents for source in header.sources)
    if header.sources and stated != dataset.num_documents:
        report.remarks.append(f"the header's sources add up to {stated:,} documents")
        return
    first = 0
    for source in header.sources:
        start, end = (int(document_starts(dataset, d, 0)[0]) for d in (first, first + source.documents))
        if source.tokens is not None and source.tokens != end - start:
            report.problems.append(
                f"the header says {source.tokens:,} tokens for {source.path}, its documents have {end - start:,}"
            )
        first += source.documents


def _check_unreadable(prefix: Path, report: DatasetReport) -> None:
    """Which file of a dataset that cannot be opened is the damaged one, as far as a header can tell."""
    try:
        header = read_header(prefix)
    except (OSError, DataError):
        header = None
    if header is None:
        path = path_of(prefix, ".meta.json")
        report.remarks.append(f"{path} cannot be read: nothing says which of .idx and .bin is the damaged one")
        return
    if hash_file(path_of(prefix, ".idx")) != header.idx_hash:
        report.problems.append(f"{path_of(prefix, '.idx')} has changed since it was written: its checksum differs")
    hashes = _block_hashes(header, report)
    if hashes is None:
        return
    with open_regular(path_of(prefix, ".bin")) as file:
        for block, expected in enumerate(hashes):
            first = block * HASH_BLOCK_BYTES
            content = file.read(min(HASH_BLOCK_BYTES, header.bin_bytes - first))
            if xxhash.xxh3_128(content).hexdigest() != expected:
                missing = "" if len(content) else ", which are missing"
                report.problems.append(
                    f"{path_of(prefix, '.bin')}: block {block} (bytes {first:,} to "
                    f"{min(first + HASH_BLOCK_BYTES, header.bin_bytes):,}{missing}) has changed since it was written"
                )
        if file.read(1):
            report.problems.append(f"{path_of(prefix, '.bin')} goes on after the {header.bin_bytes:,} bytes written")


def _block_hashes(header: DatasetHeader | None, report: DatasetReport) -> tuple[str, ...] | None:
    """The checksums of the blocks of .bin, or None where there are none to use."""
    if header is None:
        return None
    if header.block_bytes != HASH_BLOCK_BYTES or len(header.block_hashes) != -(-header.bin_bytes // HASH_BLOCK_BYTES):
        report.problems.append(
            f"{counted(len(header.block_hashes), 'checksum')} of blocks of {header.block_bytes:,} bytes in the header "
            f"do not fit a .bin of {header.bin_bytes:,} bytes"
        )
        return None
    return header.block_hashes


def _damaged(dataset: IndexedDataset, block: int, first: int, end: int) -> str:
    low, high = (document_of_token(dataset, token)[0] for token in (first, end - 1))
    size = dataset.dtype.itemsize
    return (
        f"{dataset.bin_path}: block {block} (bytes {first * size:,} to {end * size:,}, documents {low:,} to {high:,}) "
        "has changed since it was written: its checksum differs"
    )


# ---- ids ----


class _IdCounter:
    """How often each id occurs, and those that are no id of the vocabulary."""

    def __init__(self, vocab_size: int | None) -> None:
        self.limit = _LARGEST_COUNTED if vocab_size is None else min(vocab_size, _LARGEST_COUNTED)
        self.counts = np.zeros(0 if vocab_size is None else self.limit, np.int64)
        self.outside = 0
        """Tokens below 0 or beyond the vocabulary."""
        self.first_outside: tuple[int, int] | None = None
        """Token and its id."""
        self.largest = -1

    def add(self, first: int, tokens: np.ndarray) -> np.ndarray:
        """Count the tokens that begin at token ``first``; their own counts by id."""
        before = self.counts.copy()
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            part = tokens[start : start + _TOKENS_AT_ONCE]
            low, high = int(part.min()), int(part.max())
            self.largest = max(self.largest, high)
            if low < 0 or high >= self.limit:
                bad = (part < 0) | (part >= self.limit)
                self.outside += int(bad.sum())
                if self.first_outside is None:
                    place = int(np.argmax(bad))
                    self.first_outside = first + start + place, int(part[place])
                part = part[~bad]
            found = np.bincount(part, minlength=len(self.counts))
            if len(found) > len(self.counts):
                self.counts = np.append(self.counts, np.zeros(len(found) - len(self.counts), np.int64))
            self.counts += found
        return self.counts - np.append(before, np.zeros(len(self.counts) - len(before), np.int64))


def _report_ids(dataset: IndexedDataset, ids: _IdCounter, vocab_size: int | None, report: DatasetReport) -> None:
    report.facts["ids"] = {"used": int((ids.counts > 0).sum()), "largest": ids.largest, "outside": ids.outside} | (
        {} if vocab_size is None else {"vocabulary": vocab_size}
    )
    if ids.first_outside is not None:
        token, value = ids.first_outside
        report.problems.append(
            f"{counted(ids.outside, 'id')} outside [0, {ids.limit:,}), the first is {value} at token {token:,} in "
            f"document {document_of_token(dataset, token)[0]:,}"
        )
    stated = dataset.header.max_token_id if dataset.header is not None else None
    if stated is not None and stated != ids.largest:
        report.problems.append(f"the header says that the largest id is {stated}, it is {ids.largest}")


# ---- documents ----


class _DocumentChecker:
    """Looks at every document once, when the block that it ends in has been read and its pages are still there."""

    def __init__(
        self,
        dataset: IndexedDataset,
        tokens: np.ndarray,
        bos: int | None,
        eod: int | None,
        folder: Path,
        overlap: HeldOutSearch | None,
    ) -> None:
        self.dataset, self.tokens, self.bos, self.eod, self.overlap = dataset, tokens, bos, eod, overlap
        self.empty = self.with_bos = self.with_eod = self.without_text = 0
        self.first_without: dict[str, int] = {}
        """"bos", "eod" -> the first document that has some id, but lacks this one at its end."""
        self.digests = _Digests(folder)
        self._next = 0
        self._bytes = tokens.view(np.uint8).data

    def advance(self, token: int) -> None:
        """Look at the documents that end at ``token`` or before, from where the last call stopped."""
        while self._next < self.dataset.num_documents:
            count = min(_DOCUMENTS_AT_ONCE, self.dataset.num_documents - self._next)
            starts = document_starts(self.dataset, self._next, count)
            ended = int(np.searchsorted(starts[1:], token, side="right"))
            self._look(self._next, starts[: ended + 1])
            self._next += ended
            if ended < count:
                return

    def _look(self, first: int, starts: np.ndarray) -> None:
        """Documents ``first`` onwards, by their ``document_starts``."""
        tokens = self.tokens
        filled = np.flatnonzero(starts[1:] > starts[:-1])
        self.empty += len(starts) - 1 - len(filled)
        begins, ends = starts[:-1][filled], starts[1:][filled]
        if self.bos is not None:
            has = tokens[begins] == self.bos
            self.with_bos += self._count("bos", has, first, filled)
            begins = begins + has
        if self.eod is not None:
            has = (tokens[ends - 1] == self.eod) & (ends > begins)  # a lone id is not both
            self.with_eod += self._count("eod", has, first, filled)
            ends = ends - has
        text = np.flatnonzero(ends > begins)
        self.without_text += len(filled) - len(text)
        numbers, begins, ends = first + filled[text], begins[text], ends[text]
        size, digest, view = self.dataset.dtype.itemsize, xxhash.xxh3_64_intdigest, self._bytes
        spans = zip((begins * size).tolist(), (ends * size).tolist())
        digests = np.fromiter((digest(view[a:b]) for a, b in spans), np.uint64, len(numbers))
        self.digests.add(digests, numbers)
        if self.overlap is not None:
            self.overlap.look(digests, numbers, tokens, begins, ends)

    def _count(self, name: str, has: np.ndarray, first: int, filled: np.ndarray) -> int:
        if name not in self.first_without and not has.all():
            self.first_without[name] = first + int(filled[np.argmin(has)])
        return int(has.sum())


class _Digests:
    """(digest, document) pairs: in memory while they are few, else in files by the leading bits of the digest."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._waiting, self._spilled = folder, [np.empty(0, _ENTRY)], False

    def add(self, digests: np.ndarray, documents: np.ndarray) -> None:
        entries = np.empty(len(digests), _ENTRY)
        entries["digest"], entries["document"] = digests, documents
        self._waiting.append(entries)
        if sum(map(len, self._waiting)) > (IN_MEMORY // 4 if self._spilled else IN_MEMORY):
            self._spill()

    def _spill(self) -> None:
        entries = np.concatenate(self._waiting)
        self._waiting, self._spilled = [np.empty(0, _ENTRY)], True
        bucket = (entries["digest"] >> np.uint64(64 - 8)).astype(np.uint8)
        entries = entries[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=BUCKETS))
        for number, part in enumerate(np.split(entries, ends[:-1])):
            path = self._folder / str(number)
            before = path.stat().st_size if path.exists() else 0
            with writing(path, before + part.nbytes), open(path, "ab") as file:  # closing writes, too
                file.write(part.data.cast("B"))

    def buckets(self) -> Iterator[np.ndarray]:
        """All pairs, equal digests in the same array, in order of digest, then of document."""
        if self._spilled:
            self._spill()
        for number in range(BUCKETS if self._spilled else 1):
            entries = (
                np.fromfile(self._folder / str(number), _ENTRY) if self._spilled else np.concatenate(self._waiting)
            )
            yield entries[np.argsort(entries["digest"], kind="stable")]  # documents were added in order


def _report_documents(
    dataset: IndexedDataset, tokens: TokenMap, found: _DocumentChecker, ids: _IdCounter, report: DatasetReport
) -> None:
    filled = dataset.num_documents - found.empty
    facts = {"empty": found.empty, "only_bos_or_eod": found.without_text}
    options = dataset.header.options if dataset.header is not None else {}
    for name, token, number, option, place in (
        ("bos", found.bos, found.with_bos, "prepend_bos", "begin"),
        ("eod", found.eod, found.with_eod, "append_eod", "end"),
    ):
        if token is None:
            continue
        facts[f"{place}_with_{name}"] = number
        if options.get(option) is True and number < filled:
            report.problems.append(
                f"{filled - number:,} of {counted(filled, 'document')} do not {place} with the {name} {token}, first "
                f"{found.first_without[name]:,}; the header says {option}"
            )
        elif option not in options and 0 < number < filled:
            report.remarks.append(f"{number:,} of {counted(filled, 'document')} {place} with the {name} {token}")
        if name == "bos" and found.bos == found.eod:
            continue  # one id for both: counted below
        at_ends = number + (found.with_bos if found.bos == found.eod else 0)
        inside = (int(ids.counts[token]) if token < len(ids.counts) else 0) - at_ends
        facts[f"{name}_inside"] = inside
        if inside:
            first = _first_inside(dataset, tokens, token, found)
            what = f"{counted(inside, f'{name} id')} inside documents, the first in document {first:,}"
            (report.problems if options.get(option) is True else report.remarks).append(what)
    report.facts["document_marks"] = facts
    if found.empty:
        report.remarks.append(f"{counted(found.empty, 'empty document')}: training passes over them")


def _first_inside(dataset: IndexedDataset, tokens: TokenMap, token: int, found: _DocumentChecker) -> int:
    """The first document with this id anywhere but where a bos or an eod belongs."""
    for first, starts in iterate_starts(dataset, _DOCUMENTS_AT_ONCE):
        begins, ends = starts[:-1], starts[1:]
        filled = ends > begins
        at_ends = [begins[filled]] if token == found.bos else []
        at_ends += [ends[filled] - 1] if token == found.eod else []
        allowed = np.concatenate(at_ends)
        for low in range(int(starts[0]), int(starts[-1]), _TOKENS_AT_ONCE):
            part = tokens.all[low : min(low + _TOKENS_AT_ONCE, int(starts[-1]))]
            places = low + np.flatnonzero(part == token)
            inside = places[~np.isin(places, allowed)]
            if len(inside):
                return first + int(np.searchsorted(ends, inside[0], side="right"))
    raise AssertionError("it was counted before")


def _report_duplicates(dataset: IndexedDataset, found: _DocumentChecker, report: DatasetReport) -> None:
    repeats = tokens = 0
    groups = 0
    examples: list[str] = []
    most = (0, 0)
    with_text = dataset.num_documents - found.empty - found.without_text
    for entries in found.digests.buckets():
        same = entries["digest"][1:] == entries["digest"][:-1]
        again = entries["document"][1:][same]
        if len(again) == 0:
            continue
        starts, ends = document_spans(dataset, again)
        repeats, tokens = repeats + len(again), tokens + int((ends - starts).sum())
        opens = np.flatnonzero(same & ~np.append(False, same[:-1]))  # where each group of equal digests begins
        sizes = np.diff(np.append(np.flatnonzero(np.append(True, ~same)), len(entries)))
        groups += len(opens)
        for place in opens[: EXAMPLES - len(examples)].tolist():
            examples.append(" = ".join(f"{n:,}" for n in entries["document"][place : place + 2].tolist()))
        copies = int(sizes.max())
        if copies > most[0]:
            group = int(np.append(np.flatnonzero(np.append(True, ~same)), len(entries))[np.argmax(sizes)])
            most = copies, int(entries["document"][group])
    report.facts["duplicates"] = {
        "documents": repeats,
        "document_share": repeats / max(1, with_text),
        "tokens": tokens,
        "token_share": tokens / max(1, dataset.num_tokens),
        "distinct_texts_repeated": groups,
    }
    if repeats:
        report.remarks.append(
            f"{counted(repeats, 'exact duplicate')}, {100 * repeats / with_text:.2f} % of the documents with text and "
            f"{100 * tokens / dataset.num_tokens:.2f} % of the tokens; documents {', '.join(examples)}; document "
            f"{most[1]:,} is there {most[0]:,} times"
        )
