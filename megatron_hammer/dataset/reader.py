"""Reads indexed datasets, the files that ``format.py`` describes.

A dataset is mapped into memory and checked when it is opened: all that its index and its header claim is compared with
the files, so that damaged files end in a ``DataError`` and never in a wrong sample. A dataset without a header, as
Megatron-LM writes it, is accepted.
"""

from __future__ import annotations

import difflib
import os
import struct
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.errors import DataError, UnfitFile
from megatron_hammer.base.files import hash_file
from megatron_hammer.base.mapping import FileMap
from megatron_hammer.base.paths import unusable_remedy, what_is
from megatron_hammer.base.progress import track
from megatron_hammer.base.reading import open_descriptor
from megatron_hammer.dataset.format import (
    DTYPES,
    FIRST_LENGTH,
    MAGIC,
    REMAKE,
    VERSION,
    fingerprint_of,
    path_of,
    read_header,
)

_CHUNK = 1 << 20  # entries of the index checked at once
_MAY_HAVE_HOLES = 1 << 26  # bytes of an index that are read in a moment, whatever they are


class IndexedDataset:
    """A memory-mapped dataset, checked when it is opened.

    Opening reads the whole index once (0.3 s for 50 million sequences here) and no token. All arrays are read-only
    views of the files; the operating system shares them between processes.

    Args:
        prefix: P of ``P.bin`` and ``P.idx``.

    Raises:
        DataError: a file is missing, or is not what the other files say.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        """P."""
        index_map = map_file(self.idx_path)
        index = index_map.array()
        code, sequences, boundaries = _check_start(self.idx_path, index)
        _check_without_holes(self.idx_path, len(index))
        self.dtype = DTYPES[code]
        """Of the tokens on disk."""
        self.maps = [index_map]
        """Of its files: ``FileMap.check`` says whether one is still what was opened."""
        self.lengths = np.frombuffer(index, "<i4", sequences, FIRST_LENGTH)
        """int32 [S], tokens of each sequence."""
        self.pointers = np.frombuffer(index, "<i8", sequences, FIRST_LENGTH + 4 * sequences)
        """int64 [S], byte offset of each sequence in .bin."""
        self.document_indices = np.frombuffer(index, "<i8", boundaries, FIRST_LENGTH + 12 * sequences)
        """int64 [documents + 1], first sequence of each document, then S."""
        itemsize = self.dtype.itemsize
        self.num_tokens = _check_sequences(self.idx_path, self.lengths, self.pointers, itemsize, self.forget)
        self._one_sequence_each = _check_documents(self.idx_path, self.document_indices, sequences, self.forget)

        token_map = map_file(self.bin_path)
        tokens = token_map.array()
        if len(tokens) != self.num_tokens * self.dtype.itemsize:
            raise DataError(
                38,
                f"{self.bin_path} of {len(tokens):,} bytes",
                f"must hold the {self.num_tokens:,} tokens of {self.dtype.itemsize} bytes that its .idx lists",
                REMAKE,
            )
        self.tokens = np.frombuffer(tokens, self.dtype, self.num_tokens)
        """[num_tokens], all sequences one after the other."""
        self.maps.append(token_map)
        self.check_unchanged()  # all that was looked at was there
        self.header = read_header(self.prefix)
        """None: written by another program."""
        self._check_header()

    def forget(self) -> None:
        """Give the pages that were looked at back: they need not count as our memory, the system keeps them cached."""
        for part in self.maps:
            part.forget()

    def check_unchanged(self) -> None:
        """To be asked after reading, before what was read is used: are the files still those that were opened?

        Raises:
            DataError: E350 one of them was cut or overwritten.
        """
        for part in self.maps:
            part.check()

    @property
    def bin_path(self) -> Path:
        return path_of(self.prefix, ".bin")

    @property
    def idx_path(self) -> Path:
        return path_of(self.prefix, ".idx")

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @cached_property
    def document_lengths(self) -> np.ndarray:
        """Tokens of each document: int32 ``lengths`` itself where every document is one sequence, else int64."""
        return self.lengths if self._one_sequence_each else np.diff(self._document_starts)

    @cached_property
    def _document_starts(self) -> np.ndarray:
        """int64 [documents + 1], first token of each document in ``tokens``, then their number."""
        starts = np.append(self.pointers // self.dtype.itemsize, self.num_tokens)
        return np.asarray(starts[self.document_indices])

    @cached_property
    def _aligned_boundaries(self) -> np.ndarray:
        """``document_indices`` in memory: NumPy's search would copy the unaligned ones of the file at each call."""
        return self.document_indices.copy()

    @property
    def boundaries(self) -> np.ndarray | None:
        """``document_indices``, or None where every document is one sequence and they say nothing."""
        return None if self._one_sequence_each else self.document_indices

    def first_sequences(self, documents: np.ndarray) -> np.ndarray:
        """The first sequence of each of some documents that are not empty."""
        return documents if self._one_sequence_each else self.document_indices[documents]

    def document_of(self, sequence: int) -> tuple[int, int]:
        """The document of a sequence, and the tokens of that document before it."""
        if self._one_sequence_each:
            return sequence, 0
        document = int(np.searchsorted(self._aligned_boundaries, sequence, side="right")) - 1
        before = self.pointers[sequence] - self.pointers[self.document_indices[document]]
        return document, int(before) // self.dtype.itemsize

    def read(self, sequence: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Tokens [offset, offset + length) of a sequence (to its end when length is None), as a view of the file."""
        size = int(self.lengths[sequence])
        length = size - offset if length is None else length
        assert offset >= 0 and length >= 0 and offset + length <= size, (
            f"[{offset}, {offset + length}) is not within sequence {sequence} of {size} tokens"
        )
        start = int(self.pointers[sequence]) // self.dtype.itemsize + offset
        return self.tokens[start : start + length]

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits that name the content: XXH3-128 of the .idx, the size of the .bin and blocks sampled from it.

        The same with and without a header, so that losing that file does not change the order of samples.

        Raises:
            DataError: the header was made for other files.
        """
        fingerprint = fingerprint_of(hash_file(self.idx_path), self.bin_path)
        if self.header is not None and self.header.fingerprint != fingerprint:
            raise _foreign_header(self.prefix, "fingerprint", self.header.fingerprint, fingerprint)
        return fingerprint

    def max_token_id(self) -> int:
        """Largest id in the dataset, -1 when there is none; from the header, else by reading all tokens once.

        Raises:
            DataError: a token is negative or not an integer.
        """
        if self.dtype.kind == "f":
            raise DataError(33, f"{self.idx_path}: dtype {self.dtype.name}", "holds no token ids: they are integers",
                            "name a dataset of token ids")  # fmt: skip
        if self.header is not None and self.header.max_token_id is not None:
            return self.header.max_token_id
        return self._scanned_max_token_id

    @cached_property
    def _scanned_max_token_id(self) -> int:
        largest = -1
        step = 64 * _CHUNK
        blocks = range(0, self.num_tokens, step)
        for first in track(blocks, f"reading the ids of {self.bin_path}", len(blocks), "blocks"):
            block = self.tokens[first : first + step]
            if self.dtype.kind == "i" and block.min() < 0:
                place = first + int(np.argmax(block < 0))
                raise DataError(41, f"{self.bin_path}: token {place:,} is {self.tokens[place]}", "must not be negative",
                                REMAKE)  # fmt: skip
            largest = max(largest, int(block.max()))
        self.check_unchanged()
        return largest

    def position_of(self, document: int, offset: int) -> int:
        """Which of ``tokens`` is token ``offset`` of a document."""
        return int(self._document_starts[document]) + offset

    def foreign_id(self, token_id: int, position: int, vocab_size: int) -> DataError:
        """The error for an id that is not in the vocabulary, read as token ``position`` of ``tokens``."""
        document = int(np.searchsorted(self._document_starts, position, side="right")) - 1
        within = position - int(self._document_starts[document])
        return DataError(
            41,
            f"{self.bin_path}: token id {token_id} (token {within} of document {document}, token {position} of all)",
            f"must be at least 0 and below the vocabulary's size {vocab_size}",
            "the file was damaged after it was made (tools/inspect_dataset.py verify says where): copy it again, or "
            "prepare it again",
        )

    def describe(self) -> dict[str, Any]:
        """Counts and origin as plain values; the largest id may need a scan of all tokens."""
        header = self.header
        return {
            "prefix": str(self.prefix),
            "documents": self.num_documents,
            "sequences": self.num_sequences,
            "tokens": self.num_tokens,
            "dtype": self.dtype.name,
            "longest_sequence": int(self.lengths.max()) if self.num_sequences else 0,
            "max_token_id": self.max_token_id(),
            "fingerprint": self.fingerprint,
            "tokenizer": asdict(header.tokenizer) if header is not None and header.tokenizer is not None else None,
            "options": dict(header.options) if header is not None else None,
            "sources": [asdict(source) for source in header.sources] if header is not None else None,
        }

    def _check_header(self) -> None:
        if self.header is None:
            return
        for name, expected in (
            ("dtype", self.dtype.name),
            ("sequences", self.num_sequences),
            ("documents", self.num_documents),
            ("tokens", self.num_tokens),
            ("bin_bytes", len(self.tokens) * self.dtype.itemsize),
        ):
            if getattr(self.header, name) != expected:
                raise _foreign_header(self.prefix, name, getattr(self.header, name), expected)


def check_prefix(prefix: str | Path) -> None:
    """Refuse a prefix without an index before anything is loaded.

    Raises:
        DataError: E330, with what was probably meant.
    """
    index = path_of(Path(prefix), ".idx")
    if not index.exists():
        raise DataError(30, str(index), "is missing", prefix_remedy(index))


def map_file(path: Path) -> FileMap:
    """A regular file, mapped; its descriptor is closed again."""
    try:
        descriptor = open_descriptor(path)
    except FileNotFoundError:
        raise DataError(30, str(path), "is missing", prefix_remedy(path)) from None
    except (UnfitFile, IsADirectoryError):
        raise DataError(30, str(path), "is not a regular file", "give the prefix P of P.bin and P.idx") from None
    try:
        return FileMap(descriptor, os.fstat(descriptor).st_size, path)
    finally:
        os.close(descriptor)


def _check_without_holes(path: Path, size: int) -> None:
    """Refuse a large index that only seems to be as long: 100 GB of zeros that nobody has written are made in no time,
    and take minutes to be read."""
    if size <= _MAY_HAVE_HOLES:
        return
    descriptor = open_descriptor(path)
    try:
        hole = os.lseek(descriptor, 0, os.SEEK_HOLE)
    except OSError:  # a file system that cannot say
        return
    finally:
        os.close(descriptor)
    if hole < size:
        remedy = "copy it whole (cp --sparse=never), or " + REMAKE
        raise DataError(34, f"{path} of {size:,} bytes", f"was never written from byte {hole:,} on", remedy)


def prefix_remedy(path: Path) -> str:
    """What to name in place of the dataset that has no such file: P.bin or P.idx for the prefix P."""
    prefix = path.with_suffix("")
    if prefix.suffix in (".bin", ".idx") and path_of(prefix.with_suffix(""), ".idx").is_file():
        return f"name the prefix without the suffix: {prefix.with_suffix('')}"
    if prefix.is_file():
        return f"{prefix} is no dataset: make one with tools/preprocess_data.py --input {prefix}, and name its prefix"
    folder = prefix if prefix.is_dir() else prefix.parent
    there = sorted(p.with_suffix("").name for p in folder.glob("*.idx")) if folder.is_dir() else []
    if f"{prefix.name}_text_document" in there:
        return f"did you mean {prefix}_text_document?"
    if prefix.is_dir() and there:
        shown = ", ".join(str(folder / name) for name in there[:3]) + (", ..." if len(there) > 3 else "")
        return f"{prefix} is a folder: name datasets in it, such as {shown}"
    if remedy := unusable_remedy(str(prefix)):
        return remedy
    if kind := what_is(prefix):
        return f"{prefix} is {kind}: data.train names datasets, which tools/preprocess_data.py makes of text"
    if prefix.is_dir() and any(p.is_file() for p in prefix.iterdir()):
        return f"{prefix} is a folder without datasets: make one with tools/preprocess_data.py --input {prefix}"
    if close := difflib.get_close_matches(prefix.name, there, n=1):
        return f"did you mean {folder / close[0]}?"
    return "give the prefix P of P.bin and P.idx, without the suffix"


def _check_start(path: Path, index: np.ndarray) -> tuple[int, int, int]:
    """dtype code, number of sequences and of document boundaries, checked against the size of the file."""
    if len(index) < FIRST_LENGTH or index[: len(MAGIC)].tobytes() != MAGIC:
        raise DataError(31, str(path), 'does not start as an index does, with "MMIDIDX"', REMAKE)
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index.data, len(MAGIC))
    if version != VERSION:
        raise DataError(32, f"{path}: version {version}", f"must be {VERSION}", REMAKE)
    if code not in DTYPES:
        raise DataError(33, f"{path}: dtype code {code}", f"must be one of {min(DTYPES)} to {max(DTYPES)}", REMAKE)
    expected = FIRST_LENGTH + 12 * sequences + 8 * boundaries
    if len(index) != expected:
        raise DataError(
            34,
            f"{path} of {len(index):,} bytes",
            f"must have {expected:,} bytes for its {sequences:,} sequences and {boundaries:,} document boundaries",
            REMAKE,
        )
    return code, sequences, boundaries


def _check_sequences(
    path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int, forget: Callable[[], None]
) -> int:
    """Lengths not negative, every sequence where the one before ends; the number of tokens."""
    tokens = 0
    for first in range(0, len(lengths), _CHUNK):
        block = lengths[first : first + _CHUNK]
        if block.min() < 0:
            place = first + int(np.argmax(block < 0))
            raise DataError(35, f"{path}: length {lengths[place]} of sequence {place}", "must not be negative", REMAKE)
        ends = tokens + np.cumsum(block, dtype=np.int64)
        starts = (ends - block) * itemsize
        wrong = pointers[first : first + _CHUNK] != starts
        if wrong.any():
            place = first + int(np.argmax(wrong))
            raise DataError(
                36,
                f"{path}: offset {pointers[place]} of sequence {place}",
                f"must be {starts[place - first]}, where the sequence before ends",
                REMAKE,
            )
        tokens = int(ends[-1])
        forget()
    return tokens


def _check_documents(path: Path, boundaries: np.ndarray, sequences: int, forget: Callable[[], None]) -> bool:
    """Boundaries from 0 to the number of sequences, never falling; whether each document is exactly one sequence."""
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != sequences:
        raise DataError(37, f"{path}: document boundaries", f"must run from 0 to the {sequences} sequences", REMAKE)
    one_each = len(boundaries) == sequences + 1
    for first in range(0, len(boundaries) - 1, _CHUNK):
        steps = np.diff(boundaries[first : first + _CHUNK + 1])
        if steps.min() < 0:
            place = first + 1 + int(np.argmax(steps < 0))
            raise DataError(
                37,
                f"{path}: document boundary {boundaries[place]} at {place}",
                "must not fall below the one before",
                REMAKE,
            )
        one_each = one_each and bool((steps == 1).all())
        forget()
    return one_each


def _foreign_header(prefix: Path, name: str, stated: object, found: object) -> DataError:
    rule = f"does not belong to this .bin and .idx, whose {name} is {found}"
    return DataError(40, f"{prefix}.meta.json: {name}={stated}", rule, REMAKE)
