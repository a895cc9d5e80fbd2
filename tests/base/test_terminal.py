"""The view at the bottom of a terminal, on a pseudo-terminal, through a small emulator of one."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from megatron_hammer.base.progress import Activity, Progress
from megatron_hammer.base.streams import Outlet, OutputKind
from megatron_hammer.base.terminal import View, can_redraw, cut, laid_out, size_of_window, width_of

ROWS = [
    [("step", "1,230 / 10,000"), ("", "12.3%"), ("left", "3 h 12 min")],
    [("loss", "3.2145"), ("lr", "2.910e-04"), ("tokens/s", "16,012"), ("memory", "56.90 GiB")],
    [("中文.百科", "3.1000"), ("\x1b[2Jen", "3.4100"), ("a" * 300, "2.0000")],
]


class Screen:
    """What a terminal shows after it has been sent some bytes: lines that wrap, cursor up, erasure, styles."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0

    def feed(self, text: str) -> None:
        for control, plain in re.findall(r"(\x1b\[\d*[A-Za-z]|[\r\n])|([^\x1b\r\n])", text):
            if plain:
                self._put(plain)
            elif control == "\n":
                self._down()
            elif control == "\r":
                self.column = 0
            elif control.endswith("A"):
                self.row = max(0, self.row - int(control[2:-1]))
            elif control.endswith("J"):
                del self.lines[self.row + 1 :]
                self.lines[self.row] = self.lines[self.row][: self.column]
            else:
                assert control.endswith("m"), repr(control)

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        self.lines += [""] * (self.row + 1 - len(self.lines))

    def _put(self, character: str) -> None:
        if width_of(self.lines[self.row][: self.column] + character) > self.columns:
            self._down()
        line = self.lines[self.row]
        self.lines[self.row] = line[: self.column].ljust(self.column) + character + line[self.column + 1 :]
        self.column += 1


class Terminal:
    """A pseudo-terminal: a stream to write to, and what has arrived at its other end."""

    def __init__(self, columns: int) -> None:
        self.reader, self.descriptor = pty.openpty()
        self.resize(columns)
        self.stream: TextIO = os.fdopen(os.dup(self.descriptor), "w", encoding="utf-8")

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def received(self) -> str:
        self.stream.flush()
        content = b""
        while select.select([self.reader], [], [], 0)[0]:
            content += os.read(self.reader, 65536)
        return content.decode()


@contextmanager
def terminal(columns: int) -> Iterator[Terminal]:
    made = Terminal(columns)
    try:
        yield made
    finally:
        made.stream.close()
        os.close(made.descriptor)
        os.close(made.reader)


@pytest.mark.parametrize("columns", [20, 40, 60, 200])
def test_lines_fit_and_stand_below_what_is_printed(columns: int) -> None:
    with terminal(columns) as screen:
        time = [0.0]
        view = View(screen.stream, {"TERM": "xterm"}, lambda: time[0])
        view.show(ROWS)
        view.show([[("loss", "never drawn")]])  # too soon
        view.above("saved it", screen.stream)
        time[0] = 1.0
        view.show(ROWS)
        view.close()
        view.show([[("loss", "nor this")]], now=True)
        print("error[E902]: step 3", file=screen.stream)
        sent = screen.received()
        shown = Screen(columns)
        shown.feed(sent)
        assert shown.lines[0] == "saved it" and shown.lines[-2:] == ["error[E902]: step 3", ""]
        view_lines = shown.lines[1:-2]
        assert all(0 < width_of(line) < columns for line in view_lines), view_lines
        assert view_lines == laid_out(ROWS, columns - 1, 22, has_style=False), (
            "drawn once, nothing is left of the others"
        )
        text = "\n".join(view_lines)
        assert "1,230 / 10,000" in text and "3.2145" in text and "?[2Jen 3.4100" in text and "nor this" not in text
        assert "\x1b[1m3.2145\x1b[0m" in sent


def test_a_window_that_becomes_narrower_leaves_no_line_behind() -> None:
    with terminal(60) as screen:
        view = View(screen.stream, {"TERM": "xterm", "NO_COLOR": "1"})
        view.show(ROWS)
        first = screen.received()
        assert "\x1b" not in first, "NO_COLOR: nothing but text, until lines are drawn again"
        screen.resize(25)
        shown = Screen(25)  # which wraps what stands there, as terminals do
        shown.feed(first)
        view.show(ROWS, now=True)
        shown.feed(screen.received())
        assert shown.lines[:-1] == laid_out(ROWS, 24, 22, has_style=False)


def test_where_there_is_no_view(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    with terminal(80) as screen:
        assert can_redraw(screen.stream, {"TERM": "xterm-256color"})
        for name in ("dumb", "", "unknown"):
            assert not can_redraw(screen.stream, {"TERM": name})
    with open(os.devnull, "w") as plain:
        assert not can_redraw(plain, {"TERM": "xterm"})
    plain.close()
    assert not can_redraw(plain, {"TERM": "xterm"})


def test_widths() -> None:
    assert (width_of("中文a"), width_of("e\u0301"), cut("中文", 3), cut("abc", 3), cut("abcd", 3)) == (
        5,
        1,
        "中~",
        "abc",
        "ab~",
    )
    assert laid_out([[("a", "1"), ("b", "2")], [], [("c", "3")]], 7, 9, False) == ["a 1", "b 2", "c 3"]
    assert laid_out([[("a", "1"), ("b", "2")], [("c", "3")]], 9, 1, False) == ["a 1 | b 2"]


def test_what_others_print_is_not_drawn_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's warning on the guarded streams, also without an end of its line; a file is left alone."""
    with terminal(60) as screen, open(os.devnull, "wb") as file:
        outlet = Outlet(screen.descriptor, None)
        guarded = io.TextIOWrapper(io.BufferedWriter(outlet), "utf-8", line_buffering=True)
        monkeypatch.setattr(sys, "stderr", guarded)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Outlet(file.fileno(), OutputKind.LOG)))
        view = View(guarded, {"TERM": "xterm"})
        for step in range(3):
            view.show([[("loss", str(step))]], now=True)
            print(f"UserWarning: {step}", end="" if step == 1 else "\n", file=sys.stderr, flush=True)
        view.close()
        print("the end", file=sys.stderr)
        shown = Screen(60)
        shown.feed(screen.received())
    assert shown.lines[:-1] == ["UserWarning: 0", "UserWarning: 1", "UserWarning: 2", "loss 2", "the end"]
    assert outlet.before is None


def test_an_activity_and_a_bar_share_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign of life in place where nothing else is written; none over a bar; nothing is left of both."""
    monkeypatch.setenv("TERM", "xterm")
    with terminal(80) as screen, open(os.devnull, "wb") as file:
        outlet = Outlet(screen.descriptor, None)
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(outlet), "utf-8", line_buffering=True))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Outlet(file.fileno(), OutputKind.LOG)))
        monkeypatch.setenv("COLUMNS", "40")
        assert size_of_window(screen.stream).columns == 40
        with Activity("reading a model 模型 whose name is too long for a line") as activity:
            activity.show(outlet.written + 4)
            assert screen.received() == "", "nothing for short work"
            activity.show(outlet.written + 6)
            drawn = Screen(40)
            drawn.feed(sent := screen.received())
            assert drawn.lines[1] == "6 s" and "模型" in drawn.lines[0] and width_of(drawn.lines[0]) < 40
            with Progress("reading a file whose name is too long, too.safetensors", 100, "tensors") as progress:
                progress.advance(30)
                assert screen.received() == "", "nothing for short work"
                progress._next_line = 0  # as after five seconds
                progress.advance(20)
                bar = screen.received()
                assert "50%" in bar and "/100" in bar and max(map(width_of, re.split(r"[\r\n]", bar))) < 40
                activity.show(outlet.written + 60)
                assert screen.received() == "", "no view over a bar"
            sent += bar
        drawn = Screen(40)
        drawn.feed(sent + screen.received())
        assert [line.strip() for line in drawn.lines if line.strip()] == []
