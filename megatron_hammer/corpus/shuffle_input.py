"""The first half of a shuffle: whole lines of the input files, as many at once as a buffer holds.

``LineReader`` fills one buffer after the other, across the ends of files, and never cuts a line. ``line_ends`` finds
the lines in a buffer and ``check_lines`` refuses those that are empty. The lines are never parsed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_hammer.base.errors import DataError
from megatron_hammer.corpus.documents import OnBad
from megatron_hammer.corpus.file_blocks import Position
from megatron_hammer.corpus.jsonl import MAX_LINE_BYTES
from megatron_hammer.corpus.parse import RejectedDocument, note_of
from megatron_hammer.corpus.stream import SourceStream, StreamDamage, open_stream

_SCAN_BYTES = 1 << 20  # searched for line breaks at once: stays in the cache
_LINE_BREAK, _CARRIAGE_RETURN = 10, 13


class FileStart(NamedTuple):
    """Where the lines of a file begin in a ``LineBlock``."""

    offset: int
    """In the block."""
    path: Path
    continued: bool
    """Whether the file began in a block before."""


class LineBlock(NamedTuple):
    """Whole lines, of one file or several."""

    buffer: bytearray
    used: int
    files: list[FileStart]
    last: bool
    cut_off: list[RejectedDocument]
    """Last lines of files without a line break, where they are left out."""

    def locate(self, offset: int, lines_before: int) -> tuple[FileStart, int]:
        """File and number of the line that begins at ``offset``."""
        file = [start for start in self.files if start.offset <= offset][-1]
        before = lines_before if file.continued else 0
        return file, before + self.buffer.count(_LINE_BREAK, file.offset, offset) + 1


class LineReader:
    """Fills buffers with whole lines of the inputs, one after the other. Its ``fill`` runs in a thread.

    Args:
        lenient: a last line without a line break is left out and noted; else it is an error.
    """

    def __init__(self, paths: list[Path], lenient: bool = False) -> None:
        self.finished, self.lenient = False, lenient
        self._cut_off: list[RejectedDocument] = []
        self._waiting = list(reversed(paths))
        self._carry = b""  # the beginning of a line that did not fit into the buffer before
        self._stream: SourceStream | None = None
        self._path = Path()
        self._read_bytes = 0  # of the uncompressed file

    def fill(self, buffer: bytearray) -> LineBlock:
        """Fill ``buffer``, or a larger one where a line does not fit."""
        used = len(self._carry)
        if used > len(buffer):
            buffer = bytearray(2 * used)
        buffer[:used] = self._carry
        files = [FileStart(0, self._path, True)] if self._stream is not None else []
        searched = used  # no line break before
        while True:
            if self._stream is None:
                if not self._waiting:
                    self.finished = True
                    return LineBlock(buffer, used, files, True, self._take_cut_off())
                self._open_next()
                files.append(FileStart(used, self._path, False))
            if used == len(buffer):
                if end := buffer.rfind(b"\n", searched) + 1:
                    self._carry = bytes(memoryview(buffer)[end:])
                    return LineBlock(buffer, end, files, False, self._take_cut_off())
                searched = used
                buffer = self._grown(buffer)
            if (count := self._read_into(buffer, used)) == 0:
                if used and buffer[used - 1] != _LINE_BREAK:
                    used = self._leave_out_rest(buffer, used)
                self.close_stream()
            used += count

    def _leave_out_rest(self, buffer: bytearray, used: int) -> int:
        """Note what stands behind the last line break; where the buffer ends without it."""
        error = no_line_break(self._path)
        if not self.lenient:
            raise error
        end = buffer.rfind(b"\n", 0, used) + 1
        place = Position(self._read_bytes - (used - end), 0)  # its line was not counted
        self._cut_off.append(note_of(error, place, buffer[end:used], self._path))
        return end

    def _take_cut_off(self) -> list[RejectedDocument]:
        taken, self._cut_off = self._cut_off, []
        return taken

    def _grown(self, buffer: bytearray) -> bytearray:
        """Twice the room, for a line that is longer than a block."""
        if len(buffer) > MAX_LINE_BYTES:
            raise DataError(4, f"{self._path}: the line before byte {self._read_bytes:,}",
                            f"is longer than {MAX_LINE_BYTES:,} bytes", "put one document on each line")  # fmt: skip
        larger = bytearray(2 * len(buffer))
        larger[: len(buffer)] = buffer
        return larger

    def _read_into(self, buffer: bytearray, used: int) -> int:
        assert self._stream is not None
        try:
            count = self._stream.readinto(memoryview(buffer)[used:])
        except StreamDamage as error:
            raise DataError(9, f"{self._path}: byte {self._read_bytes:,} of its text",
                            f"could not be decompressed ({error})", "fetch or compress it again") from None  # fmt: skip
        self._read_bytes += count
        return count

    def _open_next(self) -> None:
        self._path = self._waiting.pop()
        self._stream = open_stream(self._path)
        self._read_bytes = 0

    def close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


def line_ends(buffer: bytearray, used: int, limit: int) -> Iterator[np.ndarray]:
    """int64 positions behind the line breaks in ``buffer[:used]``, in arrays of about ``limit``."""
    found, count = [], 0
    content = np.frombuffer(buffer, np.uint8, used)
    for first in range(0, used, _SCAN_BYTES):
        ends = np.flatnonzero(content[first : first + _SCAN_BYTES] == _LINE_BREAK) + (first + 1)
        found.append(ends)
        count += len(ends)
        if count >= limit:
            yield np.concatenate(found)
            found, count = [], 0
    if count:
        yield np.concatenate(found)


def check_lines(
    block: LineBlock, starts: np.ndarray, ends: np.ndarray, lines_before: int, on_bad: OnBad | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The lines that are not empty; an empty one is an error, or goes to ``on_bad``."""
    lengths = ends - starts
    if int(lengths.min(initial=3)) > 2:
        return starts, ends
    content = np.frombuffer(block.buffer, np.uint8)
    empty = (lengths == 1) | ((lengths == 2) & (content[starts] == _CARRIAGE_RETURN))
    for start, end in zip(starts[empty].tolist(), ends[empty].tolist(), strict=True):
        file, line = block.locate(start, lines_before)
        error = DataError(5, f"{file.path}:{line}", "is a blank line", "remove it: every line must be a document")
        if on_bad is None:
            raise error
        on_bad(note_of(error, Position(0, line), block.buffer[start:end], file.path))
    return starts[~empty], ends[~empty]


def no_line_break(path: Path) -> DataError:
    """E362: a file whose last line has no end."""
    return DataError(
        62, str(path), "does not end in a line break: its last line may be cut off",
        f"look at the line (tail -n 1), and if it is whole: echo >> {path.name}",
    )  # fmt: skip
