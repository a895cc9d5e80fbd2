"""The format JSON lines, one document a line: its limits, and the errors that say what is wrong with a line.

    {"text": "first document", "anything": "else"}
    {"text": "second document"}

Lines end with LF or CRLF. The library orjson parses them. What it refuses is tried once more by Python's own parser,
which also takes NaN, Infinity, numbers of any length and halves of surrogate pairs, as Megatron-LM's tools do: only
the text under the keys that are used is judged, whatever stands beside it. For a line that both refuse, or whose text
cannot be used, the slower checks here find out which rule was broken, so that a bad line gets the same error wherever
it is met.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from megatron_hammer.base.errors import DataError, UnfitFile
from megatron_hammer.base.reading import open_regular, weigh_outside_strings
from megatron_hammer.corpus import foreign

MAX_LINE_BYTES = 2 << 30
"""Longest line read, line ending included: a document of a gigabyte with its escapes. What is longer is a file without
line breaks, not a document."""
MAX_LINE_VALUES = 1_000_000
"""Of one line, beside what is in its strings, as ``base/reading.py`` counts them: up to 100 MB once it is parsed."""
SHORT_LINE_BYTES = 2**20
"""Lines up to here have less, whatever they hold, and are not counted."""

_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def line_place(path: Path, line_number: int, offset: int) -> str:
    """``zh.jsonl:17 (byte 5120)``: the line, from 1, and where it starts in the uncompressed file, from 0."""
    return f"{path}:{line_number} (byte {offset})"


def too_long(path: Path, line_number: int, offset: int) -> DataError:
    """E304: a line is longer than a document can be."""
    return DataError(
        4, line_place(path, line_number, offset), f"is longer than {MAX_LINE_BYTES:,} bytes",
        "put one JSON object on each line",
    )  # fmt: skip


def damaged(path: Path, line_number: int, offset: int, how: str) -> DataError:
    """E309: a compressed file is damaged; ``line_number`` is the first line that could not be read."""
    return DataError(
        9, line_place(path, line_number, offset), f"could not be decompressed ({how})", "fetch or compress it again"
    )


# ---- parsing a line ----


def loads(line: bytes | bytearray) -> Any:
    """``orjson.loads``, but no line of which memory would hold many times its bytes: ``ValueError``."""
    if _has_too_many_values(line):
        raise ValueError("too many values")
    return orjson.loads(line)


def _has_too_many_values(line: bytes | bytearray) -> bool:
    return len(line) > SHORT_LINE_BYTES and weigh_outside_strings(line) > MAX_LINE_VALUES


def parse_line(line: bytes | bytearray) -> tuple[Any, bool]:
    """The JSON value of a line, and whether it is strict JSON (else a text in it may hold half of a surrogate pair).

    Raises:
        ValueError: neither parser can read it.
    """
    try:
        return loads(line), True
    except orjson.JSONDecodeError:
        value = _by_python(line)
        if value is None:
            raise
        return value, False


def texts_of(value: Any, keys: Sequence[str], strict: bool) -> list[str]:
    """The texts under the keys of a parsed line.

    Raises:
        UnusableText: names the first key whose text cannot be used.
    """
    found: list[str] = []
    for key in keys:
        text = value.get(key) if type(value) is dict else None
        if type(text) is not str or (not strict and _LONE_SURROGATE.search(text)):
            raise UnusableText(key)
        found.append(text)
    return found


class UnusableText(Exception):
    """There is no text under a key, or one that cannot be encoded; ``diagnose_line`` says why."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _by_python(line: bytes | bytearray) -> Any:
    """The value that Python's parser finds, or None; a number that no Python integer may have is a float."""
    try:
        return _PYTHON.decode(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def _whole_number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # more digits than Python converts
        return float(digits)


_PYTHON = json.JSONDecoder(parse_int=_whole_number)


# ---- naming what is wrong with a line ----


def diagnose_line(path: Path, line_number: int, offset: int, line: bytes | bytearray, key: str) -> DataError:
    """Which rule of the format a refused line breaks. Slow: for bad lines only.

    Args:
        offset: where the line starts in the uncompressed file.
    """
    where = line_place(path, line_number, offset)
    if line_number == 1:
        if encoding := foreign.byte_order_mark(line):
            remedy = foreign.without_mark(path, encoding)
            return DataError(3, where, f"begins with a byte order mark ({encoding})", remedy)
        if line.startswith((_GZIP_MAGIC, _ZSTD_MAGIC)):
            kind = ".gz" if line.startswith(_GZIP_MAGIC) else ".zst"
            return DataError(9, str(path), "is compressed, but its name does not say so", f"rename it to end in {kind}")
        if other := foreign.format_of(path, line or _beginning(path)):  # a file that is none may begin with LF
            return DataError(9, str(path), f"is {other[0]}", other[1])
    if not line or line.isspace():
        return DataError(5, where, "is a blank line", "remove it: every line must be one JSON object")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return DataError(
            3, where, f"is not valid UTF-8: byte 0x{byte:02x} at offset {error.start} of the line ({error.reason})",
            foreign.to_utf8(path, line),
        )  # fmt: skip
    if _has_too_many_values(line):
        rule = f"holds more than {MAX_LINE_VALUES:,} values beside its text"
        return DataError(4, where, rule, "keep the keys that are used")
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as refused:
        value = _by_python(line)
        if not isinstance(value, dict) or isinstance(value.get(key), float):  # such as NaN, in place of a text
            return DataError(4, where, f"is not valid JSON: {refused.msg} at column {refused.colno}",
                             _not_json_remedy(line_number, line, path))  # fmt: skip
    if not isinstance(value, dict):
        remedy = f'write it as {{"{key}": "..."}}'
        if isinstance(value, list) and line_number == 1 and any(isinstance(item, dict) for item in value):
            remedy = _not_json_remedy(1, b"[", path)
        return DataError(6, where, f"holds {_kind(value)}, not a JSON object", remedy)
    if key not in value:
        keys = ", ".join(sorted(value)[:8]) or "none"
        return DataError(7, where, f"has no key {key!r} (its keys: {keys})", "name the key that holds the text")
    if isinstance(value[key], str) and (half := _LONE_SURROGATE.search(value[key])):
        rule = f"holds half of a surrogate pair (\\u{ord(half.group()):04x}), which is no character, under {key!r}"
        return DataError(8, where, rule, "remove the escape or restore its other half")
    return DataError(7, where, f"has {_kind(value[key])} under {key!r}", "the text must be a string")


def _beginning(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(64)
    except UnfitFile:  # a pipe
        return b""


def _not_json_remedy(line_number: int, line: bytes | bytearray, path: Path) -> str:
    if line_number == 1 and line.lstrip()[:1] == b"[":  # one array over several lines
        name = shlex.quote(str(path))
        return f"it is one JSON array, and a document a line is read: jq -c '.[]' {name} > NEW.jsonl"
    if line_number == 1 and line.strip() == b"{":
        return f"an object stands on one line each: jq -c . {shlex.quote(str(path))} > NEW.jsonl"
    if line_number == 1 and line[:1] not in (b"{", b"["):
        return "mend the line; plain text must be in a file whose name ends in .txt or .md"
    return "mend the line"


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
