"""Indexed datasets: tokens in ``P.bin``, where each sequence lies in ``P.idx``, facts about both in ``P.meta.json``.

The first two are Megatron-LM's format::

    P.idx, little endian, no padding                                      P.bin
    0   "MMIDIDX\\0\\0"   u64 version = 1   u8 dtype code                    the tokens of all sequences, nothing else
    18  u64 S sequences   u64 D = documents + 1
    34  int32[S] lengths in tokens
        int64[S] byte offsets into .bin, each where the one before ends   P.meta.json
        int64[D] first sequence of each document, then S                  our dataset header, absent in Megatron's own

A document may hold no sequence (an empty text). Neither file has a checksum or says which tokenizer made it; the header
adds both (``DatasetHeader``). A dataset without one is accepted, and everything its index claims is checked against the
files either way, so that damaged files end in a ``DataError`` and never in a wrong sample.

This file reads; ``indexed_writer.py`` writes.
"""

from __future__ import annotations

import json
import mmap
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_hammer.base.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
FIRST_LENGTH = 34  # bytes before the lengths
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<u1"), 2: np.dtype("<i1"), 3: np.dtype("<i2"), 4: np.dtype("<i4"),
    5: np.dtype("<i8"), 6: np.dtype("<f8"), 7: np.dtype("<f4"), 8: np.dtype("<u2"),
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL_VOCABULARY = 65500  # below it Megatron-LM writes uint16, from it on int32

HEADER_FORMAT = "megatron_hammer indexed dataset"
HEADER_VERSION = 2
_OLD_HEADER_VERSIONS = (1,)  # sources without tokens, hash and rejected; still read
BLOCK_BYTES = 64 << 20  # of .bin under one checksum: small enough to name the damaged place, 16 hashes a gigabyte
_SAMPLED_BLOCKS, _SAMPLED_BYTES = 16, 64 << 10
_CHUNK = 1 << 20  # entries of the index checked at once

REMAKE = "prepare this dataset again, or copy all its files again"


def dtype_for(vocab_size: int | None) -> np.dtype:
    """The token type Megatron-LM chooses for a vocabulary."""
    return DTYPES[8] if vocab_size is not None and vocab_size < SMALL_VOCABULARY else DTYPES[4]


def path_of(prefix: str | Path, suffix: str) -> Path:
    """``P.bin`` of ``P``; the prefix itself may contain dots."""
    return Path(f"{prefix}{suffix}")


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer the ids belong to."""

    fingerprint: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None


@dataclass(frozen=True)
class SourceRecord:
    """One input text: what was read, and what was taken from it."""

    path: str
    """As given."""
    bytes: int
    """Of the file on disk."""
    documents: int
    """Taken, empty ones included."""
    tokens: int | None = None
    """Of these documents; None: not recorded."""
    xxh3: str | None = None
    """XXH3-128 of the file as ``xxhsum -H2`` prints it; None: not recorded."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Documents that were left out, for each cause (``E304``: malformed JSON ...)."""


@dataclass(frozen=True)
class DatasetHeader:
    """``P.meta.json``: what the two other files cannot say about themselves."""

    dtype: str
    sequences: int
    documents: int
    tokens: int
    bin_bytes: int
    idx_hash: str
    """XXH3-128 of the whole .idx."""
    block_bytes: int
    block_hashes: tuple[str, ...]
    """XXH3-128 of each ``block_bytes`` of .bin; the last block is shorter."""
    fingerprint: str
    """``IndexedDataset.fingerprint`` of the files as written."""
    max_token_id: int | None
    """None: not known, because there are no tokens, negative ones or floating-point ones."""
    tokenizer: TokenizerRecord | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """How the text was prepared: json_key, append_eod, prepend_bos."""
    sources: tuple[SourceRecord, ...] = ()

    def to_json(self) -> str:
        """The text of the file; the same dataset gives the same bytes."""
        tree = {"format": HEADER_FORMAT, "version": HEADER_VERSION, **asdict(self)}
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DatasetHeader:
        """The inverse of ``to_json``; raises ``ValueError`` with the reason."""
        tree = json.loads(text)
        if not isinstance(tree, dict) or tree.get("format") != HEADER_FORMAT:
            raise ValueError(f'its "format" is not "{HEADER_FORMAT}"')
        if tree.get("version") not in (HEADER_VERSION, *_OLD_HEADER_VERSIONS):
            raise ValueError(f"it has version {tree.get('version')!r}, this program reads version {HEADER_VERSION}")

        def take(source: dict, name: str, kind: type, optional: bool = False) -> Any:
            value: Any = source.get(name)
            if value is None and optional:
                return None
            if type(value) is not kind or (isinstance(value, int) and value < 0):  # type(): a bool is not an int here
                raise ValueError(f'"{name}" is {value!r}, which is not a valid {kind.__name__}')
            return value

        tokenizer = take(tree, "tokenizer", dict, optional=True)
        hashes = take(tree, "block_hashes", list)
        sources = take(tree, "sources", list)
        if not all(isinstance(value, str) for value in hashes) or not all(isinstance(s, dict) for s in sources):
            raise ValueError('"block_hashes" or "sources" hold something else than they should')
        special = ("bos_id", "eos_id", "pad_id", "unk_id")
        return cls(
            **{name: take(tree, name, str) for name in ("dtype", "idx_hash", "fingerprint")},
            **{
                name: take(tree, name, int) for name in ("sequences", "documents", "tokens", "bin_bytes", "block_bytes")
            },
            block_hashes=tuple(hashes),
            max_token_id=take(tree, "max_token_id", int, optional=True),
            tokenizer=None
            if tokenizer is None
            else TokenizerRecord(
                take(tokenizer, "fingerprint", str),
                take(tokenizer, "vocab_size", int),
                **{name: take(tokenizer, name, int, optional=True) for name in special},
            ),
            options=take(tree, "options", dict),
            sources=tuple(
                SourceRecord(
                    take(s, "path", str),
                    take(s, "bytes", int),
                    take(s, "documents", int),
                    take(s, "tokens", int, optional=True),
                    take(s, "xxh3", str, optional=True),
                    {
                        cause: take(s["rejected"], cause, int)
                        for cause in take(s, "rejected", dict, optional=True) or {}
                    },
                )
                for s in sources
            ),
        )


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
        index = _map_file(self.idx_path)
        code, sequences, boundaries = _check_start(self.idx_path, index)
        self.dtype = DTYPES[code]
        """Of the tokens on disk."""
        self._mapped = [part for part in (index,) if isinstance(part, mmap.mmap)]
        buffer = memoryview(index)
        self.lengths = np.frombuffer(buffer, "<i4", sequences, FIRST_LENGTH)
        """int32 [S], tokens of each sequence."""
        self.pointers = np.frombuffer(buffer, "<i8", sequences, FIRST_LENGTH + 4 * sequences)
        """int64 [S], byte offset of each sequence in .bin."""
        self.document_indices = np.frombuffer(buffer, "<i8", boundaries, FIRST_LENGTH + 12 * sequences)
        """int64 [documents + 1], first sequence of each document, then S."""
        itemsize = self.dtype.itemsize
        self.num_tokens = _check_sequences(self.idx_path, self.lengths, self.pointers, itemsize, self.forget)
        self._one_sequence_each = _check_documents(self.idx_path, self.document_indices, sequences, self.forget)

        tokens = _map_file(self.bin_path)
        if len(tokens) != self.num_tokens * self.dtype.itemsize:
            raise DataError(
                38,
                f"{self.bin_path} of {len(tokens):,} bytes",
                f"must hold the {self.num_tokens:,} tokens of {self.dtype.itemsize} bytes that its .idx lists",
                REMAKE,
            )
        self.tokens = np.frombuffer(tokens, self.dtype, self.num_tokens)
        """[num_tokens], all sequences one after the other."""
        self._mapped += [part for part in (tokens,) if isinstance(part, mmap.mmap)]
        self.header = _read_header(path_of(self.prefix, ".meta.json"))
        """None: written by another program."""
        self._check_header()

    def forget(self) -> None:
        """Give the pages that were looked at back: they need not count as our memory, the system keeps them cached."""
        for part in self._mapped:
            part.madvise(mmap.MADV_DONTNEED)

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
        return starts[self.document_indices]

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
        from tqdm import tqdm

        largest = -1
        step = 64 * _CHUNK
        blocks = range(0, self.num_tokens, step)
        for first in tqdm(blocks, f"reading the ids of {self.bin_path}", delay=5, disable=None):  # None: terminals only
            block = self.tokens[first : first + step]
            if self.dtype.kind == "i" and block.min() < 0:
                place = first + int(np.argmax(block < 0))
                raise DataError(41, f"{self.bin_path}: token {place:,} is {self.tokens[place]}", "must not be negative",
                                REMAKE)  # fmt: skip
            largest = max(largest, int(block.max()))
        return largest

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


def _map_file(path: Path) -> mmap.mmap | bytes:
    """The bytes of a regular file, mapped; an empty file cannot be mapped and is b""."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not make us wait for a writer
    except FileNotFoundError:
        raise DataError(
            30, str(path), "is missing", "give the prefix P of P.bin and P.idx, without the suffix"
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(30, str(path), "is not a regular file", "give the prefix P of P.bin and P.idx")
        return mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ) if status.st_size else b""
    finally:
        os.close(descriptor)


def _check_start(path: Path, index: mmap.mmap | bytes) -> tuple[int, int, int]:
    """dtype code, number of sequences and of document boundaries, checked against the size of the file."""
    if len(index) < FIRST_LENGTH or index[: len(MAGIC)] != MAGIC:
        raise DataError(31, str(path), 'does not start as an index does, with "MMIDIDX"', REMAKE)
    version, code, sequences, boundaries = struct.unpack_from("<QBQQ", index, len(MAGIC))
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


def _read_header(path: Path) -> DatasetHeader | None:
    if not path.exists():
        return None
    try:
        return DatasetHeader.from_json(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError is a ValueError
        remedy = "prepare this dataset again; without this file it is read as one of another program"
        raise DataError(39, str(path), f"is not a dataset header: {error}", remedy) from None


def _foreign_header(prefix: Path, name: str, stated: object, found: object) -> DataError:
    rule = f"does not belong to this .bin and .idx, whose {name} is {found}"
    return DataError(40, f"{prefix}.meta.json: {name}={stated}", rule, REMAKE)


def hash_file(path: Path) -> str:
    """XXH3-128 of a whole file, 32 hex digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of(idx_hash: str, bin_path: Path) -> str:
    """See ``IndexedDataset.fingerprint``; at most 1 MiB of the .bin is read, evenly spread, both ends included."""
    digest = xxhash.xxh3_128()
    with open(bin_path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{idx_hash} {size} ".encode())
        last = max(size - _SAMPLED_BYTES, 0)
        for place in sorted({last * k // (_SAMPLED_BLOCKS - 1) for k in range(_SAMPLED_BLOCKS)}):
            file.seek(place)
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()
