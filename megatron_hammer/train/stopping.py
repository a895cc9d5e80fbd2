"""Lets all ranks decide together whether to stop, so that long work ends at the same point on each of them.

A signal may reach one rank alone, or all of them at different moments; a rank that stopped by itself would leave the
others waiting in their next collective. The loop asks once in each step (``loop.py``). Evaluation asks as often as it
must to react within half a second, which all ranks compute from the pace of the slowest one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from megatron_hammer.parallel.collectives import MAX, all_reduce, read_back
from megatron_hammer.parallel.context import ParallelContext

CHECK_SECONDS = 0.5  # between two questions: a question is one small collective, and on a GPU one wait for the device
MOST_CALLS = 1000  # between two questions, whatever the pace


class CutShort(Exception):
    """Long work was ended by a stop signal, on all ranks alike."""


class StopCheck:
    """Asks all ranks now and then.

    Args:
        received: whether this rank has received a stop signal.
    """

    def __init__(self, received: Callable[[], bool], ctx: ParallelContext) -> None:
        self._received, self._ctx = received, ctx
        self._left, self._calls, self._since = 1, 0, time.perf_counter()

    def now(self) -> bool:
        """Whether some rank has received a signal. Communicates over the world; all ranks call it."""
        return self._ask(0.0)[0] > 0

    def now_and_then(self) -> None:
        """Ask at some of the calls. All ranks call it equally often.

        Raises:
            CutShort: some rank has received a signal.
        """
        self._left, self._calls = self._left - 1, self._calls + 1
        if self._left:
            return
        received, pace = self._ask((time.perf_counter() - self._since) / self._calls)
        self._left = min(max(int(CHECK_SECONDS / pace), 1), MOST_CALLS) if pace > 0 else 1
        self._calls, self._since = 0, time.perf_counter()
        if received > 0:
            raise CutShort

    def _ask(self, pace: float) -> list[float]:
        """The largest of all ranks: whether one has received a signal, seconds a call."""
        values = torch.tensor([float(self._received()), pace], device=self._ctx.device)
        all_reduce(values, self._ctx.world, MAX)
        largest: list[float] = read_back(values, self._ctx.world)
        return largest
