"""A stop signal in an evaluation: it is cut short on all ranks, and made up for when the run goes on, bit for bit."""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_hammer.checkpoint.folder import newest_checkpoint
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.samples import ValidData
from megatron_hammer.train import stopping
from megatron_hammer.train.prepare import OWED, prepare
from tests.distributed import run_distributed
from tests.train.runs import checkpoint_bytes, config_for, metrics, overrides, train_here


def stopped_in_evaluation(rank: int, arguments: list[str], number: int, signalled: int = 0) -> int:
    """Run until an evaluation, at whose first set one rank gets a signal."""
    sets, read = [""], ValidData.read

    def reading(self: ValidData, samples: range) -> Any:
        if self.name != sets[-1]:
            sets.append(self.name)
            if sets.count("x") == number and self.name == "x" and rank == signalled:
                os.kill(os.getpid(), signal.SIGTERM)
        return read(self, samples)

    with patch.object(ValidData, "read", reading), patch.object(stopping, "CHECK_SECONDS", 0.0):
        return train_here(rank, arguments)


def test_an_evaluation_that_was_cut_short_is_made_up_for(data: Path, tmp_path: Path) -> None:
    """In the middle of the run, again when it goes on, and in the last evaluation, whose run is not finished then."""
    more = ("train.eval_interval_steps=6", "checkpoint.save_interval_steps=6", "checkpoint.keep_last=3")
    whole, parts = (overrides(data, tmp_path / name, *more) for name in ("whole", "parts"))
    assert train_here(0, whole) == 0
    for number, lines in ((1, 5), (1, 5), (2, 11)):
        assert stopped_in_evaluation(0, parts, number) == 75
        assert [line["step"] for line in metrics(tmp_path / "parts")] == list(range(1, lines + 1))
    last = newest_checkpoint(tmp_path / "parts" / "checkpoints")
    assert last is not None and last.step == 12 and OWED in last.state
    assert not prepare(config_for(parts), 1).is_finished
    assert train_here(0, parts) == 0
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    for step in (6, 12):
        assert checkpoint_bytes(tmp_path / "parts", step) == checkpoint_bytes(tmp_path / "whole", step)
    assert prepare(config_for(parts), 1).is_finished


def test_a_signal_to_one_rank_cuts_short_the_evaluation_of_all(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path / "run", "train.num_steps=4")
    assert run_distributed(2, stopped_in_evaluation, arguments, 1, 1) == [75, 75]
    assert len(metrics(tmp_path / "run")) == 3
    assert run_distributed(2, train_here, arguments) == [0, 0]
    assert len(metrics(tmp_path / "run")) == 4 and "valid/x/loss" in metrics(tmp_path / "run")[-1]


def test_a_question_is_asked_at_the_pace_of_the_work(monkeypatch: Any) -> None:
    clock, asked = [0.0], list[float]()
    monkeypatch.setattr(stopping.time, "perf_counter", lambda: clock[0])
    check = stopping.StopCheck(lambda: bool(asked.append(clock[0])), ParallelContext.single())
    for _ in range(100):
        check.now_and_then()
        clock[0] += 0.05
    assert asked[0] == 0 and 0.45 <= max(b - a for a, b in pairwise(asked)) <= 0.55
