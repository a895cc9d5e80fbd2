"""How much text and how many tokens each source has: the table that a corpus is published with.

    zh   from a dataset's index and header, in milliseconds     documents, lines, tokens
         and its .bin where a tokenizer is given                bytes of text: those that the ids stand for
    en   from text                                              documents, lines, bytes of text
         and a tokenizer                                        tokens

A *line* is an entry of the corpus (of a JSON lines file, a row, a document of a dataset), a *document* one that has any
text. Tokens of text are counted without the ids that mark its beginning and end; a dataset's own include those that it
was made with. Bytes are UTF-8. A source may be of several files and datasets: they add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.progress import Progress
from megatron_hammer.base.tables import align
from megatron_hammer.corpus.documents import read_batches
from megatron_hammer.corpus.readers import expand_inputs
from megatron_hammer.dataset.format import path_of
from megatron_hammer.dataset.look.matching import check_matching
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer

_TOKENS_AT_ONCE = 1 << 22


@dataclass
class SourceCount:
    """The counts of one source, a row of the table. None: not known from what was given."""

    name: str
    documents: int = 0
    lines: int = 0
    text_bytes: int | None = 0
    tokens: int | None = 0

    @property
    def bytes_per_token(self) -> float | None:
        """Compression: bytes of text for each token; None where either is not known."""
        return self.text_bytes / self.tokens if self.text_bytes is not None and self.tokens else None

    def add(self, other: SourceCount) -> None:
        """Add a part of the source; what is not known of a part is not known of the sum."""
        self.documents += other.documents
        self.lines += other.lines
        self.text_bytes = _sum(self.text_bytes, other.text_bytes)
        self.tokens = _sum(self.tokens, other.tokens)


def _sum(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


@dataclass(frozen=True)
class CountTable:
    """All sources and their sum."""

    rows: list[SourceCount]
    total: SourceCount
    shares_of: str
    """``tokens`` or ``text_bytes``: what the shares are of, the first that is known of every source."""
    tokenizers: list[str]
    """Fingerprints of those that made the tokens; several: the tokens are not comparable."""

    def share(self, row: SourceCount) -> float | None:
        """What part of the sum a source is; None where that is not known."""
        part, whole = getattr(row, self.shares_of), getattr(self.total, self.shares_of)
        return part / whole if part is not None and whole else None

    def to_json(self) -> dict[str, Any]:
        """The table as JSON values."""

        def fields(row: SourceCount) -> dict[str, Any]:
            return {
                "name": row.name,
                "documents": row.documents,
                "lines": row.lines,
                "text_bytes": row.text_bytes,
                "tokens": row.tokens,
                "bytes_per_token": row.bytes_per_token,
                "share": self.share(row),
            }

        return {
            "sources": [fields(row) for row in self.rows],
            "total": fields(self.total),
            "shares_of": self.shares_of,
            "tokenizers": self.tokenizers,
        }

    def __str__(self) -> str:
        """The table for people, ``-`` for what is not known."""
        of = "tokens" if self.shares_of == "tokens" else "bytes"
        cells = [["source", "documents", "lines", "bytes of text", "tokens", "bytes/token", f"share of {of}"]]
        for row in [*self.rows, self.total]:
            share, rate = self.share(row), row.bytes_per_token
            cells.append([
                row.name, f"{row.documents:,}", f"{row.lines:,}",
                *("-" if value is None else f"{value:,}" for value in (row.text_bytes, row.tokens)),
                "-" if rate is None else f"{rate:.3f}",
                "-" if share is None else f"{share:.2%}",
            ])  # fmt: skip
        lines = align(cells)
        if len(self.tokenizers) > 1:
            lines.append(f"The tokens are of {len(self.tokenizers)} different tokenizers: do not compare or add them.")
        return "\n".join(lines)


def count_tokens(
    sources: Sequence[tuple[str, str | Path]],
    tokenizer_path: str | Path | None = None,
    key: str = "text",
    threads: int = 1,
) -> CountTable:
    """Count sources, given as (name, path); equal names add up.

    Args:
        sources: a path is the prefix P of a dataset where ``P.idx`` exists, else a text file, folder or pattern.
        tokenizer_path: counts the tokens of text, and gives the bytes that a dataset's ids stand for (then its ``.bin``
            is read too). With a tokenizer that puts a space before every text, those are one more for each document.
        key: the field or column of text files.
        threads: that encode; the counts do not depend on it.

    Raises:
        ConfigError: E289 no source, or fewer than one thread.
        DataError: a missing, empty or malformed input (``corpus/readers.py``, ``dataset/reader.py``).
        RefusedError: E510 a dataset of another tokenizer.
    """
    if not sources or threads < 1:
        raise ConfigError(89, f"{len(sources)} sources, --threads={threads}", "must be at least one of each",
                          "name sources, and a number of threads")  # fmt: skip
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path is not None else None
    plan: list[tuple[str, IndexedDataset | list[Path]]] = [
        (name, IndexedDataset(path) if path_of(path, ".idx").exists() else expand_inputs([path]))
        for name, path in sources
    ]  # what is missing is found before hours of counting
    rows: dict[str, SourceCount] = {}
    fingerprints: set[str] = set()
    with Progress("counting", sum(_work(part, tokenizer) for _, part in plan)) as progress:
        for name, part in plan:
            if isinstance(part, IndexedDataset):
                counted = _count_dataset(name, part, tokenizer, fingerprints, progress)
            else:
                counted = _count_text(name, part, tokenizer, key, threads, progress)
                fingerprints |= {tokenizer.fingerprint} if tokenizer is not None else set()
            rows.setdefault(name, SourceCount(name)).add(counted)
    total = SourceCount("total")
    for row in rows.values():
        total.add(row)
    shares_of = "text_bytes" if total.tokens is None and total.text_bytes is not None else "tokens"
    return CountTable(list(rows.values()), total, shares_of, sorted(fingerprints))


def _work(part: IndexedDataset | list[Path], tokenizer: Tokenizer | None) -> int:
    """Bytes to read."""
    if isinstance(part, IndexedDataset):
        return part.tokens.nbytes if tokenizer is not None else 0
    return sum(path.stat().st_size for path in part)


def _count_dataset(
    name: str, dataset: IndexedDataset, tokenizer: Tokenizer | None, fingerprints: set[str], progress: Progress
) -> SourceCount:
    record = dataset.header.tokenizer if dataset.header is not None else None
    if record is not None:
        fingerprints.add(record.fingerprint)
    # A document of several sequences is one document; one of none is an empty text.
    empty = int(np.count_nonzero(np.diff(dataset.document_indices) == 0))
    text_bytes = None
    if tokenizer is not None:
        check_matching(dataset, tokenizer)
        text_bytes = _bytes_of_ids(dataset, tokenizer, progress)
    return SourceCount(name, dataset.num_documents - empty, dataset.num_documents, text_bytes, dataset.num_tokens)


def _bytes_of_ids(dataset: IndexedDataset, tokenizer: Tokenizer, progress: Progress) -> int:
    sizes, total = tokenizer.piece_bytes(), 0
    for first in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
        ids = dataset.tokens[first : first + _TOKENS_AT_ONCE]
        if int(ids.max()) >= len(sizes) or int(ids.min()) < 0:
            raise DataError(66, f"{dataset.bin_path}: token ids {int(ids.min())} to {int(ids.max())}",
                            f"must be in [0, {len(sizes) - 1}]", "give the tokenizer of this dataset")  # fmt: skip
        total += int(sizes[ids].sum(dtype=np.int64))
        progress.advance(ids.nbytes)
    dataset.check_unchanged()
    return total


def _count_text(
    name: str, paths: Iterable[Path], tokenizer: Tokenizer | None, key: str, threads: int, progress: Progress
) -> SourceCount:
    counted = SourceCount(name, tokens=None if tokenizer is None else 0)
    for texts in read_batches(paths, key, progress):
        sizes = [len(text.encode()) for text in texts]
        counted.lines += len(sizes)
        counted.documents += len(sizes) - sizes.count(0)
        counted.text_bytes = _sum(counted.text_bytes, sum(sizes))
        if tokenizer is not None:
            counted.tokens = _sum(counted.tokens, len(tokenizer.encode_documents(texts, threads)[0]))
    return counted
