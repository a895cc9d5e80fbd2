"""Starting again: after which failures, how often, with how many ranks; and nothing of a start outlives it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import ConfigError, DataError, HammerError, HangError, ParallelError
from megatron_hammer.config import config_from_tree
from megatron_hammer.supervise import attempt, start
from megatron_hammer.supervise.attempt import Ended
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.restart import Restarts, make_restarts
from megatron_hammer.supervise.watch import Failure

TREE: dict[str, Any] = {
    "model": {"hidden_size": 16, "ffn_hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "vocab_size": 30},
    "train": {"micro_batch_size": 1, "global_batch_size": 8},
}


def died(rank: int) -> Failure:
    return Failure(1, 0, ParallelError(1, f"rank {rank}", "died of SIGKILL", "again"))


def restarts(folder: Path, most: int, fewest: int) -> Restarts:
    tree = TREE | {"train": TREE["train"] | {"output": str(folder)}}
    return Restarts(config_from_tree(tree), most, fewest)


def test_the_same_rank_twice_costs_ranks_and_a_checkpoint_between_does_not(tmp_path: Path) -> None:
    left, node = restarts(tmp_path, 9, 1), Node(8)
    assert left.after(died(3), node) == Node(8)
    assert left.after(died(4), node) == Node(8)
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    assert left.after(died(4), node) == Node(8)
    assert left.after(died(4), node) == Node(4), "7, 6 and 5 do not divide the batch of 8"
    assert restarts(tmp_path, 9, 5)._fewer(Node(8)) == 8, "4 is fewer than allowed"
    assert restarts(tmp_path, 9, 1)._fewer(Node(4, 2)) == 2, "on each of two nodes: 6 do not divide the batch either"


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ParallelError(1, "rank 0", "died", "x"), True),
        (HangError(1, "rank 0", "hung", "x"), True),
        (DataError(1, "a file", "is missing", "x"), False),
    ],
)
def test_what_is_worth_another_start(error: HammerError, again: bool, tmp_path: Path) -> None:
    assert (restarts(tmp_path, 1, 1).after(Failure(0, 0, error), Node(2)) is not None) == again
    assert restarts(tmp_path, 0, 1).after(Failure(0, 0, error), Node(2)) is None


def test_the_launcher_starts_again_and_ends_with_the_last_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes, started = list[Ended](), list[int]()

    def run_ranks(config: object, node: Node, *more: object) -> Ended:
        started.append(node.nproc)
        return outcomes.pop(0)

    monkeypatch.setattr(attempt, "run_ranks", run_ranks)
    outcomes += [Ended(7, died(1), False), Ended(7, died(1), False), Ended(0, None, False)]
    again = restarts(tmp_path, 3, 1)
    assert start.launch(again.config, Node(8), restarts=again) == 0
    assert started == [8, 8, 4]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error[E701]: rank 1 died of SIGKILL")
    assert said[3] == "restart 2 of 3: 4 ranks go on from the last checkpoint"
    outcomes += [Ended(7, died(1), False)] * 2
    assert start.launch(again.config, Node(8), restarts=restarts(tmp_path, 1, 1)) == 7
    outcomes[:] = [Ended(7, died(1), True)]
    assert start.launch(again.config, Node(8), restarts=restarts(tmp_path, 1, 1)) == 7, "a stop signal came too"


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    config = restarts(tmp_path, 0, 1).config
    for most, fewest, node in ((-1, None, Node(2)), (1, 3, Node(2)), (1, 0, Node(2))):
        with pytest.raises(ConfigError, match="E240"):
            make_restarts(config, node, most, fewest)
    assert make_restarts(config, Node(2, 2), 1, None).fewest_ranks == 2


def test_nothing_is_started_beside_a_rank_that_outlives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The launcher ends with the failure's code, without Python's wait for its children."""
    codes = list[int]()

    def leaves(code: int) -> None:
        codes.append(code)
        raise SystemExit

    monkeypatch.setattr(attempt, "run_ranks", lambda *_: Ended(7, died(1), False, ("rank 1: process 5 is there",)))
    monkeypatch.setattr(os, "_exit", leaves)
    again = restarts(tmp_path, 3, 1)
    with pytest.raises(SystemExit):
        start.launch(again.config, Node(8), restarts=again)
    assert codes == [7]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "rank 1: process 5 is there" and said[1].startswith("error[E701]: rank 1 died")


def test_an_orphan_that_outlives_a_kill_is_named_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = attempt.children_of(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as child:
        with monkeypatch.context() as patch:
            patch.setattr(attempt, "KILL_SECONDS", 0.05)
            patch.setattr(os, "kill", lambda pid, number: None)
            (said,) = attempt.end_orphans(before)
        child.kill()
    assert said.startswith(f"process {child.pid} has not ended 10 s after SIGKILL")


def test_orphans_come_to_the_launcher_and_are_ended() -> None:
    before = attempt.children_of(os.getpid())
    attempt.adopt_orphans(True)
    try:
        subprocess.run(["sh", "-c", "(sleep 60 & sleep 60) & exit"], check=True)
        deadline = time.monotonic() + 20
        while not attempt.children_of(os.getpid()) - before:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        attempt.end_orphans(before)
        assert attempt.children_of(os.getpid()) <= before
    finally:
        attempt.adopt_orphans(False)
