"""Who hangs and who is slow, judged on what is known of the ranks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hammer.parallel import observe
from megatron_hammer.parallel.board import Doing
from megatron_hammer.parallel.observe import Observer, Seen, Stragglers, hung

LIMIT = 100.0


def seen(rank: int, silent: float, waiting: bool = False, count: int = 5, **more: Any) -> Seen:
    doing = Doing(0.0, 1, True, 3, count, waiting, more.pop("phase", "forward"), "all_reduce")
    return Seen(rank, more.pop("doing", doing), silent, **more)


# ---- hung ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "guilty"),
    [
        ([seen(0, 99, True), seen(1, 99)], []),  # not yet
        ([seen(0, 100, True), seen(1, 99)], [1]),  # who works and is silent
        ([seen(0, 60), seen(1, 101, True), seen(2, 101, True)], [0]),  # its last words came a little later
        ([seen(0, 500, True), seen(1, 2)], []),  # slow, but it says something
        ([seen(0, 100, True, state="T"), seen(1, 100, True)], [0]),  # stopped while it waited itself
        ([seen(0, 100, True, 6), seen(1, 100, True, 5), seen(2, 100, True, 6)], [1]),  # who is behind
        ([seen(0, 100, True), seen(1, 100, True)], [0, 1]),  # each waits for the other
        ([seen(0, 500, is_busy=True), seen(1, 500, is_busy=True)], []),  # both compile, say
        ([seen(0, 500, True), seen(1, 500, is_busy=True)], [1]),  # for too long for the others
        ([seen(0, 500, is_busy=True), seen(1, 500), seen(2, 500, True)], [1]),  # 0 spins in a launch, 1 is in a disk
        ([seen(0, 100, True), seen(1, 100, doing=None)], [1]),  # never said anything
        ([seen(0, 100)], [0]),
        ([seen(0, 500, is_busy=True)], []),
    ],
)
def test_who_hangs(ranks: list[Seen], guilty: list[int]) -> None:
    assert [r.rank for r in hung(ranks, LIMIT)] == guilty


def test_ranks_that_all_wait_for_another_node_are_not_to_blame() -> None:
    assert hung([seen(0, 100, True), seen(1, 100, True)], LIMIT, alone=False) == []


def test_a_run_that_stood_still_as_a_whole_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-Z and ``fg``: silence is counted from when it goes on."""
    now, notes = [0.0], list[str]()
    board: Any = SimpleNamespace(read=lambda place: Doing(0.0, 1, True, 3, 5, False, "forward", "all_reduce"))
    monkeypatch.setattr(observe.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(observe, "process_state", lambda pid: ("S", 0.0))
    monkeypatch.setattr(observe, "wait_channel", lambda pid: "")
    observer = Observer(board, [0], LIMIT, note=notes.append)
    found = []
    for now[0] in (4.0, 5000.0, 5004.0, *range(5005, 5102)):
        found += [now[0] for _ in observer.find({0: 1})]
    assert found == [5100, 5101]
    assert notes == ["note: this run has stood still for 4996 s, and goes on"]


def test_a_rank_whose_own_code_keeps_it_from_looking_has_not_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun a thread of the rank looks; and the first look comes when all ranks have been started."""
    now, notes = [50.0], list[str]()
    board: Any = SimpleNamespace(read=lambda place: Doing(0.0, 1, True, 3, 5, False, "forward", "all_reduce"))
    monkeypatch.setattr(observe.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(observe.time, "process_time", lambda: now[0] / 2)
    monkeypatch.setattr(observe, "process_state", lambda pid: ("S", 0.0))
    monkeypatch.setattr(observe, "wait_channel", lambda pid: "")
    observer = Observer(board, [0], LIMIT, note=notes.append)
    for now[0] in (80.0, 80.5, 95.0, 102.0):
        assert not observer.find({0: 1})
    assert notes == []


# ---- stragglers ------------------------------------------------------------------------------------------------------


def judge(stragglers: Stragglers, look: Callable[[int], list[Seen]], seconds: int) -> list[tuple[float, int]]:
    told = []
    for tick in range(2 * seconds):
        if (slow := stragglers.judge(1000 + tick / 2, look(tick))) is not None:
            told.append((tick / 2, slow[0]))
    return told


def test_a_rank_that_is_stopped_again_and_again_is_named_once() -> None:
    """One second stopped, one second not."""
    pulses = lambda tick: [seen(0, 0.5, tick % 4 < 2), seen(1, 0.5, state="T" if tick % 4 < 2 else "R")]  # noqa: E731
    told = judge(Stragglers(), pulses, 120)
    assert [rank for _, rank in told] == [1] and told[0][0] < 30


def test_pauses_of_two_seconds_and_saves_are_no_matter() -> None:
    pause = lambda tick: [seen(0, 1, tick % 20 < 4), seen(1, 1)]  # noqa: E731
    assert judge(Stragglers(), pause, 120) == []
    saving = lambda tick: [seen(0, 1, phase="saving, slice 3 of 9"), seen(1, 9, True)]  # noqa: E731
    assert judge(Stragglers(), saving, 120) == []
    turns = lambda tick: [seen(0, 1, tick % 40 < 20), seen(1, 1, tick % 40 >= 20)]  # noqa: E731
    told = judge(Stragglers(), turns, 120)
    assert all(second < 25 for second, _ in told), "now the one, now the other: no rank is slow"
