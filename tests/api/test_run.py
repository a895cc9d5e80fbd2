"""The Python interface trains as the program does, survives what notebooks do to it, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_hammer as mh
from megatron_hammer.train.loop import TrainLoop
from megatron_hammer.train.run import run_rank
from tests.train.runs import checkpoint_bytes, config_for, metrics, overrides, write_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, documents) in enumerate({"a": 60, "b": 40, "x": 8, "y": 5}.items()):
        write_dataset(folder / name, documents, seed)
    return folder


def program(data: Path, output: Path, *more: str) -> None:
    assert run_rank(config_for(overrides(data, output, *more)), 0, 0, 1, None) == 0


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program makes of the config of these tests."""
    output = tmp_path_factory.mktemp("program") / "run"
    program(data, output)
    return output


def equal(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other) and len(metrics(one)) == 12
    assert checkpoint_bytes(one, 12) == checkpoint_bytes(other, 12)


def test_the_program_goes_on_from_it_bit_for_bit(data: Path, whole: Path, tmp_path: Path) -> None:
    """Five steps in two calls, with looks at the run between them; then the program, to the end."""
    config = mh.load_config("tiny", overrides(data, tmp_path / "run"))
    assert config == config_for(overrides(data, tmp_path / "run"))
    with mh.open_run(config) as run:
        (batch, *_) = run.batches()
        assert batch.tokens.shape == (2, 32) and batch.tokens.dtype == torch.int64
        first = run.step()
        assert torch.equal(run.batches()[0].tokens, run.batches()[0].tokens), "looking consumes nothing"
        assert run.logits(batch.tokens[:, :5]).shape == (2, 5, 301)
        assert set(run.evaluate()) == {"x", "y"} and set(run.evaluate("x", samples=1)) == {"x"}
        lines = [first, *run.train(4)]
        assert run.evaluate({"new": data / "y"})["new"] == run.evaluate("y")["y"]
        assert run.save().name == "step-00000005" == run.save().name and run.steps_done == 5
        assert "step 5 of 12" in repr(run) and lines == run.lines
    expected = metrics(whole)[:5]
    assert [{key: line[key] for key in expected[i]} for i, line in enumerate(lines)] == expected
    program(data, tmp_path / "run")
    equal(tmp_path / "run", whole)


def test_it_goes_on_from_the_program_and_looks_at_the_end(data: Path, whole: Path, tmp_path: Path) -> None:
    config = mh.load_config("tiny", overrides(data, tmp_path / "run"))
    program(data, tmp_path / "run", "train.num_steps=4", "schedule.decay_steps=12")
    with mh.open_run(config) as run:
        assert run.steps_done == 4 and len(run.train()) == 8 and run.is_finished
    equal(tmp_path / "run", whole)
    with mh.open_run(config) as run:
        assert run.is_finished and run.train() == [] and run.save().name == "step-00000012"
        assert run.evaluate("x")["x"].loss == metrics(whole)[-1]["valid/x/loss"]
        with pytest.raises(mh.ConfigError, match=r"E225.*train.num_steps=12: 12 steps are done.*train.num_steps=13"):
            run.step()


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, times: int) -> None:
    """Ctrl-C so many times in the middle of a step."""
    real = TrainLoop._step

    def stopped(run: TrainLoop, at: int) -> Any:
        for _ in range(times if at == step else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, at)

    monkeypatch.setattr(TrainLoop, "_step", stopped)


def test_an_interrupt_ends_after_the_step_and_costs_nothing(
    data: Path, whole: Path, tmp_path: Path, monkeypatch
) -> None:
    interrupt(monkeypatch, 4, 1)  # which evaluates, too: that is made up for
    before = signal.getsignal(signal.SIGINT)
    with mh.open_run(mh.load_config("tiny", overrides(data, tmp_path / "run"))) as run:
        with pytest.raises(mh.Interrupted, match=r"step 4 is complete.*train\(\) goes on") as caught:
            run.train()
        assert issubclass(mh.Interrupted, KeyboardInterrupt) and signal.getsignal(signal.SIGINT) is before
        assert caught.value._render_traceback_()[0].startswith("interrupted: step 4")
        assert len(run.train()) in (8, 9), "the line of a step whose evaluation was cut short comes with the next call"
    equal(tmp_path / "run", whole)


def test_an_error_in_a_step_closes_the_run_and_gives_the_lock_back(data: Path, whole: Path, tmp_path: Path) -> None:
    """Ctrl-C twice, then an error of the machine; each time the same kernel goes on from the newest checkpoint."""
    config = mh.load_config("tiny", overrides(data, tmp_path / "run"))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 5, 2)
        run = mh.open_run(config)
        with pytest.raises(mh.RefusedError, match=r"E581.*this very process holds it: close that run first"):
            mh.open_run(config)
        with pytest.raises(KeyboardInterrupt):
            run.train()
        with pytest.raises(
            mh.RefusedError, match=r"E545.*is closed, since a step ended with KeyboardInterrupt; open it"
        ):
            run.save()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "next_batches", lambda run: (_ for _ in ()).throw(OSError(5, "broken", "disk")))
        again = mh.open_run(config)
        assert again.steps_done == 3
        with pytest.raises(mh.DiskError, match=r"E601.*disk"):
            again.train(1)
        assert "E601" in repr(again)
    forgotten = mh.open_run(config)
    del forgotten
    found = list[int]()
    thread = threading.Thread(target=lambda: found.append(len(mh.open_run(config).train())))  # gets no signals
    thread.start()
    thread.join()
    assert found == [9]
    for reader in (thread for thread in threading.enumerate() if thread.name == "read-ahead_0"):
        reader.join(60)  # it was told to end, and ends when it is given a core
        assert not reader.is_alive()
    equal(tmp_path / "run", whole)


WRONG = [
    (lambda run, data: run.evaluate("z"), r"evaluate\('z'\) is no set of data.valid; use x, y; or name a dataset"),
    (lambda run, data: run.evaluate({"z": data / "no"}), r"E3\d\d.*no"),
    (lambda run, data: run.train(0), r"train\(steps=0\) must be a whole number from 1"),
    (lambda run, data: run.train(2.0), r"train\(steps=2.0\) must be a whole number"),
    (lambda run, data: run.train(20), r"train\(steps=20\) goes beyond train.num_steps=12: 1 steps are done"),
    (lambda run, data: run.logits(torch.zeros(1, 4)), r"type torch.float32\) is no batch of ids; give \[b, s\]"),
    (lambda run, data: run.logits([1, 2]), r"shape \(2,\)"),
    (lambda run, data: run.logits([[301]]), r"logits\(id 301\) is not in \[0, 301\)"),
    (lambda run, data: run.generate("a"), r"E207.*tokenizer.path is not set"),
    (lambda run, data: run.text_model(dtype="int8"), r"E207"),
    (lambda run, data: run.logits("abc"), r"logits\(tokens\) takes a batch of ids .*give \[b, s\]"),
    (lambda run, data: run.logits([[1, 2], [3]]), r"takes a batch of ids"),
    (lambda run, data: run.evaluate("x", samples=0), r"evaluate\(samples=0\) must be at least 1"),
    (lambda run, data: run.evaluate(3), r"evaluate\(3\) names no set; use x, y"),
    (lambda run, data: run.generate([1, 2]), r"generate\(1\) is no text; give texts"),
    (lambda run, data: run.generate("a", {"top_k": 1}), r"is no Sampling, or not alone; give Sampling\(temp"),
    (lambda run, data: run.generate("a", max_tokens=3), r"max_tokens=...\) is no setting of Sampling; use max_new_tok"),
    (lambda run, data: run.generate("a", temperature=-1), r"E245.*temperature=-1"),
    (lambda run, data: run.export(data / "hf", tokenizer="x"), r"tokenizer='x' is none of exact, as-is, none"),
    (lambda run, data: mh.train_tokenizer("zh.jsonl", data, 300), r"E262.*is no corpus; give TextCorpus"),
    (lambda run, data: mh.load_config({"model": {}}), r"E206.*is no path of a YAML file; give a file or a preset"),
    (lambda run, data: mh.load_config("tiny", None), r"E201.*None are no settings; give"),
    (lambda run, data: run.export(data / "hf", dtype="int8"), r"dtype='int8' is none of float32"),
    (lambda run, data: mh.open_run("tiny"), r"open_run\('tiny'\) is no Config; give what load_config returns"),
    (lambda run, data: mh.open_run(mh.change_config(run.config, "train.dry_run=true")), r"print\(dry_run\(config\)\)"),
    (lambda run, data: mh.load_config("tinny"), r"did you mean .*examples/configs/tiny.yaml\?"),
    (lambda run, data: mh.load_config("nothing"), "name an existing YAML file, such as .*tiny.yaml"),
    (lambda run, data: mh.load_config("tiny", {"train.steps": 3}), "E202.*train.num_steps"),
    (lambda run, data: mh.load_config("tiny", {"precision": "bf16"}), "E201.*train.precision"),
    (lambda run, data: mh.load_config("tiny", {"train.precision": torch.bfloat16}), "E203.*bf16"),
    (lambda run, data: mh.load_config("tiny", [("train.num_steps", 3)]), "E201.*give a mapping"),
]  # fmt: skip


def test_mistakes_are_one_line_with_their_cure_and_harm_nothing(data: Path, tmp_path: Path) -> None:
    with mh.open_run(mh.load_config("tiny", overrides(data, tmp_path / "run"))) as run:
        run.step()
        for mistake, line in WRONG:
            with pytest.raises(mh.HammerError, match=line) as caught:
                mistake(run, data)
            assert caught.value._render_traceback_() == [str(caught.value)]
        assert run.train(1)[0]["step"] == 2
    with pytest.raises(mh.RefusedError, match=r"E545.* is closed; open it again"):
        run.step()
    run.close()
