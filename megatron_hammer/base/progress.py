"""Progress of a pass over text, on stderr: a bar on a terminal, else a line now and then; nothing for quick work."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_QUIET_SECONDS = 5.0  # what takes less needs no progress
_LINE_SECONDS = 10.0  # between two plain lines


def say(text: str) -> None:
    """Print a note on stderr."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts bytes.

    Args:
        name: what is done, for the reader.
        total_bytes: of all the work, or None where compression hides it.
    """

    def __init__(self, name: str, total_bytes: int | None) -> None:
        self.name, self.total_bytes = name, total_bytes
        self.done_bytes = 0
        self._started = time.monotonic()
        self._next_line = self._started + _QUIET_SECONDS
        self._bar: tqdm | None = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=self.total_bytes, desc=self.name, unit="B", unit_scale=True, delay=_QUIET_SECONDS, leave=False
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Account for some more bytes."""
        self.done_bytes += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            say(self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        rate = self.done_bytes / seconds
        line = f"{self.name}: {self.done_bytes / 1e9:,.2f} GB"
        if self.total_bytes:
            line += f" of {self.total_bytes / 1e9:,.2f} ({self.done_bytes / self.total_bytes:.0%})"
        line += f", {rate / 1e6:,.0f} MB/s"
        if self.total_bytes and rate:
            line += f", {max(self.total_bytes - self.done_bytes, 0) / rate:,.0f} s left"
        return line
