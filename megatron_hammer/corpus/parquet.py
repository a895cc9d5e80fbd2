"""Parquet files in blocks of rows: one row group after the other, each in batches of about a block's size.

The text of a document is the value of a string column. Places in a file are rows, since its bytes cannot be counted:
the progress through the file is the share of its rows. Needs the optional library pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import hash_file
from megatron_hammer.corpus import file_blocks, long
from megatron_hammer.corpus.file_blocks import START, Block, FileRange, Position
from megatron_hammer.corpus.stream import check_file

_BATCH_ROWS = 4096  # most rows in a block


def row_group_cuts(path: Path, range_bytes: int) -> list[int]:
    """The rows before which a file can be cut, between row groups, into ranges of about so many bytes."""
    with _open(path) as file:
        cuts, rows, filled = [], 0, 0
        for group in range(file.metadata.num_row_groups):
            if filled >= range_bytes:
                cuts.append(rows)
                filled = 0
            rows += file.metadata.row_group(group).num_rows
            filled += file.metadata.row_group(group).total_byte_size
    return cuts


def _open(path: Path) -> Any:
    check_file(path)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(76, str(path), "needs the library pyarrow, which this Python lacks",
                          "run: pip install 'megatron_hammer[parquet]'") from None  # fmt: skip
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=file_blocks.BLOCK_BYTES, pre_buffer=False)
    except _parquet_errors() as error:
        raise _damaged_parquet(path, 1, error) from None


def _parquet_errors() -> tuple[type[Exception], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError)


def _damaged_parquet(path: Path, row: int, error: Exception) -> DataError:
    return DataError(47, f"{path}:{row}", f"could not be read as parquet ({error})", "fetch or write it again")


def read_parquet(
    path: Path, file_range: FileRange, keys: Sequence[str], resume: Position | None, lenient: bool
) -> Iterator[Block]:
    """Row groups one after the other, each in batches: memory holds a batch, and what the library buffers."""
    size = path.stat().st_size
    place = file_range.start if resume is None else resume
    trouble: tuple[DataError, Position] | None = None
    try:
        opened = _open(path)
    except DataError as error:
        if not lenient or error.number != 47:
            raise
        yield Block(
            file_range.source, "parquet", place, place, None, 0, size, None, True, hash_file(path), (error, START)
        )
        return
    with opened as file:
        rows = file.metadata.num_rows
        counted = size * place.offset // max(rows, 1)
        _check_columns(path, file.schema_arrow, keys)
        if resume is not None:
            yield Block(file_range.source, "parquet", resume, resume, None, 0, 0, None)
        try:
            for first, batch in _batches(file, keys, place.offset, rows if file_range.end is None else file_range.end):
                start, place = place, Position(first + batch.num_rows, first + batch.num_rows + 1)
                raw, counted = size * place.offset // rows - counted, size * place.offset // rows
                texts = _as_strings(batch, keys)
                yield Block(file_range.source, "parquet", start, place, texts, texts.nbytes, raw, None)
        except _parquet_errors() as error:
            trouble = _damaged_parquet(path, place.line, error), place
    last = file_range.end is None
    if last and rows == 0:
        trouble = DataError(2, str(path), "holds no document", "give a file with rows"), START
    file_hash = hash_file(path) if last and file_range.start.offset == 0 else None
    left = size - counted if last else 0
    yield Block(file_range.source, "parquet", place, place, None, 0, left, None, last, file_hash, trouble)


def _batches(file: Any, keys: Sequence[str], start: int, end: int) -> Iterator[tuple[int, Any]]:
    """(first row, batch) of the rows [start, end); ``end`` is that of a row group."""
    behind = 0
    for group in range(file.metadata.num_row_groups):
        facts = file.metadata.row_group(group)
        row, behind = behind, behind + facts.num_rows
        if behind <= start or row >= end:
            continue
        average = facts.total_byte_size // max(facts.num_rows, 1) + 1
        rows = max(1, min(_BATCH_ROWS, file_blocks.BLOCK_BYTES // average))
        for batch in file.iter_batches(rows, [group], list(keys), use_threads=False):
            if row + batch.num_rows > start:
                skipped = max(start - row, 0)
                step = 1 if batch.nbytes >= long.LONG_BYTES else batch.num_rows  # a long document by itself
                for first in range(skipped, batch.num_rows, step):
                    yield row + first, batch.slice(first, step)
            row += batch.num_rows


def _check_columns(path: Path, schema: Any, keys: Sequence[str]) -> None:
    for key in keys:
        if schema.names.count(key) > 1:
            raise DataError(7, str(path), f"has {schema.names.count(key)} columns {key!r}", "give them different names")
        index = schema.get_field_index(key)
        if index < 0:
            names = ", ".join(sorted(schema.names)[:8]) or "none"
            raise DataError(7, str(path), f"has no column {key!r} (its columns: {names})",
                            "name the column that holds the text")  # fmt: skip
        if not _is_text(kind := schema.field(index).type):
            raise DataError(7, str(path), f"has {kind} in the column {key!r}", "the text must be a string")


def _is_text(kind: Any) -> bool:
    """Whether values of this type are strings, or bytes that may be UTF-8, however they are stored."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _is_text(kind.storage_type)
    if isinstance(kind, pyarrow.DictionaryType):
        return _is_text(kind.value_type)
    return str(kind) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def _as_strings(batch: Any, keys: Sequence[str]) -> Any:
    """The batch with these columns as plain strings, which are checked for UTF-8 when they are taken out."""
    for key in keys:
        index = batch.schema.get_field_index(key)
        column = batch.column(index)
        plain = _plain_strings(column)
        if plain is not column:
            batch = batch.set_column(index, key, plain)
    return batch


def _plain_strings(column: Any) -> Any:
    import pyarrow

    if isinstance(column, pyarrow.ExtensionArray):
        return _plain_strings(column.storage)
    if isinstance(column, pyarrow.DictionaryArray):
        return _plain_strings(column.dictionary_decode())
    kind = str(column.type)
    if kind == "binary":
        return column.view(pyarrow.string())  # the same memory: whether it is UTF-8 shows row by row
    if kind == "large_binary":
        return column.view(pyarrow.large_string())
    if kind in ("string_view", "binary_view"):  # offsets and pieces in several buffers: copied into one
        return column.cast(pyarrow.large_binary()).view(pyarrow.large_string())
    return column
