"""The format JSON lines, one document a line: its limits, and the errors that say what is wrong with a line.

    {"text": "first document", "anything": "else"}
    {"text": "second document"}

Lines end with LF or CRLF. The library orjson parses them (``parse.py``); it refuses invalid UTF-8, NaN and lone
surrogates, too. Only for a line that it has refused do the slower checks here find out which rule was broken, so that
a bad line gets the same error wherever it is met.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import orjson

from megatron_hammer.base.errors import DataError

MAX_LINE_BYTES = 2 << 30
"""Longest line read, line ending included: a document of a gigabyte with its escapes. What is longer is a file without
line breaks, not a document."""

_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def place_of(path: Path, line_number: int, offset: int) -> str:
    """``zh.jsonl:17 (byte 5120)``: the line, from 1, and where it starts in the uncompressed file, from 0."""
    return f"{path}:{line_number} (byte {offset})"


def too_long(path: Path, line_number: int, offset: int) -> DataError:
    """E304: a line is longer than a document can be."""
    return DataError(
        4, place_of(path, line_number, offset), f"is longer than {MAX_LINE_BYTES:,} bytes",
        "put one JSON object on each line",
    )  # fmt: skip


def damaged(path: Path, line_number: int, offset: int, error: Exception) -> DataError:
    """E309: a compressed file is damaged; ``line_number`` is the first line that could not be read."""
    return DataError(
        9, place_of(path, line_number, offset), f"could not be decompressed ({error})", "fetch or compress it again"
    )


# ---- naming what is wrong with a line ----


def diagnose(path: Path, line_number: int, offset: int, line: bytes | bytearray, key: str) -> DataError:
    """Which rule of the format a refused line breaks. Slow: for bad lines only.

    Args:
        offset: where the line starts in the uncompressed file.
    """
    where = place_of(path, line_number, offset)
    if line_number == 1:
        for mark, encoding in _BYTE_ORDER_MARKS.items():
            if line.startswith(mark):
                return DataError(3, where, f"begins with a byte order mark ({encoding})", "save it as plain UTF-8")
        if line.startswith((_GZIP_MAGIC, _ZSTD_MAGIC)):
            kind = ".gz" if line.startswith(_GZIP_MAGIC) else ".zst"
            return DataError(9, str(path), "is compressed, but its name does not say so", f"rename it to end in {kind}")
    if not line or line.isspace():
        return DataError(5, where, "is a blank line", "remove it: every line must be one JSON object")
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return DataError(
            3, where, f"is not valid UTF-8: byte 0x{byte:02x} at offset {error.start} of the line ({error.reason})",
            "convert the file to UTF-8",
        )  # fmt: skip
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as refused:
        try:
            value = json.loads(decoded)  # it lets lone surrogates pass, which orjson does not
        except (ValueError, RecursionError):
            value = None
        if value is not None and (surrogate := _find_surrogate(value)):
            return DataError(
                8, where, f"holds half of a surrogate pair (\\u{ord(surrogate):04x}), which is no character",
                "remove the escape or restore its other half",
            )  # fmt: skip
        return DataError(4, where, f"is not valid JSON: {refused.msg} at column {refused.colno}", "mend the line")
    if not isinstance(value, dict):
        return DataError(6, where, f"holds {_kind(value)}, not a JSON object", f'write it as {{"{key}": "..."}}')
    if key not in value:
        keys = ", ".join(sorted(value)[:8]) or "none"
        return DataError(7, where, f"has no key {key!r} (its keys: {keys})", "name the key that holds the text")
    return DataError(7, where, f"has {_kind(value[key])} under {key!r}", "the text must be a string")


def _find_surrogate(value: Any) -> str | None:
    """The first lone surrogate in any string of a parsed JSON value; nested objects without recursion."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str) and (found := _LONE_SURROGATE.search(item)):
            return found.group()
        if isinstance(item, dict):
            todo.extend(item.keys())
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
    return None


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names[type(value)]
