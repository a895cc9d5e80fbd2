"""The progress of long work, shown on stderr: a bar on a terminal, else a plain line every ten seconds.

Work that takes less than five seconds shows nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_hammer.base.terminal import can_redraw

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

QUIET_SECONDS = 5.0  # what takes less needs no progress
LINE_SECONDS = 10.0  # between two plain lines


def say(text: str) -> None:
    """Print a note on stderr."""
    print(text, file=sys.stderr, flush=True)


def size_of(count: float) -> str:
    """Bytes for people, in the largest unit that leaves something before the point: ``1.20 GB``, ``7.30 KB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} bytes"


class Progress:
    """How much of some work is done, how fast it goes, and how long the rest takes.

    Args:
        name: what is done, for the reader.
        total: of all the work, or None where nobody knows.
        unit: what is counted: "B" for bytes, which are shown as GB and MB/s, or a word such as "tensors".
        done: what an earlier run had done; it does not count for the speed.
        report: gets the plain lines.
    """

    def __init__(
        self, name: str, total: int | None, unit: str = "B", done: int = 0, report: Callable[[str], None] = say
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._report = report
        self.note = ""
        """Shown behind the numbers, such as another rate."""
        self._done_before = done
        self._started = time.monotonic()
        self._next_line = self._started + QUIET_SECONDS
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> Progress:
        if can_redraw(sys.stderr):
            import tqdm

            self._bar = tqdm.tqdm(
                total=self.total,
                initial=self.done,
                desc=self.name,
                unit="B" if self.unit == "B" else f" {self.unit}",
                unit_scale=True,
                delay=QUIET_SECONDS,
                leave=False,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the work began; never 0."""
        return max(time.monotonic() - self._started, 1e-9)

    def advance(self, count: int) -> None:
        """Account for some more of the work."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        if now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            self._report(self._line(now - self._started))

    def pass_over(self, count: int) -> None:
        """Account for something that was done before this run: it does not count for the speed."""
        self._done_before += count
        self.done += count
        if self._bar is not None:
            self._bar.update(count)

    def _line(self, seconds: float) -> str:
        rate = (self.done - self._done_before) / seconds
        if self.unit == "B":
            line = f"{self.name}: {self.done / 1e9:,.2f} GB"
            line += f" of {self.total / 1e9:,.2f} ({self.done / self.total:.0%})" if self.total else ""
            line += f", {rate / 1e6:,.0f} MB/s"
        else:
            line = f"{self.name}: {self.done:,}"
            line += f" of {self.total:,} {self.unit} ({self.done / self.total:.0%})" if self.total else f" {self.unit}"
        if self.note:
            line += f", {self.note}"
        if self.total and rate:
            line += f", {max(self.total - self.done, 0) / rate:,.0f} s left"
        return line


def track(items: Iterable[T], name: str, total: int | None, unit: str) -> Iterator[T]:
    """Go through ``items`` and show how many are done."""
    with Progress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.advance(1)
