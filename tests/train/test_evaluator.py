"""``train.evaluator``: checkpoints are evaluated beside the run, and nothing that happens there touches its bits."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.config import Config
from megatron_hammer.evaluation import checkpoint_process
from megatron_hammer.metrics.reporter import Reporter
from megatron_hammer.train import evaluator as evaluator_module
from megatron_hammer.train.evaluator import EVALUATIONS, Evaluator
from tests.train.runs import checkpoint_bytes, config_for, metrics, overrides, train_here

FEW = (
    "train.num_steps=4",
    "checkpoint.save_interval_steps=2",
    "train.eval_interval_steps=2",
    "schedule.decay_steps=12",
)
ANSWER = "train.evaluator.command=[sh, -c, 'echo {\\\"acc\\\": {step}}']"


def evaluated(output: Path) -> dict[int, dict[str, Any]]:
    """Step -> its line."""
    lines = [json.loads(line) for line in (output / EVALUATIONS).read_text().splitlines()]
    return {line.pop("step"): line for line in lines}


def checkpoint(output: Path, step: int) -> Path:
    return output / "checkpoints" / f"step-{step:08d}"


class Listener:
    """What an evaluator tells the run."""

    def __init__(self) -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.warnings: list[str] = []

    def evaluator(self, config: Config, start: Path | None = None) -> Evaluator:
        return Evaluator(config, start, self.lines.append, self.warnings.append)


def settle(evaluator: Evaluator) -> None:
    """As the loop does at each step, until nothing is at work."""
    evaluator.poll()
    while evaluator._process is not None:
        time.sleep(0.01)
        evaluator.poll()


def config_of(data: Path, output: Path, *more: str) -> Config:
    output.mkdir(exist_ok=True)
    return config_for(overrides(data, output, "train.evaluator.finish_seconds=30", *more))


def test_training_has_the_same_bits_whatever_becomes_of_it(data: Path, tmp_path: Path) -> None:
    """Without an evaluator; with one that answers, one that hangs, one that is killed and has no files."""
    assert train_here(0, overrides(data, tmp_path / "alone", *FEW)) == 0
    (tmp_path / "killed" / EVALUATIONS).mkdir(parents=True)
    (tmp_path / "killed" / "evaluator.log").mkdir()
    cases = {
        "answers": [ANSWER],
        "hangs": ["train.evaluator.command=[sleep, '600']", "train.evaluator.finish_seconds=0"],
        "killed": ["train.evaluator.command=[sh, -c, 'kill -9 $PPID']"],
    }
    for name, more in cases.items():
        began = time.monotonic()
        assert train_here(0, overrides(data, tmp_path / name, *FEW, *more)) == 0
        assert time.monotonic() - began < 300, "nobody waited for what hangs"
        assert metrics(tmp_path / name) == metrics(tmp_path / "alone")
        for step in (2, 4):
            assert checkpoint_bytes(tmp_path / name, step) == checkpoint_bytes(tmp_path / "alone", step)
    assert evaluated(tmp_path / "answers")[4] == {"evaluation/acc": 4.0}
    assert not (tmp_path / "hangs" / EVALUATIONS).exists()


def test_our_own_figures_of_a_checkpoint_are_those_of_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process's own main, in this process: it reads the committed checkpoint and appends one line."""
    output = tmp_path / "run"
    assert train_here(0, overrides(data, output, *FEW, "train.evaluator=null")) == 0
    monkeypatch.setattr(checkpoint_process, "die_with_parent", lambda parent: None)
    niced: list[int] = []
    monkeypatch.setattr(os, "nice", niced.append)
    task = {
        "checkpoint": str(checkpoint(output, 4)), "step": 4, "results": str(output / EVALUATIONS), "parent": 1,
        "sets": {"x": f"{data}/x", "y": f"{data}/y"}, "samples": 10, "command": None, "device": "cpu", "threads": 1,
        "nice": 7, "prompts": ["今"], "new_tokens": 5,
    }  # fmt: skip
    told: list[object] = []
    monkeypatch.setattr(checkpoint_process, "write_generations", lambda *given: told.extend(given))
    monkeypatch.setattr(sys, "argv", ["checkpoint_process", json.dumps(task)])
    assert checkpoint_process.main() == 0 and niced == [7]
    assert told == [str(checkpoint(output, 4)), 4, ["今"], output, 5, "cpu"]
    found, last = evaluated(output)[4], metrics(output)[-1]
    for name in ("x", "y"):
        assert found[f"evaluation/{name}/loss"] == last[f"valid/{name}/loss"]
        assert found[f"evaluation/{name}/perplexity"] == last[f"valid/{name}/perplexity"]
        assert found[f"evaluation/{name}/bits_per_byte"] is None  # there is no tokenizer


def test_one_at_a_time_and_the_newest_waits(data: Path, tmp_path: Path) -> None:
    """Steps that are no multiple of the interval are left alone; the last is evaluated in any case."""
    output, heard = tmp_path / "run", Listener()
    more = [ANSWER, "train.evaluator.interval_steps=6"]
    with heard.evaluator(config_of(data, output, *more)) as evaluator:
        for step in (3, 6, 9, 12):
            evaluator.committed(checkpoint(output, step))
    assert [line["step"] for line in heard.lines] == [6, 12] and heard.warnings == []
    assert list(evaluated(output)) == [6, 12]
    more = ["train.evaluator.command=[sh, -c, 'sleep 600']"]
    with heard.evaluator(config_of(data, tmp_path / "slow", *more)) as evaluator:
        for step in (3, 6, 9):
            evaluator.committed(checkpoint(tmp_path / "slow", step))
        assert ["step-00000006 is not evaluated" in text for text in heard.warnings] == [True]
        process = evaluator._process
    assert process is not None and process.poll() is not None, "it ends with the run"


@pytest.mark.parametrize(
    "command, said",
    [
        ("[sh, -c, 'echo no room >&2; exit 5']", "E367"),
        ("[sh, -c, 'echo 1; echo not JSON']", "E367"),
        ("[sh, -c, 'kill -9 $PPID']", "was ended by signal 9"),
        ("[/no/such/program]", "no/such/program"),
    ],
)
def test_a_failure_costs_one_evaluation_and_a_warning(command: str, said: str, data: Path, tmp_path: Path) -> None:
    heard = Listener()
    with heard.evaluator(config_of(data, tmp_path / "run", f"train.evaluator.command={command}")) as evaluator:
        evaluator.committed(checkpoint(tmp_path / "run", 3))
        settle(evaluator)
    (warning,) = heard.warnings
    assert said in warning and "the evaluation of step-00000003" in warning and "tools/evaluate.py" in warning
    assert heard.lines == []


def test_one_that_cannot_be_killed_holds_nobody_up(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an uninterruptible sleep, on a file system that does not answer."""
    kill, heard = os.killpg, Listener()
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    monkeypatch.setattr(evaluator_module, "_KILL_SECONDS", 0.01)
    more = ["train.evaluator.command=[sleep, '60']"]
    with heard.evaluator(config_of(data, tmp_path / "run", *more)) as evaluator:
        evaluator.committed(checkpoint(tmp_path / "run", 3))
        process = evaluator._process
    assert process is not None and process.poll() is None
    kill(process.pid, signal.SIGKILL)
    process.wait()


def test_one_that_takes_too_long_is_ended(data: Path, tmp_path: Path) -> None:
    heard = Listener()
    more = ["train.evaluator.command=[sleep, '600']", "train.evaluator.timeout_seconds=0.01"]
    with heard.evaluator(config_of(data, tmp_path / "run", *more)) as evaluator:
        evaluator.committed(checkpoint(tmp_path / "run", 3))
        settle(evaluator)
    assert "took longer than 0.01 s" in heard.warnings[0]


def test_a_run_that_goes_on_cuts_back_and_makes_up_for_what_is_missing(data: Path, tmp_path: Path) -> None:
    output, heard = tmp_path / "run", Listener()
    config = config_of(data, output, ANSWER)
    (output / EVALUATIONS).write_text('{"step": 3, "evaluation/acc": 1.0}\n{"step": 9, "evaluation/acc": 2.0}\n')
    with heard.evaluator(config, checkpoint(output, 6)) as evaluator:
        settle(evaluator)
    assert list(evaluated(output)) == [3, 6] and [line["step"] for line in heard.lines] == [6]
    with heard.evaluator(config, checkpoint(output, 6)) as evaluator:
        assert evaluator._process is None, "its line is there"


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / EVALUATIONS
    checkpoint_process.append_line(path, {"step": 1, "a": 1.0})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "a"')  # a killed process
    checkpoint_process.append_line(path, {"step": 3, "a": 1.0})
    whole = path.read_bytes()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [1, 3]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint_process.append_line(path, {"step": 4, "a": 1.0})
    assert path.read_bytes() == whole


def test_results_reach_board_and_trackers_in_order(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The board at the checkpoint's step; trackers at the present one, as W&B takes no step that is over."""
    config = config_of(data, tmp_path / "run")
    with Reporter(config, 0, (1.0, 1.0), None, 1) as reporter:
        sent: list[Mapping[str, Any]] = []
        monkeypatch.setattr(reporter.trackers, "log", sent.append)
        board = type("Board", (), {"scalars": [], "log_dir": str(tmp_path), "close": lambda self: None})()
        board.add_scalar = lambda key, value, step: board.scalars.append((key, value, step))
        reporter.board = board
        line = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens_per_second": 1.0, "skipped": False}
        reporter.step({"step": 5, **line}, {})
        reporter.evaluation({"step": 3, "evaluation/x/loss": 2.5, "evaluation/x/bits_per_byte": None})
        reporter.step({"step": 6, **line}, {})
    assert [entry["step"] for entry in sent] == [5, 5, 6]
    assert sent[1] == {"step": 5, "evaluation/step": 3, "evaluation/x/loss": 2.5, "evaluation/x/bits_per_byte": None}
    assert ("evaluation/x/loss", 2.5, 3) in board.scalars
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2, "metrics.jsonl has steps alone"


@pytest.mark.parametrize(
    "more, said",
    [
        (["train.evaluator.interval_steps=4"], "must be a multiple of checkpoint.save_interval_steps=3"),
        (["train.evaluator.nice=20"], "must be at most 19"),
        (["train.evaluator.new_tokens=0"], "must be at least 1"),
        (["train.evaluator.device=tpu"], "must be cpu, cuda or cuda:N"),
        (["train.evaluator.command=[x]", "train.evaluator.samples=3"], "stands in the place of"),
        (["train.evaluator.timeout_seconds=0"], "must be a positive number"),
        (["train.evaluator={}", "data.valid=null"], "has nothing to evaluate on"),
    ],
)
def test_what_is_refused_at_the_start(more: list[str], said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        config_for(overrides(data, tmp_path / "run", *more)).validate(1)


def test_the_command_is_told_what_to_evaluate(tmp_path: Path) -> None:
    script = 'import sys, json; print("hello"); print(json.dumps({"n": len(sys.argv[1]), "step": int(sys.argv[2])}))'
    task = {"command": [sys.executable, "-c", script, "{checkpoint}", "{step}"], "checkpoint": "/a/b", "step": 7}
    assert checkpoint_process.run_command(task) == {"evaluation/n": 4.0, "evaluation/step": 7.0}
    with pytest.raises(DataError, match="E367"):
        checkpoint_process.run_command(task | {"command": ["true"]})
