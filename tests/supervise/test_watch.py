"""Who died first, judged on what is known of the ranks; who hangs, once on real processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hammer.base.errors import ParallelError, to_fields
from megatron_hammer.parallel.board import Board
from megatron_hammer.parallel.observe import Observer
from megatron_hammer.supervise import watch as watching
from megatron_hammer.supervise.watch import Failure, RankProcess, _cause, kill, watch

# ---- who died first --------------------------------------------------------------------------------------------------


def dead(rank: int, code: int, at: float, said: tuple[float, bool] | None = None) -> RankProcess:
    """A rank that has ended; ``said``: when it reported an exception, and whether that came from a collective."""
    report = None
    if said is not None:
        when, inside = said
        report = {"time": when, "error": None, "exception": "RuntimeError: reset", "traceback": "t",
                  "in_collective": inside}  # fmt: skip
    process: Any = SimpleNamespace(exitcode=code)
    return RankProcess(rank, process, None, report, at)  # type: ignore[arg-type]


@pytest.fixture
def silent() -> Any:
    return SimpleNamespace(last_stack=lambda rank: f"stack of {rank}")


DEADLY = sorted({int(s) for s in signal.Signals} - {signal.SIGCHLD, signal.SIGCONT, signal.SIGSTOP, signal.SIGTSTP,
    signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG, signal.SIGWINCH})  # fmt: skip


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_one_that_died_is_named_for_every_signal_and_rank(culprit: int, silent: Any) -> None:
    """The other raises in its collective, a little before or after the launcher sees the death."""
    for number in DEADLY:
        for lag in (-0.4, -0.01, 0.01, 0.3):
            ranks = [dead(culprit, -number, 10.0), dead(1 - culprit, 7, 10.2, (10.0 + lag, True))]
            failure = _cause(ranks, silent)
            assert failure is not None and failure.error.what == f"rank {culprit}", (number, lag)
            assert signal.Signals(number).name in failure.error.rule
            assert failure.traceback == f"stack of {culprit}"


@pytest.mark.parametrize(
    ("ranks", "culprit"),
    [
        ([dead(0, 7, 10, (10, True)), dead(1, 7, 10.5, (10.4, False))], 1),  # a defect, and who lost its peer
        ([dead(0, 7, 10, (9.9, True)), dead(1, -6, 12)], 0),  # an abort long after: NCCL's answer
        ([dead(0, 3, 10), dead(1, 7, 9.9, (9.9, True))], 0),  # ended without a word
        ([dead(0, -6, 12), dead(1, -9, 12.1)], 1),  # killed; the other aborts
        ([dead(0, 7, 10, (10, True)), dead(1, 7, 10, (9.8, True))], 1),  # the first of two
        ([dead(0, 7, 10, (9.7, False)), dead(1, -9, 10)], 1),  # its peer was quicker than the launcher
    ],
)
def test_the_cause_among_several(ranks: list[RankProcess], culprit: int, silent: Any) -> None:
    failure = _cause(ranks, silent)
    assert failure is not None and failure.error.what == f"rank {culprit}"


@pytest.mark.parametrize(("first", "culprit"), [(0, 0), (1, 1)])
def test_a_gpu_that_fails_is_found_where_it_is_waited_for(first: int, culprit: int, silent: Any) -> None:
    """NCCL aborts on other ranks as soon as the connection is gone; or one that aborted took another's GPU along."""
    failed = dead(0, 7, 10.2, (10.0, True))
    assert failed.report is not None
    failed.report["exception"] = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
    failure = _cause([failed, dead(1, -6, 10.3 if first == 0 else 9.8)], silent)
    assert failure is not None and failure.error.what == f"rank {culprit}"


def test_a_peer_that_cannot_be_reached_is_a_consequence(silent: Any) -> None:
    lost = dead(0, 7, 10, (10, False))
    assert lost.report is not None
    lost.report["error"] = to_fields(ParallelError(5, "x", "y", "z"))
    failure = _cause([lost], silent)
    assert failure is not None and failure.severity == 2


def test_a_rank_that_outlives_a_kill_is_named_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one does that waits in the kernel for a disk."""
    monkeypatch.setattr(watching, "KILL_SECONDS", 0.05)
    waited = list[float]()
    held: Any = SimpleNamespace(exitcode=None, pid=os.getpid(), is_alive=lambda: True, kill=lambda: None,
                                join=waited.append)  # fmt: skip
    pipe: Any = SimpleNamespace(closed=False, poll=lambda: False)
    rank = RankProcess(3, held, pipe)
    (said,) = kill([rank])
    assert said.startswith(f"rank 3: process {os.getpid()} has not ended 10 s after SIGKILL (state ")
    assert len(waited) == 1 and 0 <= waited[0] <= 0.05 and rank.ended_at is not None
    assert kill([rank]) == [said] and waited[1:] == [0.0], "it is not waited for again"


# ---- real processes --------------------------------------------------------------------------------------------------


def stand_in(board: Board, rank: int, fault: str) -> None:
    """A rank that is in step 4; rank 1 stops or sleeps in forward, rank 0 waits for it."""
    status = board.slot(rank)
    status.step(4)
    status.mark("forward and backward")
    if rank == 1 and fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 1:
        a_function_that_waits()
    with status.waits("all_reduce"):
        a_function_that_waits()


def a_function_that_waits() -> None:
    time.sleep(60)


@pytest.mark.parametrize("fault", ["stop", "sleep"])
def test_real_processes(fault: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    board, ranks = Board(2), []
    for number in range(2):
        pipe, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=stand_in, args=(board, number, fault))
        process.start()
        theirs.close()
        ranks.append(RankProcess(number, process, pipe))
    deadline = time.monotonic() + 60
    while not all((doing := board.read(n)) and doing.phase.startswith("forward") for n in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    failure = watch(ranks, lambda: False, 60, Observer(board, [0, 1], 0.5))
    assert isinstance(failure, Failure) and failure.error.code == "E801"
    assert str(failure.error).startswith("error[E801]: rank 1 hung: step 4, forward and backward; silent for ")
    assert ("stopped" in failure.error.rule) == (fault == "stop")
    assert "rank 0: step 4, forward and backward: waits in all_reduce, its collective number 1" in failure.traceback
    assert "a_function_that_waits" in failure.traceback
    assert ("rank 1, Python stack" in failure.traceback) == (fault == "sleep")
    assert all(rank.code == -signal.SIGKILL for rank in ranks)
    board.close()
