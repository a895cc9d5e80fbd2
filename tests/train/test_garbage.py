"""The garbage collector runs when the loop says so, and is as it was when the run is over."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.train import loop
from megatron_hammer.train.garbage import garbage_collected_by_hand
from tests.train.runs import overrides, train_here


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    """As in a program; what the tests have frozen (``tests/conftest.py``) is frozen again."""
    gc.unfreeze()
    assert gc.get_freeze_count() == 0
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def test_the_collector_runs_at_fixed_steps_only(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After evaluations (4, 8, 12), saves (3, 6, 9, 12) and every fifth step; a step leaves no cycle behind."""
    seen: list[str] = []
    monkeypatch.setattr(loop, "COLLECT_EVERY_STEPS", 5)
    collect, step_of_run = loop.TrainLoop._collect_garbage, loop.train_step

    def step(*arguments: Any) -> Any:
        assert not gc.isenabled() and gc.get_freeze_count() > 1000
        before = gc.get_stats()
        report = step_of_run(*arguments)
        assert gc.get_stats() == before, "no collection inside of a step"
        seen.append(f"step {arguments[4]}")
        return report

    def noted(run: loop.TrainLoop) -> None:
        seen.append("collect")
        collect(run)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop.TrainLoop, "_collect_garbage", noted)
    enabled, frozen = gc.isenabled(), gc.get_freeze_count()
    assert train_here(0, overrides(data, tmp_path / "out")) == 0
    assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, frozen) == (True, 0)
    after = [seen[i - 1] for i, event in enumerate(seen) if event == "collect"]
    assert after == [f"step {n}" for n in (3, 4, 5, 6, 8, 9, 10, 12)]


def test_the_collector_is_restored_after_an_error() -> None:
    for was_enabled in (False, True):
        (gc.enable if was_enabled else gc.disable)()
        with pytest.raises(ValueError, match="inside"), garbage_collected_by_hand():
            assert not gc.isenabled()
            raise ValueError("inside")
        assert gc.isenabled() == was_enabled and gc.get_freeze_count() == 0


def test_what_somebody_else_has_frozen_stays_and_nothing_is_added() -> None:
    """Else the weights of every run of a longer program would stay, too."""
    gc.freeze()
    frozen = gc.get_freeze_count()
    later = [[] for _ in range(1000)]  # the collector knows them
    with garbage_collected_by_hand():
        assert not gc.isenabled() and gc.get_freeze_count() <= frozen
    assert gc.isenabled() and 0 < gc.get_freeze_count() <= frozen and len(later) == 1000
