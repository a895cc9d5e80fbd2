"""Writes indexed datasets, the files that ``format.py`` describes: batch by batch, published whole or not at all.

Writing is streamed: tokens go to ``P.bin.tmp`` and lengths to ``P.idx.tmp`` as they come, so memory does not grow with
the dataset. Publishing syncs the files, removes the old index, then renames ``.bin``, ``.meta.json`` and ``.idx`` in
this order: there is never an old index beside new tokens, and without an index there is no dataset.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import xxhash

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.files import (
    StaleState,
    close_after,
    hash_content,
    make_durable,
    open_existing,
    open_new,
    sync_folder,
)
from megatron_hammer.base.locks import open_alone
from megatron_hammer.base.reading import open_unbuffered
from megatron_hammer.base.system import begin_to_write_out
from megatron_hammer.dataset.format import (
    CODES,
    FIRST_LENGTH,
    HASH_BLOCK_BYTES,
    MAGIC,
    REMAKE,
    VERSION,
    DatasetHeader,
    SourceRecord,
    TokenizerRecord,
    dtype_for,
    fingerprint_of,
    path_of,
)
from megatron_hammer.dataset.reader import IndexedDataset

_CHUNK = 1 << 20  # entries of the index written or copied at once
_BYTES_AT_ONCE = 32 << 20  # of tokens that the system is asked to write out together


class IndexedWriter(AbstractContextManager["IndexedWriter"]):
    """Writes a dataset batch by batch; published when its ``with`` block ends well, gone without trace when not.

    The temporaries of which ``save_state`` has told stay when the block ends with an exception: for ``resume``.

    Args:
        prefix: P of the files; missing folders are made. Old files of this name stay until the new ones are complete.
        vocab_size: ids must be below it; it also chooses the token type.
        dtype: token type, instead of the one that ``vocab_size`` chooses.
        tokenizer: recorded in the header.
        options: recorded in the header.
        resume: go on from what ``save_state`` of a former writer returned; its temporaries are cut to that state.

    Raises:
        DataError: another process writes this dataset.
        StaleState: the temporaries are not those of ``resume``.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocab_size: int | None = None,
        dtype: np.dtype | type | None = None,
        tokenizer: TokenizerRecord | None = None,
        options: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        self.prefix = Path(prefix)
        self.vocab_size = vocab_size
        self._blocks = _BlockHasher()
        self.dtype = dtype_for(vocab_size) if dtype is None else np.dtype(dtype).newbyteorder("<")
        assert self.dtype in CODES, f"{self.dtype} is not one of the format's types"
        self.tokenizer, self.options = tokenizer, dict(options or {})
        self.sources: list[SourceRecord] = []
        """Recorded in the header; the caller appends."""
        self.num_tokens = self.num_sequences = self.num_documents = 0
        self._max_token_id, self._min_token_id = -1, 0
        self._tokens_of_parts = 0  # that no length stands for yet
        self._bytes_waiting = 0  # of tokens, that the system was not asked to write out yet
        self._published, self._keep = False, resume is not None
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_alone(path_of(prefix, ".idx.tmp"))  # the last file to get its final name guards them all
        if descriptor is None:
            raise _in_use(path_of(prefix, ".idx.tmp"))
        self._idx = open_existing(path_of(prefix, ".idx.tmp"), descriptor)
        try:
            if resume is not None:
                self._go_on(resume)
            else:
                self._bin = open_new(path_of(prefix, ".bin.tmp"))  # closed by __exit__
                self._documents = open_new(path_of(prefix, ".documents.tmp"))  # appended to .idx in the end
                self._documents.write(struct.pack("<q", 0))
                self._idx.truncate(0)
                self._idx.write(bytes(FIRST_LENGTH))  # the counts are known at the end
        except BaseException:
            self._idx.close()
            raise

    def _go_on(self, state: Mapping[str, Any]) -> None:
        """Open what a former writer has left, cut to the state that it saved."""
        try:
            self._take_back(state)
            self._bin = open_existing(path_of(self.prefix, ".bin.tmp"))  # closed by __exit__
            self._documents = open_existing(path_of(self.prefix, ".documents.tmp"))
        except FileNotFoundError as error:
            raise StaleState(f"{error.filename} is gone") from None
        self._restore(state)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        except BaseException as failure:
            error = failure
            raise
        finally:
            for file in (self._bin, self._documents):
                close_after(file, error)
            if not self._published and not self._keep:  # once published, the names may be another writer's
                for suffix in (".bin.tmp", ".meta.json.tmp", ".documents.tmp", ".idx.tmp"):
                    path_of(self.prefix, suffix).unlink(missing_ok=True)
            close_after(self._idx, error)  # gives up the lock

    def add(self, tokens: np.ndarray, lengths: np.ndarray, sequences_per_document: np.ndarray | None = None) -> None:
        """Append documents.

        Args:
            tokens: [sum of lengths], ids of all sequences one after the other.
            lengths: tokens of each sequence.
            sequences_per_document: how the sequences form documents. Absent: each is a document of its own, and a
                length of 0 is a document without a sequence (an empty text).

        Raises:
            DataError: an id is not in the vocabulary, or a sequence is too long for the format.
        """
        lengths = np.asarray(lengths, np.int64)
        tokens = np.asarray(tokens)
        parts, self._tokens_of_parts = self._tokens_of_parts, 0
        assert len(tokens) + parts == lengths.sum(), (
            f"{len(tokens) + parts} tokens for lengths of {lengths.sum()} in all"
        )
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise self._too_long(lengths)
        self._add_tokens(tokens, lengths)
        if sequences_per_document is None:
            sequences = (lengths > 0).astype(np.int64)
            lengths = lengths[lengths > 0]
        else:
            sequences = np.asarray(sequences_per_document, np.int64)
            assert sequences.sum() == len(lengths), f"documents name {sequences.sum()} of {len(lengths)} sequences"
        self._idx.write(lengths.astype("<i4").tobytes())
        self._documents.write((self.num_sequences + np.cumsum(sequences)).astype("<i8").tobytes())
        self.num_documents += len(sequences)
        self.num_sequences += len(lengths)

    def _too_long(self, lengths: np.ndarray) -> DataError:
        document = self.num_documents + int(np.argmax(lengths))
        return DataError(46, f"document {document} of {lengths.max():,} tokens",
                         "is longer than the format's 2,147,483,647", "split this text")  # fmt: skip

    def add_part(self, tokens: np.ndarray) -> None:
        """Append some tokens of a sequence that is too long to be held; ``add`` ends it, with the length of it all."""
        self._add_tokens(np.asarray(tokens), np.array([len(tokens)]))
        self._tokens_of_parts += len(tokens)

    def _add_tokens(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        self._check_ids(tokens, lengths)
        data = np.ascontiguousarray(tokens, self.dtype).data.cast("B") if len(tokens) else b""
        self._write_tokens(data)
        self.num_tokens += len(tokens)

    def _write_tokens(self, data: memoryview | bytes) -> None:
        self._blocks.update(data)
        self._bin.write(data)
        self._bytes_waiting += len(data)
        if self._bytes_waiting >= _BYTES_AT_ONCE:  # so that the sync in the end has little left to do
            begin_to_write_out(self._bin.fileno(), self._bin.tell() - self._bytes_waiting, self._bytes_waiting)
            self._bytes_waiting = 0

    def append(self, dataset: IndexedDataset) -> None:
        """Append all documents of a dataset of the same token type, its bytes as they are; memory stays flat.

        Its ids are read only where its header does not say the largest.
        """
        assert dataset.dtype == self.dtype, f"{dataset.dtype} is not {self.dtype}"
        known = dataset.header is not None and dataset.header.max_token_id is not None
        if known:
            largest = dataset.max_token_id()
            assert self.vocab_size is None or largest < self.vocab_size, f"{largest} is not below {self.vocab_size}"
            self._max_token_id = max(self._max_token_id, largest)
        with open_unbuffered(dataset.bin_path) as file:
            buffer = memoryview(bytearray(8 * _CHUNK))
            for first in range(0, dataset.num_tokens * self.dtype.itemsize, len(buffer)):
                wanted = min(len(buffer), dataset.num_tokens * self.dtype.itemsize - first)
                if file.readinto(buffer[:wanted]) != wanted:  # a regular file gives less at its end only
                    raise DataError(38, str(dataset.bin_path), "became shorter while it was read", REMAKE)
                if not known:
                    self._check_ids(np.frombuffer(buffer[:wanted], self.dtype), np.array([wanted]))
                self._write_tokens(buffer[:wanted])
        for first in range(0, dataset.num_sequences, _CHUNK):
            self._idx.write(dataset.lengths[first : first + _CHUNK].data.cast("B"))
            dataset.forget()
        for first in range(1, dataset.num_documents + 1, _CHUNK):
            boundaries = dataset.document_indices[first : first + _CHUNK] + self.num_sequences
            self._documents.write(boundaries.data.cast("B"))
            dataset.forget()
        dataset.check_unchanged()
        self.num_documents += dataset.num_documents
        self.num_sequences += dataset.num_sequences
        self.num_tokens += dataset.num_tokens

    def _check_ids(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        if self.dtype.kind == "f" or len(tokens) == 0:
            return
        assert tokens.dtype.kind in "iu", f"ids are integers, not {tokens.dtype}"
        limits = np.iinfo(self.dtype)
        lowest = 0 if self.vocab_size is not None else int(limits.min)
        highest = int(limits.max) if self.vocab_size is None else min(self.vocab_size - 1, int(limits.max))
        smallest, largest = int(tokens.min()), int(tokens.max())
        if smallest < lowest or largest > highest:
            raise self._foreign_id(tokens, lengths, lowest, highest)
        self._max_token_id = max(self._max_token_id, largest)
        self._min_token_id = min(self._min_token_id, smallest)

    def _foreign_id(self, tokens: np.ndarray, lengths: np.ndarray, lowest: int, highest: int) -> DataError:
        place = int(np.argmax((tokens < lowest) | (tokens > highest)))
        document = self.num_documents + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
        return DataError(41, f"{self.prefix}: token id {tokens[place]} in document {document}",
                         f"must be in [{lowest}, {highest}]", "use the tokenizer of these ids")  # fmt: skip

    def save_state(self) -> dict[str, Any]:
        """Make all that was added durable; plain values with which another writer goes on from here."""
        for file in (self._bin, self._idx, self._documents):
            make_durable(file)
        self._keep = True
        return {
            "dtype": self.dtype.name,
            "documents": self.num_documents,
            "sequences": self.num_sequences,
            "tokens": self.num_tokens,
            "max_token_id": self._max_token_id,
            "min_token_id": self._min_token_id,
            "block_hashes": self._blocks.finish(),
        }

    def _take_back(self, state: Mapping[str, Any]) -> None:
        """Undo the steps of ``_publish`` that a killed writer had taken, up to the last one."""
        bin_path, idx_path, documents = (path_of(self.prefix, suffix) for suffix in (".bin", ".idx", ".documents.tmp"))
        if bin_path.exists() and not idx_path.exists() and not path_of(self.prefix, ".bin.tmp").exists():
            os.replace(bin_path, path_of(self.prefix, ".bin.tmp"))
        boundaries = FIRST_LENGTH + 12 * state["sequences"]
        size = os.fstat(self._idx.fileno()).st_size
        if not documents.exists() and size == boundaries + 8 * (state["documents"] + 1):
            self._idx.seek(boundaries)
            with open_new(documents) as file:
                while block := self._idx.read(8 * _CHUNK):
                    file.write(block)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.num_documents, self.num_sequences = state["documents"], state["sequences"]
        self.num_tokens = state["tokens"]
        self._max_token_id, self._min_token_id = state["max_token_id"], state["min_token_id"]
        for file, size in (
            (self._bin, self.num_tokens * self.dtype.itemsize),
            (self._idx, FIRST_LENGTH + 4 * self.num_sequences),
            (self._documents, 8 * (self.num_documents + 1)),
        ):
            if state["dtype"] != self.dtype.name or os.fstat(file.fileno()).st_size < size:
                raise StaleState(f"{file.name} is shorter than it was")
            file.truncate(size)
            file.seek(size)
        if not self._blocks.resume(self._bin, state["block_hashes"]):
            raise StaleState(f"{self._bin.name} ends in other tokens")

    def _publish(self) -> None:
        """Complete the temporary files, then put them in place of the old ones."""
        self._write_pointers()
        self._documents.seek(0)
        while block := self._documents.read(8 * _CHUNK):
            self._idx.write(block)
        self._idx.seek(0)
        counts = (VERSION, CODES[self.dtype], self.num_sequences, self.num_documents + 1)
        self._idx.write(MAGIC + struct.pack("<QBQQ", *counts))
        make_durable(self._bin)
        make_durable(self._idx)
        self._write_header()

        idx = path_of(self.prefix, ".idx")
        idx.unlink(missing_ok=True)  # before .bin changes: never an old index beside new tokens
        sync_folder(idx.parent)
        for suffix in (".bin", ".meta.json", ".idx"):
            if suffix == ".idx":  # from here on another writer may use these names
                path_of(self.prefix, ".documents.tmp").unlink()
            os.replace(path_of(self.prefix, f"{suffix}.tmp"), path_of(self.prefix, suffix))
        self._published = True
        sync_folder(idx.parent)

    def _write_pointers(self) -> None:
        """Append the byte offsets, made from the lengths that are already in the file."""
        self._idx.flush()
        pointer = 0
        for first in range(0, self.num_sequences, _CHUNK):
            count = min(_CHUNK, self.num_sequences - first)
            self._idx.seek(FIRST_LENGTH + 4 * first)
            ends = np.cumsum(np.frombuffer(self._idx.read(4 * count), "<i4"), dtype=np.int64) * self.dtype.itemsize
            starts = np.concatenate([[0], ends[:-1]]) + pointer
            self._idx.seek(FIRST_LENGTH + 4 * self.num_sequences + 8 * first)
            self._idx.write(starts.astype("<i8").tobytes())
            pointer += int(ends[-1])
        self._idx.seek(0, os.SEEK_END)

    def _write_header(self) -> None:
        block_hashes = tuple(self._blocks.finish())
        self._idx.seek(0)
        idx_hash = hash_content(self._idx)
        header = DatasetHeader(
            dtype=self.dtype.name,
            sequences=self.num_sequences,
            documents=self.num_documents,
            tokens=self.num_tokens,
            bin_bytes=self.num_tokens * self.dtype.itemsize,
            idx_hash=idx_hash,
            block_bytes=HASH_BLOCK_BYTES,
            block_hashes=block_hashes,
            fingerprint=fingerprint_of(idx_hash, path_of(self.prefix, ".bin.tmp")),
            max_token_id=self._max_token_id if self._max_token_id >= 0 and self._min_token_id >= 0 else None,
            tokenizer=self.tokenizer,
            options=self.options,
            sources=tuple(self.sources),
        )
        with open_new(path_of(self.prefix, ".meta.json.tmp")) as file:
            file.write(header.to_json().encode("utf-8", "surrogateescape"))  # a source's path may be any bytes
            make_durable(file)


class _BlockHasher:
    """XXH3-128 of each HASH_BLOCK_BYTES of a stream."""

    def __init__(self) -> None:
        self._hash, self._filled, self._done = xxhash.xxh3_128(), 0, []  # type: ignore[var-annotated]

    def update(self, data: memoryview | bytes) -> None:
        rest = memoryview(data)
        while len(rest):
            taken = rest[: HASH_BLOCK_BYTES - self._filled]
            self._hash.update(taken)
            self._filled += len(taken)
            rest = rest[len(taken) :]
            if self._filled == HASH_BLOCK_BYTES:
                self._done.append(self._hash.hexdigest())
                self._hash, self._filled = xxhash.xxh3_128(), 0

    def finish(self) -> list[str]:
        return self._done + ([self._hash.hexdigest()] if self._filled else [])

    def resume(self, file: IO[bytes], hashes: list[str]) -> bool:
        """Go on behind the content of a file, of which the last block is read; whether that has the hash it should."""
        size = os.fstat(file.fileno()).st_size
        whole = size // HASH_BLOCK_BYTES
        self._done = list(hashes[:whole])
        file.seek(whole * HASH_BLOCK_BYTES)
        self.update(file.read())
        return self.finish() == hashes


def _in_use(path: Path) -> DataError:
    return DataError(42, str(path), "is being written by another process", "wait for it, or choose another prefix")
