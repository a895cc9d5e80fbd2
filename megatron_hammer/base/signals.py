"""The signals that ask a program to stop, and ``StopRequest``, for a program that wants to finish something first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence
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


def restore(handlers: dict[int, Any]) -> None:
    """Give signals back to the handlers that ``on_signals`` found."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


class StopRequest:
    """While its ``with`` block runs, a signal only notes that the program should stop.

    Args:
        signals: those that count. They are unblocked on entry: a launcher's ranks are born with them blocked, so that
            none is lost while they start.
        once: a second signal acts as it did before; otherwise repeating one changes nothing.
    """

    def __init__(self, signals: Sequence[int] = STOP_SIGNALS, once: bool = False) -> None:
        self._signals, self._once = signals, once
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
