"""Watching the ranks of one node: what they report, how they end, and which of several failures is the cause.

When one rank fails, the others mostly fail too: their peer is gone. So every failure becomes a candidate with a
severity, and the smallest one is the cause that the launcher prints. After the first failure the others get a grace
period in which to report; then they are killed. A rank that hangs reports no failure; the observer names it
(``parallel/observe.py``). Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from megatron_hammer.base.errors import EXIT_STOPPED_BY_SIGNAL, HammerError, ParallelError, from_fields
from megatron_hammer.base.processes import KILL_SECONDS, outlives_a_kill
from megatron_hammer.parallel.observe import Observer

GRACE_SECONDS = 2.0  # after a failure: for the other ranks to report the same one; a dead peer is noticed in 0.0 s
ABORT_SECONDS = 1.0  # after another rank's report an abort is NCCL's answer to its end; a cause comes first
OF_ITS_GPU = "CUDA error: "  # torch's words for what a rank's own GPU has done; NCCL's errors have others
POLL_SECONDS = 0.5  # longest sleep of the watching loop: bounds how late a deadline or another node's failure is seen


@dataclass
class RankProcess:
    """The process of one started rank, as the launcher sees it."""

    rank: int
    process: SpawnProcess
    pipe: Connection
    report: dict[str, Any] | None = None
    """What a failing rank said: error fields, or a traceback."""
    ended_at: float | None = None
    ended_by_us: bool = False

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self.process.pid is not None, f"rank {self.rank} was not started"
        return self.process.pid

    @property
    def code(self) -> int | None:
        """None while it lives; negative: the signal that ended it."""
        return self.process.exitcode

    @property
    def failed(self) -> bool:
        """Whether it reported an error or ended with a code that no run ends with."""
        return self.report is not None or self.code not in (None, 0, EXIT_STOPPED_BY_SIGNAL)


@dataclass(frozen=True, order=True)
class Failure:
    """A candidate for the one error line; the smallest is the cause, the others mostly its consequences."""

    severity: int
    order: float
    error: HammerError = field(compare=False)
    traceback: str = field(default="", compare=False)
    rank: int | None = field(default=None, compare=False)
    """That died without a word of its own."""


def forward_signal(ranks: Sequence[RankProcess], signum: int) -> None:
    """Pass a signal on to every rank that lives."""
    for rank in ranks:
        if rank.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signum)


def watch(
    ranks: Sequence[RankProcess],
    failed_elsewhere: Callable[[], bool],
    timeout_seconds: float,
    observer: Observer,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Failure | None:
    """Wait until every rank has ended; return why the run failed, or None.

    The first failure starts the grace period, the first clean end a longer one: ranks end together or not at all.

    Args:
        failed_elsewhere: whether another node has reported a failure; asked at least every ``POLL_SECONDS``.
        timeout_seconds: how long the others may still run after the first rank has ended.
        observer: of these ranks.
        asked_to_stop: whether a stop signal has come and these are all ranks of the run: before the first step nothing
            is there to be saved, and they are ended at once.
    """
    deadline: float | None = None
    failing = False
    while living := [r for r in ranks if r.ended_at is None]:
        pipes = [r.pipe for r in living if not r.pipe.closed]
        timeout = POLL_SECONDS if deadline is None else min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
        wait([*pipes, *(r.process.sentinel for r in living)], timeout)
        for rank in living:
            _listen(rank)
        now, pids = time.monotonic(), {r.rank: r.pid for r in ranks if r.code is None and r.report is None}
        if not failing and (any(r.failed for r in ranks) or failed_elsewhere()):
            failing, deadline = True, now + GRACE_SECONDS
            if observer.after_timeout([r.rank for r in ranks if r.report is not None], now, pids):
                return _end_hung(ranks, *observer.describe_waited_for(pids))
        if not failing and asked_to_stop() and not observer.began_training(pids):
            kill(ranks)
            return None
        if not failing and (hang := observer.look(pids)) is not None:
            return _end_hung(ranks, *hang)
        if deadline is None and any(r.ended_at is not None for r in ranks):
            deadline = now + timeout_seconds
        if deadline is not None and now >= deadline:
            late = [r for r in ranks if r.ended_at is None]
            kill(ranks)
            if late and not failing:
                numbers = ", ".join(str(r.rank) for r in late)
                error = ParallelError(
                    4,
                    f"rank {numbers}",
                    f"did not end within {timeout_seconds:g} s of the others",
                    "look for what it waits for; the last committed checkpoint is safe",
                )
                return Failure(0, 0, error)
    return _cause(ranks, observer)


def _end_hung(ranks: Sequence[RankProcess], error: HammerError, stacks: str) -> Failure:
    kill(ranks)
    return Failure(0, 0, error, stacks)


def _cause(ranks: Sequence[RankProcess], observer: Observer) -> Failure | None:
    """The failure to which the others give way, with what its rank wrote when it died."""
    first_report = min((r.report["time"] for r in ranks if r.report is not None), default=math.inf)
    found = [f for r in ranks if (f := _failure(r)) is not None]
    late = first_report + ABORT_SECONDS
    cause = min((replace(f, severity=3) if f.severity == 2 and f.order > late else f for f in found), default=None)
    if cause is None or cause.traceback or cause.rank is None:
        return cause
    return replace(cause, traceback=observer.last_stack(cause.rank))


def _listen(rank: RankProcess) -> None:
    """Take the rank's report, if there is one, and note its end."""
    if not rank.pipe.closed and rank.pipe.poll():
        try:
            rank.report = json.loads(rank.pipe.recv_bytes())
        except (EOFError, OSError):  # it ended without a report
            rank.pipe.close()
    if rank.code is not None and (rank.pipe.closed or not rank.pipe.poll()):
        rank.ended_at = time.monotonic()


def _failure(rank: RankProcess) -> Failure | None:
    """What this rank contributes to the search for the cause.

    0: a user's mistake, said by the rank itself. 1: killed from outside or by a bad access; an exception that nobody
    expected. 2: it aborted, or ended without a word; libraries do so when a peer dies. So does NCCL a moment after a
    rank whose GPU has failed, which that rank finds in a collective, where it waits for its GPU. 3: it raised in a
    collective, as ranks do whose peer has just died, however that was. Of two that are alike the first is the cause.
    """
    name = f"rank {rank.rank}"
    if rank.report is not None:
        when, severity = rank.report["time"], 3 if rank.report["in_collective"] else 1
        if severity == 3 and OF_ITS_GPU in rank.report["exception"]:
            severity = 2
        if rank.report["error"] is None:
            error: HammerError = ParallelError(
                2,
                name,
                f"raised {rank.report['exception']}",
                "its traceback is above; the last committed checkpoint is safe",
            )
            return Failure(severity, when, error, rank.report["traceback"])
        error = from_fields(rank.report["error"])
        of_others = isinstance(error, ParallelError)
        return Failure(max(severity, 2), when, error) if of_others else Failure(0, rank.rank, error)
    if rank.ended_by_us or not rank.failed:
        return None
    assert rank.code is not None and rank.ended_at is not None, f"{name} has not ended"
    if rank.code < 0:
        remedy = "run the same command again: it resumes from the last checkpoint"
        if -rank.code == signal.SIGKILL:
            remedy += "; where nobody killed it, the kernel may have for want of memory (see dmesg)"
        number = -rank.code
        died = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        severity = 2 if number == signal.SIGABRT else 1
        # No library sends SIGKILL. Its peers may raise before the launcher has seen the death.
        when = -math.inf if number == signal.SIGKILL else rank.ended_at
        return Failure(severity, when, ParallelError(1, name, f"died of {died}", remedy), rank=rank.rank)
    error = ParallelError(3, name, f"ended with exit code {rank.code} and no report", "see its last output above")
    return Failure(2, rank.ended_at, error)


def kill(ranks: Sequence[RankProcess]) -> list[str]:
    """End what still lives, at once and for certain. Checkpoints are safe: they are committed by a rename.

    Returns:
        what to say of each rank that not even the kernel can end now.
    """
    for rank in ranks:
        if rank.process.is_alive():
            rank.ended_by_us = True
            rank.process.kill()
    left, until = [], time.monotonic() + KILL_SECONDS
    for rank in ranks:
        rank.process.join(max(0.0, until - time.monotonic()) if rank.ended_at is None else 0.0)  # once
        _listen(rank)
        if rank.code is None:
            rank.ended_at = rank.ended_at or time.monotonic()
            left.append(f"rank {rank.rank}: {outlives_a_kill(rank.pid)}")
    return left
