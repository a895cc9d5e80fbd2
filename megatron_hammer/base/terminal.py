"""A view of a few lines at the bottom of a terminal, redrawn in place; what else is printed stays above it.

::

    step 1,230 / 10,000 | 12.3 % | 3 h 12 min left          items of a row stand beside each other, as many as the
    loss 3.2145 | lr 2.91e-04 | 16,012 tokens/s             window is wide; the next ones go into further lines
    zh.wiki 3.10 | en.web 3.41

Only a terminal that can move its cursor gets a view, not ``TERM=dumb``. The cursor always waits below the view, so when
a program ends, by an error or by Ctrl-C, its last line is printed below. What a library prints on the same terminal, a
warning say, is printed above the view, because ``streams.py`` reports it to the view first. ``NO_COLOR``
(no-color.org) leaves out bold and dim. Widths count East Asian characters as two columns. Needs no torch.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TextIO

from megatron_hammer.base.streams import outlet_of

SECONDS_BETWEEN = 0.5  # two drawings: calm for eyes, and nothing for a slow connection
LEAST_COLUMNS = 10
GAP = " | "
_UNKNOWN_SIZE = os.terminal_size((80, 24))

Item = tuple[str, str]
"""(what it is, its value): one of the two may be empty."""


def can_redraw(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Whether a stream leads to a terminal on which lines can be drawn again."""
    environment = os.environ if environment is None else environment
    try:
        return stream.isatty() and environment.get("TERM", "") not in ("", "dumb", "unknown")
    except ValueError:  # closed
        return False


def size_of_window(stream: TextIO, environment: Mapping[str, str] | None = None) -> os.terminal_size:
    """Columns and lines of a terminal; ``COLUMNS``, where it is set, replaces the first, as for ``--help``."""
    environment = os.environ if environment is None else environment
    try:
        found = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        found = _UNKNOWN_SIZE
    columns, lines = found if found.columns > 0 and found.lines > 0 else _UNKNOWN_SIZE
    wanted = environment.get("COLUMNS", "")
    return os.terminal_size((int(wanted) if wanted.isdecimal() and int(wanted) > 0 else columns, lines))


def width_of(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in printable(text)
    )


def printable(text: str) -> str:
    """Without what would move the cursor or change the terminal: names of sources are not ours."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def cut(text: str, columns: int) -> str:
    """No wider than so many columns; what is left out shows as ``~``."""
    text = printable(text)
    if width_of(text) <= columns:
        return text
    kept = ""
    for character in text:
        if width_of(kept + character) > columns - 1:
            break
        kept += character
    return kept + "~"


def laid_out(rows: Sequence[Sequence[Item]], columns: int, most: int, has_style: bool) -> list[str]:
    """The lines of a view, none wider than ``columns`` and no more than ``most``; earlier rows matter more."""
    lines: list[str] = []
    for row in rows:
        line, width = "", 0
        for label, value in row:
            value = cut(value, columns)
            label = cut(label, columns - width_of(value) - 1) if columns - width_of(value) > 2 else ""
            more = width_of(label) + width_of(value) + bool(label and value)
            if line and width + len(GAP) + more > columns:
                lines.append(line)
                line, width = "", 0
            styled = f"\x1b[2m{label}\x1b[0m" if has_style and label else label
            strong = f"\x1b[1m{value}\x1b[0m" if has_style and value else value
            line += (GAP if line else "") + " ".join(filter(None, (styled, strong)))
            width += (len(GAP) if width else 0) + more
        if line:
            lines.append(line)
    return lines[:most]


class View:
    """The lines, on one stream; threads may use it at the same time.

    Args:
        stream: a terminal (``can_redraw``).
    """

    def __init__(
        self,
        stream: TextIO,
        environment: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        environment = os.environ if environment is None else environment
        self._stream, self._clock, self._environment = stream, clock, environment
        self._has_style = not environment.get("NO_COLOR")
        self._widths: list[int] = []
        """Of the lines that stand on the terminal."""
        self._rows: Sequence[Sequence[Item]] = ()
        self._next = 0.0
        self._is_closed = self._is_writing = self._is_in_line = False
        self._lock = threading.RLock()
        outlets = [outlet_of(one) for one in (sys.stdout, sys.stderr)]
        self._outlets = [outlet for outlet in outlets if outlet is not None and outlet.isatty()]
        for outlet in self._outlets:  # what anybody prints stands above the view, and is not drawn over
            outlet.before = self._step_aside

    def show(self, rows: Sequence[Sequence[Item]], now: bool = False) -> None:
        """Take new values; they are drawn ``now``, or when it is time to."""
        with self._lock:
            self._rows = rows
            if now or self._clock() >= self._next:
                self._draw()

    def above(self, text: str, stream: TextIO) -> None:
        """Print a line for people on a stream, and the view below it again."""
        with self._lock:
            self._write(self._erasure())
            print(text, file=stream, flush=True)
            self._draw()

    def close(self) -> None:
        """Draw the last values, which stay; nothing is drawn from here on."""
        with self._lock:
            if not self._is_closed:
                self._draw()
                self._is_closed = True
            for outlet in self._outlets:
                outlet.before = None

    def _step_aside(self, content: bytes) -> bytes:
        """Make room for what somebody prints: the view is drawn again below it, with the next values."""
        if not self._lock.acquire(blocking=False):  # who holds it may wait for the stream that this is called by
            return b""
        try:
            if self._is_writing:
                return b""
            self._is_in_line = not content.endswith(b"\n")
            return self._erasure().encode()
        finally:
            self._lock.release()

    def _draw(self) -> None:
        if self._is_closed:
            return
        self._next = self._clock() + SECONDS_BETWEEN
        size = self._size()
        columns = max(LEAST_COLUMNS, size.columns) - 1  # in the last column some terminals wrap
        lines = laid_out(self._rows, columns, max(1, size.lines - 2), self._has_style)
        text = "\n" * self._is_in_line + self._erasure() + "".join(line + "\n" for line in lines)
        self._is_in_line = False
        self._widths = [width_of(line) for line in laid_out(self._rows, columns, max(1, size.lines - 2), False)]
        self._write(text)

    def _erasure(self) -> str:
        """What takes the present lines away, also after the window has become narrower and has wrapped them."""
        columns = max(1, self._size().columns)
        height = sum(max(1, -(-width // columns)) for width in self._widths)
        self._widths = []
        return f"\x1b[{height}A\r\x1b[J" if height else ""

    def _size(self) -> os.terminal_size:
        return size_of_window(self._stream, self._environment)

    def _write(self, text: str) -> None:
        """In one piece: no other program's line comes between."""
        if text:
            self._is_writing = True
            try:
                self._stream.write(text)
                self._stream.flush()
            finally:
                self._is_writing = False
