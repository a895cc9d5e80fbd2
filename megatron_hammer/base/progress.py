"""The progress of long work, shown on stderr: a bar on a terminal, else a plain line every ten seconds.

``Progress`` is for work of which one can say how much is done, ``Activity`` for work of which one can only say what it
is: a model that is read, a run that is waited for. Work that takes less than five seconds shows nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_hammer.base.streams import outlet_of
from megatron_hammer.base.terminal import View, can_redraw, cut, size_of_window

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

QUIET_SECONDS = 5.0  # what takes less needs no progress
LINE_SECONDS = 10.0  # between two plain lines
POLL_SECONDS = 0.5  # how often an activity looks whether it is time for a sign of life


def say(text: str) -> None:
    """Print a note on stderr."""
    print(text, file=sys.stderr, flush=True)


def size_of(count: float) -> str:
    """Bytes for people, in the largest unit that leaves something before the point: ``1.20 GB``, ``7.30 KB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,.0f} bytes"


class Progress(AbstractContextManager["Progress"]):
    """How much of some work is done, how fast it goes, and how long the rest takes.

    Args:
        name: what is done, for the reader.
        total: of all the work, or None where nobody knows.
        unit: what is counted: "B" for bytes, which are shown as GB and MB/s, or a word such as "tensors".
        done: what an earlier run had done; it does not count for the speed.
        report: gets the plain lines.
        note: gives what is shown behind the numbers, such as another rate; asked when they may be
            shown: with a bar at each ``advance``.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        unit: str = "B",
        done: int = 0,
        report: Callable[[str], None] = say,
        note: Callable[[], str] = lambda: "",
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self._report, self._note = report, note
        self._done_before = done
        self._started = time.monotonic()
        self._next_line = self._started + QUIET_SECONDS
        self._bar: tqdm[Any] | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            if kind is None and self.seconds > QUIET_SECONDS:
                self._bar.refresh()  # the end, too, if it comes right after a drawing
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the work began; never 0."""
        return max(time.monotonic() - self._started, 1e-9)

    def advance(self, count: int) -> None:
        """Account for some more of the work."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(self._note(), refresh=False)
            self._bar.update(count)
        elif (now := time.monotonic()) >= self._next_line:
            self._show(now)

    def _show(self, now: float) -> None:
        """Once it takes long: a bar, from here on, on a terminal that can draw one; else a plain line."""
        seconds = now - self._started
        if not can_redraw(sys.stderr):
            self._next_line = now + LINE_SECONDS
            self._report(self._line(seconds))
            return
        import tqdm

        columns = size_of_window(sys.stderr).columns
        self._bar = tqdm.tqdm(
            total=self.total,
            initial=self._done_before,
            desc=cut(self.name, columns // 2),  # the numbers matter more
            unit="B" if self.unit == "B" else f" {self.unit}",
            unit_scale=True,
            delay=QUIET_SECONDS,  # it is not drawn before it knows what is done
            miniters=0,  # drawn by time alone: by default not after a last part that is smaller than the others
            leave=False,
            ncols=columns - 1 if os.environ.get("COLUMNS") else None,
            dynamic_ncols=not os.environ.get("COLUMNS"),
        )
        self._bar.start_t -= seconds
        self._bar.n, self._bar.delay = self.done, 0
        self._bar.set_postfix_str(self._note())  # draws

    def expect(self, total: int) -> None:
        """Say how much all of the work is, once that is known."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

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
        if note := self._note():
            line += f", {note}"
        if self.total and rate:
            line += f", {max(self.total - self.done, 0) / rate:,.0f} s left"
        return line


def track(items: Iterable[T], name: str, total: int | None, unit: str) -> Iterator[T]:
    """Go through ``items`` and show how many are done."""
    with Progress(name, total, unit) as progress:
        for item in items:
            yield item
            progress.advance(1)


class Activity:
    """What is under way; a sign of life, its name and seconds, wherever nothing else is written for five seconds.

    On a terminal that is a line in place, else a plain line every ten seconds. A context, for one thread::

        with Activity("reading the model") as note:
            model = load()              # after 5 s: "reading the model: 5 s so far"
            note("comparing")           # said at once
            note.begin("drawing")       # said if it takes long

    Args:
        name: of what comes first.
        report: gets the plain lines.
        in_place: whether a terminal gets a line that is drawn again; not where other processes write on it, too, since
            their last line would be taken away with ours.
    """

    def __init__(self, name: str, report: Callable[[str], None] = say, in_place: bool = True) -> None:
        self.name, self._report, self._in_place = name, report, in_place
        self._begun = self._others = time.monotonic()
        """When this work began, and when somebody else wrote for the last time."""
        self._ours, self._next_line = 0.0, 0.0
        self._is_over = threading.Event()
        self._view: View | None = None
        self._thread = threading.Thread(target=self._watch, name="activity", daemon=True)

    def __enter__(self) -> Activity:
        if self._in_place and can_redraw(sys.stderr):
            self._view = View(sys.stderr)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        if self._view is not None:
            self._view.show((), now=True)
            self._view.close()

    def __call__(self, text: str) -> None:
        """Say what comes next."""
        self.begin(text)
        self._report(text)

    def begin(self, name: str) -> None:
        """What comes next; it is said if it takes long."""
        if self._view is not None:
            self._view.show((), now=True)
        self.name, self._begun = name, time.monotonic()

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_SECONDS):
            self.show(time.monotonic())

    def show(self, now: float) -> None:
        """Show a sign of life if it is time: what others write is one, and no bar of theirs is drawn over."""
        outlet = outlet_of(sys.stderr)
        if outlet is not None and outlet.written != self._ours:
            self._others = outlet.written
            if outlet.is_bar:
                return
        if now - max(self._begun, self._others) < QUIET_SECONDS:
            return
        seconds = f"{now - self._begun:,.0f} s"
        if self._view is not None:
            self._view.show([[("", self.name), ("", seconds)]], now=True)
        elif now >= self._next_line:
            self._next_line = now + LINE_SECONDS
            self._report(f"{self.name}: {seconds} so far")
        if outlet is not None:
            self._ours = outlet.written
