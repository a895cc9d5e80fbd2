"""The signals that ask a program to stop: ``end_at_once`` for one that has nothing to lose yet, ``StopRequest`` for one
that wants to finish something first."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron_hammer.base.errors import EXIT_STOPPED_BY_SIGNAL

# TERM, Ctrl-C, the end of a terminal, and USR1, which is Slurm's early warning.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

Handler = Callable[[int, FrameType | None], Any]


def on_signals(signals: Sequence[int], handler: Handler) -> dict[int, Any]:
    """Install a handler for these signals, but for one that is ignored (as SIGHUP is under ``nohup``): it stays so.

    Returns:
        the handlers that were there before, for ``restore``.
    """
    wanted = [number for number in signals if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in wanted}


@contextmanager
def blocked(signals: Collection[int]) -> Iterator[None]:
    """Block signals in this thread; a process that is started meanwhile never gets them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def restore(handlers: dict[int, Any]) -> None:
    """Give signals back to the handlers that ``on_signals`` found."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def end_at_once(when: str) -> None:
    """From now on a stop signal ends the program with code 75, whatever it is at, until ``take_over``.

    Python runs a handler between two of its own instructions, so not while compiled code builds an index. But the
    interpreter's part of it, which the kernel calls, also writes a byte into a pipe, and a thread that waits for the
    byte ends the program.

    Args:
        when: for the line that says so: ``before any rank started``.
    """
    pipe = os.pipe()
    # Not 0 to 2, where a program whose streams were closed from the start will write its output.
    reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in pipe)
    for end in pipe:
        os.close(end)
    os.set_blocking(writing, False)
    on_signals(STOP_SIGNALS, lambda *_: None)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_end_when_told, args=(reading, when), name="stop signals", daemon=True).start()


def _end_when_told(reading: int, when: str) -> None:
    while told := os.read(reading, 1):
        if told[0] in STOP_SIGNALS:
            line = f"stopped by {signal.Signals(told[0]).name} {when}; run the same command again"
            print(line, file=sys.stderr, flush=True)
            os._exit(EXIT_STOPPED_BY_SIGNAL)
    os.close(reading)


def take_over() -> None:
    """A stop signal no longer ends the program at once: whoever calls this has handlers of its own."""
    writing = signal.set_wakeup_fd(-1)
    if writing >= 0:
        os.close(writing)


class Stopped(Exception):
    """A stop signal came before the work was done; the text says from where it can go on, where it can."""


class StopRequest:
    """While its ``with`` block runs, a signal only notes that the program should stop.

    Args:
        signals: those that count. They are unblocked on entry: a launcher's ranks are born with them blocked, so that
            none is lost while they start.
        once: a second signal acts as it did before; otherwise repeating one changes nothing.
        takes_over: False in a process that is not a program of ours, where ``end_at_once`` was never called and
            another library may be waiting for signals in its own way, such as the event loop of a notebook's kernel.
    """

    def __init__(self, signals: Sequence[int] = STOP_SIGNALS, once: bool = False, takes_over: bool = True) -> None:
        self._signals, self._once, self._takes_over = signals, once, takes_over
        self._former: dict[int, Any] = {}
        self.event = threading.Event()
        """Set when the first signal has come; other threads may wait for it."""
        self.exit_code = 0
        """For a program that the signal has ended: 130 after SIGINT, else 75."""

    @property
    def received(self) -> bool:
        """Whether a signal has come."""
        return self.event.is_set()

    def __enter__(self) -> StopRequest:
        self._former = on_signals(self._signals, self._note)
        if self._takes_over:
            take_over()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._signals)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.exit_code = 130 if number == signal.SIGINT else EXIT_STOPPED_BY_SIGNAL
        self.event.set()
        if self._once:
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        restore(self._former)
        self._former = {}
