"""Reads very long documents, of many megabytes, in pieces, so that memory holds their bytes once.

A JSON parser copies its input and makes a string of up to four bytes a character: six times a line of a gigabyte. Here
long strings are taken out of a line before it is parsed. They are checked piece by piece, and decoded again piece by
piece when the text is needed (``LongText.pieces``)::

    {"text": "......1 GB......", "id": 7}  ->  {"text": "mark 0", "id": 7}  +  the places where string 0 can be cut

The rules and the parser are the same as for short lines (``jsonl.py``).
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus import jsonl

LONG_BYTES = 16 << 20
"""Documents from here on are taken in pieces: below, six times as much still stays under 100 MB."""

_PIECE_BYTES = 2 << 20  # the parser takes up to seventeen times as much for a moment
_LONG_STRING = 1 << 20  # shorter strings stay in the line
# What can stand before a cut: escapes as a whole, and a high surrogate only with the low one behind it.
_WHOLE_CHARACTERS = re.compile(
    rb"(?:[^\\]++|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|\\[^u])*+",
    re.DOTALL,
)


_WINDOW_BYTES = 64 << 10  # matched at once: the pattern's memory grows with it
_ESCAPE_BYTES = 12  # of the longest, a pair of surrogates
_AFTER_KEY = re.compile(rb"[ \t\r\n]*:")


class LongText:
    """A text in pieces.

    Args:
        data: UTF-8, or the inside of a JSON string.
        cuts: where the pieces begin, and the end.
        escaped: whether it is JSON.
    """

    def __init__(self, data: bytes | bytearray | memoryview, cuts: Sequence[int], escaped: bool) -> None:
        self._data, self._cuts, self._escaped = data, cuts, escaped

    def pieces(self) -> Iterator[str]:
        """The text, a few megabytes at a time."""
        for start, end in zip(self._cuts, self._cuts[1:]):
            yield self._piece(start, end)

    def _piece(self, start: int, end: int) -> str:
        piece = bytes(self._data[start:end])
        return orjson.loads(b'"' + piece + b'"') if self._escaped else piece.decode("utf-8")


def long_text(data: bytes | bytearray | memoryview) -> LongText:
    """A plain text in pieces.

    Raises:
        UnicodeDecodeError: it is not valid UTF-8; ``start`` is the place in the whole text.
    """
    cuts = [0]
    while cuts[-1] < len(data):
        cuts.append(_character_begin(data, min(cuts[-1] + _PIECE_BYTES, len(data))))
        try:
            bytes(data[cuts[-2] : cuts[-1]]).decode("utf-8")
        except UnicodeDecodeError as error:
            place = cuts[-2] + error.start
            rest = bytes(data[place : place + 8])
            raise UnicodeDecodeError("utf-8", rest, 0, 1, f"{error.reason} at {place}") from None
    return LongText(data, cuts, False)


def parse_long_line(
    path: Path, line_number: int, offset: int, line: bytes | bytearray, keys: Sequence[str]
) -> list[str | LongText]:
    """The texts of one JSON line, for each key.

    Raises:
        DataError: E303 to E308 as ``jsonl.diagnose_line``.
    """
    mark = secrets.token_hex(16)  # no line can spell it
    rest = bytearray()
    texts: dict[str, LongText | DataError] = {}
    place = 0  # of the line, up to where it is in `rest`
    try:
        for start, end in _strings(line):
            if end - start >= _LONG_STRING and not _AFTER_KEY.match(line, end + 1):
                name = f"{mark}{len(texts)}"
                texts[name] = _string_or_error(path, line_number, offset, line, start, end)
                rest += memoryview(line)[place:start]
                rest += name.encode()
                place = end
        rest += memoryview(line)[place:]
        value, strict = jsonl.parse_line(rest)
    except ValueError:
        raise jsonl.diagnose_line(path, line_number, offset, rest, keys[0]) from None
    found: list[str | LongText] = []
    for key in keys:
        try:
            (mark_or_text,) = jsonl.texts_of(value, [key], strict)
        except jsonl.UnusableText:
            raise jsonl.diagnose_line(path, line_number, offset, rest, key) from None
        text = texts.get(mark_or_text, mark_or_text)
        if isinstance(text, DataError):
            raise text
        found.append(text)
    return found


def _string_or_error(
    path: Path, line_number: int, offset: int, line: bytes | bytearray, start: int, end: int
) -> LongText | DataError:
    """A long string, or why it cannot be used as a text: that matters only under a key that is used."""
    try:
        return _check_string(path, line_number, offset, line, start, end)
    except DataError as error:
        if error.number != 8:  # half of a surrogate pair
            raise
        return error


def _strings(line: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """(first byte, closing quote) of every string; one that is not closed is none."""
    start = line.find(b'"') + 1
    while start:
        end = line.find(b'"', start)
        while end >= 0 and _backslashes_before(line, end, start) % 2:
            end = line.find(b'"', end + 1)
        if end < 0:
            return
        yield start, end
        start = line.find(b'"', end + 1) + 1


def _backslashes_before(line: bytes | bytearray, place: int, start: int) -> int:
    window = 64
    while True:
        first = max(start, place - window)
        count = place - first - len(line[first:place].rstrip(b"\\"))
        if count < place - first or first == start:
            return count
        window *= 16


def _check_string(path: Path, line_number: int, offset: int, line: bytes | bytearray, start: int, end: int) -> LongText:
    """A long string of a line, valid to its end."""
    cuts = [start]
    while cuts[-1] < end:
        here = cuts[-1]
        cut = min(here + _PIECE_BYTES, end)
        if cut < end and line.find(b"\\", here, cut) >= 0:
            cut = _escape_end(line, here, cut)
        if cut < end:
            cut = _character_begin(line, cut)
        if cut == here:  # something is wrong here; with more behind it the parser says what
            cut = min(here + 2 * _ESCAPE_BYTES, end)
        try:
            orjson.loads(b'"' + line[here:cut] + b'"')
        except orjson.JSONDecodeError:
            raise _diagnose_string(path, line_number, offset, line, here, cut, end) from None
        cuts.append(cut)
    return LongText(line, cuts, True)


def _escape_end(line: bytes | bytearray, here: int, cut: int) -> int:
    """The last place up to ``cut`` that is inside no escape; ``here`` is one. Stops before what is no escape."""
    while here < cut:
        stop = min(here + _WINDOW_BYTES, cut)
        match = _WHOLE_CHARACTERS.match(line, here, stop)
        assert match is not None, "the pattern matches nothing, too"
        if match.end() == here:
            break
        here = match.end()
    return here


def _diagnose_string(
    path: Path, line_number: int, offset: int, line: bytes | bytearray, here: int, cut: int, end: int
) -> DataError:
    """What is wrong in [here, cut), which may end inside an escape: that alone is not meant."""
    for stop in range(cut, min(cut + _ESCAPE_BYTES, end) + 1):
        error = jsonl.diagnose_line(path, line_number, offset, b'{"":"' + line[here:stop] + b'"}', "")
        if error.number != 4:
            break
    what = f"{jsonl.line_place(path, line_number, offset)}, in a string at byte {offset + here}"
    return DataError(error.number, what, error.rule, error.remedy)


def _character_begin(data: bytes | bytearray | memoryview, place: int) -> int:
    """The place itself, or the begin of the character that it lies in."""
    begin = place
    while begin < len(data) and begin > place - 4 and data[begin] & 0xC0 == 0x80:
        begin -= 1
    return begin if begin > place - 4 else place
