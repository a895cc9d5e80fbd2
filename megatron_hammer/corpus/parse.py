"""Parses a block (``file_blocks.py``): the texts of its documents, and those that are rejected, each with a cause.

``parse_block`` is a pure function of the block, so several threads can parse several blocks. It parses all lines of a
block at once, which is fast. Only where one of them is refused does it look at each line by itself, and ``jsonl.py``
says what is wrong with it. A document of many megabytes is taken in pieces (``long.py``). ``judge_lines`` and
``judge_rows`` are for those who want all fields of each document (``documents.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus import foreign, jsonl, long
from megatron_hammer.corpus.file_blocks import Block, Position
from megatron_hammer.corpus.long import LongText

_RAW_BYTES = 16 << 20  # of a rejected line that are kept: file, line and byte find the rest
_EMPTY_LINES = re.compile(rb"\r?\n(?:\r?\n)+")


class RejectedDocument(NamedTuple):
    """A document that was not taken."""

    place: Position
    code: str
    """E303 to E309: the cause."""
    message: str
    raw: bytes | None
    """The line, or the begin of a long one; None where there is none (a damaged file, say)."""
    size: int
    """Bytes of the whole line."""
    path: Path = Path()
    """The file, where the receiver does not know it."""


@dataclass
class Parsed:
    """The documents of a block."""

    texts: list[list[str]]
    """For each key the texts, in order; all lists are of one length."""
    rejected: list[RejectedDocument] = field(default_factory=list)
    long: list[str | LongText] | None = None
    """For each key the one text of a block that holds nothing but a long document; ``texts`` are empty then."""


def parse_block(block: Block, path: Path, keys: Sequence[str], strict: bool, in_pieces: bool = False) -> Parsed:
    """The texts of a block, and what was not taken.

    Args:
        path: the file, for messages.
        strict: the first bad document is raised. Else each is noted; only a file that is something else than its name
            says (E309 at its first line) is raised all the same.
        in_pieces: give a document from ``long.LONG_BYTES`` on as ``Parsed.long``; else all are in ``Parsed.texts``.

    Raises:
        DataError: E302 to E309, E347.
    """
    if in_pieces and block.text_bytes >= long.LONG_BYTES and block.data and _is_one_document(block):
        parsed = _parse_long(block, path, keys, strict)
    elif block.kind == "jsonl":
        parsed = _parse_lines(block, path, keys, strict)
    elif block.kind == "parquet":
        parsed = _parse_rows(block, path, keys, strict)
    else:
        parsed = _parse_text(block, path, len(keys), strict)
    if block.trouble is not None:
        if strict:
            raise block.trouble[0]
        parsed.rejected.append(note_of(*block.trouble, None))
    return parsed


def note_of(
    error: DataError, place: Position, raw: bytes | bytearray | None, path: Path | None = None
) -> RejectedDocument:
    """What is kept of a document that is not taken."""
    size = 0 if raw is None else len(raw) - (raw[-1:] == b"\n")
    line = None if raw is None else bytes(memoryview(raw)[: min(size, _RAW_BYTES)])
    return RejectedDocument(place, error.code, f"{error.what} {error.rule}", line, size, path or Path())


def _is_one_document(block: Block) -> bool:
    if block.kind == "parquet":
        return block.data.num_rows == 1 and all(
            column.null_count == 0 and str(column.type) in ("string", "large_string") for column in block.data.columns
        )
    if block.kind == "blank-line":
        return _EMPTY_LINES.search(block.data.rstrip(b"\r\n")) is None
    return block.kind == "file" or block.data.count(b"\n", 0, len(block.data) - 1) == 0


def _parse_long(block: Block, path: Path, keys: Sequence[str], strict: bool) -> Parsed:
    """A block that is one long document."""
    parsed = Parsed([[] for _ in keys])
    try:
        if block.kind == "jsonl":
            parsed.long = long.parse_long_line(path, block.start.line, block.start.offset, block.data, keys)
        elif block.kind == "parquet":
            where = f"{path}:{block.start.line}"
            columns = [block.data.column(block.data.schema.get_field_index(key)) for key in keys]
            parsed.long = [_long_text(path, where, _first_value(column)) for column in columns]
        else:
            offset, document = next((place, piece) for place, piece in _text_documents(block) if piece)
            place = Position(block.start.offset + offset, block.start.line)
            if place.offset == 0 and (fault := _fault_of_begin(path, document)) is not None:
                raise fault
            where = jsonl.line_place(path, place.line, place.offset)
            parsed.long = [_long_text(path, where, _line_feeds(document))] * len(keys)
    except DataError as error:
        if strict or error.number == 9:
            raise
        parsed.rejected.append(note_of(error, block.start, None if block.kind == "parquet" else block.data))
    return parsed


def _first_value(column: Any) -> memoryview:
    """The bytes of a string column's first value, where they lie: the library's own way to them copies twice."""
    import numpy as np

    _, offsets, data = column.buffers()
    kind = np.int32 if str(column.type) == "string" else np.int64
    start, end = np.frombuffer(offsets, kind)[column.offset : column.offset + 2].tolist()
    return memoryview(data)[start:end] if data is not None else memoryview(b"")


def _long_text(path: Path, where: str, document: bytes | bytearray | memoryview) -> LongText:
    try:
        return long.long_text(document)
    except UnicodeDecodeError as error:
        remedy = foreign.to_utf8(path, bytes(document[: 1 << 16]))
        raise DataError(3, where, f"is not valid UTF-8: {error.reason}", remedy) from None


def _fault_of_begin(path: Path, document: bytes | bytearray) -> DataError | None:
    """What a file says by its first bytes, where that is not plain text; E309 for another format, else E303."""
    if (other := foreign.format_of(path, document)) is not None:
        return DataError(9, str(path), f"is {other[0]}", other[1])
    if (encoding := foreign.byte_order_mark(document)) is not None:
        where = jsonl.line_place(path, 1, 0)
        remedy = foreign.without_mark(path, encoding)
        return DataError(3, where, f"begins with a byte order mark ({encoding})", remedy)
    return None


def _line_feeds(document: bytes | bytearray) -> bytes | bytearray:
    """A document of a text file with LF at the ends of its lines, as a file from Windows has CRLF."""
    return document.replace(b"\r\n", b"\n") if b"\r\n" in document else document


def _split(data: bytes | bytearray) -> Sequence[bytes | bytearray]:
    """Lines without their LF; a single line, which may be long, is not copied and keeps it."""
    if data.count(b"\n", 0, len(data) - 1) == 0:
        return [data] if data else []
    lines = bytes(data).split(b"\n")  # not of the bytearray: its pieces would be bytearrays, which cost more
    if not lines[-1]:
        lines.pop()
    return lines


def _parse_lines(block: Block, path: Path, keys: Sequence[str], strict: bool) -> Parsed:
    lines = _split(block.data)
    loads = orjson.loads if max(map(len, lines), default=0) <= jsonl.SHORT_LINE_BYTES else jsonl.loads
    try:
        if len(keys) == 1:
            key = keys[0]
            texts = [[loads(line)[key] for line in lines]]
        else:
            values = [loads(line) for line in lines]
            texts = [[value[key] for value in values] for key in keys]
        if all(set(map(type, column)) <= {str} for column in texts):
            return Parsed(texts)
    except (ValueError, KeyError, TypeError, IndexError):
        pass
    return _parse_line_by_line(block, path, keys, strict, lines)


def _parse_line_by_line(
    block: Block, path: Path, keys: Sequence[str], strict: bool, lines: Sequence[bytes | bytearray]
) -> Parsed:
    """The same result as ``_parse_lines``, for a block with a bad line: each line is parsed by itself."""
    judged = judge_lines(block, path, keys, lines)
    return _gathered(((place, line, found) for place, line, _, found in judged), keys, strict)


def _gathered(
    judged: Iterable[tuple[Position, bytes | bytearray | None, Sequence[str] | DataError]],
    keys: Sequence[str],
    strict: bool,
) -> Parsed:
    """Documents that were judged one by one: (place, its bytes if it has a line, its texts or what is wrong)."""
    parsed = Parsed([[] for _ in keys])
    for place, line, found in judged:
        if not isinstance(found, DataError):
            for column, text in zip(parsed.texts, found):
                column.append(text)
        elif strict:
            raise found
        else:
            parsed.rejected.append(note_of(found, place, line))
    return parsed


def judge_lines(
    block: Block, path: Path, keys: Sequence[str], lines: Sequence[bytes | bytearray]
) -> Iterator[tuple[Position, bytes | bytearray, Any, list[str] | DataError]]:
    """(place, line, its value, the texts under the keys or what is wrong with it) of each line of a block.

    Raises:
        DataError: E309 at the first line: the whole file is something else than its name says.
    """
    offset = block.start.offset
    for number, line in enumerate(lines, block.start.line):
        key = keys[0]
        found: list[str] | DataError
        try:
            if not line:
                raise jsonl.UnusableText(key)  # ten times as fast as the parser's own error
            value, exact = jsonl.parse_line(line)
            found = jsonl.texts_of(value, keys, exact)
        except (ValueError, jsonl.UnusableText) as unusable:
            value = None  # it goes before the line is parsed once more
            key = unusable.key if isinstance(unusable, jsonl.UnusableText) else key
            found = jsonl.diagnose_line(path, number, offset, line, key)
        if isinstance(found, DataError) and found.number == 9:
            raise found
        yield Position(offset, number), line, value, found
        offset += len(line) + 1


def _parse_text(block: Block, path: Path, num_keys: int, strict: bool) -> Parsed:
    texts: list[str] = []
    parsed = Parsed([texts] * num_keys)
    for offset, piece in _text_documents(block):
        if not piece:
            continue
        place = Position(block.start.offset + offset, block.start.line + block.data.count(b"\n", 0, offset))
        fault = _fault_of_begin(path, piece) if place.offset == 0 else None
        if fault is None:
            try:
                texts.append(_line_feeds(piece).decode("utf-8"))
                continue
            except UnicodeDecodeError:
                fault = _not_utf8(path, place, piece)
        if strict or fault.number == 9:
            raise fault
        parsed.rejected.append(note_of(fault, place, piece))
    return parsed


def _not_utf8(path: Path, place: Position, piece: bytes | bytearray) -> DataError:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError as error:
        rule = f"is not valid UTF-8: byte 0x{piece[error.start]:02x} at offset {error.start} of the document"
        where = jsonl.line_place(path, place.line, place.offset)
        return DataError(3, where, f"{rule} ({error.reason})", foreign.to_utf8(path, piece))
    raise AssertionError("only for what is no UTF-8")


def _text_documents(block: Block) -> Iterator[tuple[int, bytes | bytearray]]:
    """(offset in the block, bytes) of each document."""
    data = block.data
    if block.kind == "file":
        yield 0, data
    elif block.kind == "line":
        offset = 0
        for line in _split(data):
            yield offset, line.removesuffix(b"\n").removesuffix(b"\r")
            offset += len(line) + 1
    else:
        start = 0
        for end, following in [*((gap.start(), gap.end()) for gap in _EMPTY_LINES.finditer(data)), (len(data), 0)]:
            piece = data[start:end].lstrip(b"\r\n")  # of a gap that a block's end cut
            yield end - len(piece), piece.rstrip(b"\r\n") if following == 0 else piece
            start = following


def _parse_rows(block: Block, path: Path, keys: Sequence[str], strict: bool) -> Parsed:
    if block.data is None:
        return Parsed([[] for _ in keys])
    try:
        columns = [block.data.column(block.data.schema.get_field_index(key)).to_pylist() for key in keys]
    except UnicodeDecodeError:
        columns = []
    if columns and not any(None in column for column in columns):
        return Parsed(columns)
    judged = judge_rows(block, path, keys, keys)
    return _gathered(
        ((place, None, error or [fields[k] for k in keys]) for place, fields, error in judged), keys, strict
    )


def judge_rows(
    block: Block, path: Path, names: Sequence[str], keys: Sequence[str]
) -> Iterator[tuple[Position, dict[str, Any], DataError | None]]:
    """(place, value by column, what is wrong) of each row of a parquet block.

    Args:
        names: of the columns.
        keys: those of them that must hold a text.
    """
    columns = {name: block.data.column(block.data.schema.get_field_index(name)) for name in names}
    for row in range(block.data.num_rows):
        place = Position(block.start.offset + row, block.start.line + row)
        where, fields = f"{path}:{place.line}", dict[str, Any]()
        error: DataError | None = None
        for name, column in columns.items():
            try:
                fields[name] = column[row].as_py()
            except UnicodeDecodeError as wrong:
                error = error or DataError(3, where, f"is not valid UTF-8 at byte {wrong.start} of {name!r}",
                                           "convert the text to UTF-8")  # fmt: skip
                continue
            if fields[name] is None and name in keys:
                error = error or DataError(7, where, f"has null under {name!r}", "the text must be a string")
        yield place, fields, error
