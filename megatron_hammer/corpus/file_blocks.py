"""The values that readers of files return: places in a file, ranges of a file, and blocks of whole documents.

A block is about a megabyte of whole documents, or one longer document by itself. ``readers.py`` makes blocks,
``parse.py`` takes the texts out of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from megatron_hammer.base.errors import DataError

BLOCK_BYTES = 1 << 20
"""Of text in a block: 13 ms of encoding for one thread, well beyond what handing it on costs."""


class Position(NamedTuple):
    """A place between two documents of a file."""

    offset: int
    """Bytes of the uncompressed text before it; rows of a parquet file."""
    line: int
    """Number of the next line or row, from 1."""


START = Position(0, 1)


@dataclass(frozen=True)
class FileRange:
    """A range of one file that can be read by itself."""

    source: int
    """Number of the file among the inputs."""
    start: Position = START
    """``line`` is 1 where the number is not known: it then counts from the begin of the range."""
    end: int | None = None
    """Offset behind its last document; None: the end of the file."""


@dataclass
class Block:
    """Whole documents as they lie in a file."""

    source: int
    kind: str
    """jsonl, file, line, blank-line or parquet."""
    start: Position
    end: Position
    data: Any
    """bytes or bytearray; a pyarrow RecordBatch of the wanted columns."""
    text_bytes: int
    """Of ``data``, uncompressed, line endings included."""
    raw_bytes: int
    """Bytes of the file on disk that were read for it: they add up to the file's size."""
    content_hash: str | None
    """XXH3-128 of the uncompressed text up to ``end``; None for parquet."""
    last: bool = False
    """The file ends here."""
    file_hash: str | None = None
    """On the last block of a file read from its start: XXH3-128 of the raw file."""
    trouble: tuple[DataError, Position] | None = None
    """What is wrong, and where, behind the block's documents: a damaged file, an empty one, a line beyond the limit."""
