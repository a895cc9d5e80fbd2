"""The loop itself: when it reads what a step found."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.train import loop
from tests.train.runs import checkpoint_bytes, metrics, overrides, train_here, write_fim_tokenizer


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reading_a_step_later_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """What a GPU's loop does, on a CPU: each step is read when the next has been launched (but for those that save or
    evaluate), and every line and every byte of the checkpoints is the same; in fp16 with steps that are skipped.
    """
    outputs, waiting = (tmp_path / "at once", tmp_path / "later"), set[int]()
    read = loop.TrainLoop._read

    def noted(run: loop.TrainLoop, lag: int, *more: object) -> bool:
        stopped = read(run, lag, *more)
        waiting.add(len(run.pending))
        return stopped

    monkeypatch.setattr(loop.TrainLoop, "_read", noted)
    for lag, output in enumerate(outputs):
        monkeypatch.setitem(loop.READ_LAG_STEPS, "cpu", lag)
        waiting.clear()
        scaling = ("optimizer.initial_loss_scale=4194304", "optimizer.loss_scale_window=2")
        more = (f"train.precision={precision}", *scaling, "checkpoint.keep_last=4")
        assert train_here(0, overrides(data, output, *more)) == 0
        assert waiting == {0, lag}
    at_once, later = (metrics(output) for output in outputs)
    assert at_once == later and len(later) == 12
    assert any(line["skipped"] for line in later) == (precision == "fp16")
    for step in (3, 6, 9, 12):
        written = checkpoint_bytes(outputs[0], step)
        assert written and written == checkpoint_bytes(outputs[1], step)
        one, other = (read_manifest(o / "checkpoints" / f"step-{step:08d}") for o in outputs)
        assert one.state == other.state and one.state["consumed_samples"] == 8 * step


def test_a_run_with_fill_in_the_middle_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """Cuts and forms are those of the sample, whenever it is read: stopped after 2 of 4 steps, and never stopped."""
    write_fim_tokenizer(tmp_path / "tokenizer")
    fim = f"data.fim={{{data}/a: {{rate: 0.9}}}}"
    more = (f"tokenizer.path={tmp_path}/tokenizer", "checkpoint.save_interval_steps=2", "schedule.decay_steps=4",
            "data.valid=null")  # fmt: skip
    for name, steps, what in (
        ("whole", 4, fim),
        ("stopped", 2, fim),
        ("stopped", 4, fim),
        ("plain", 2, "data.fim=null"),
    ):
        assert train_here(0, overrides(data, tmp_path / name, *more, f"train.num_steps={steps}", what)) == 0
    whole = metrics(tmp_path / "whole")
    assert len(whole) == 4 and whole == metrics(tmp_path / "stopped")
    assert checkpoint_bytes(tmp_path / "whole", 4) == checkpoint_bytes(tmp_path / "stopped", 4)
    plain = metrics(tmp_path / "plain")
    assert all(line["loss"] != other["loss"] for line, other in zip(whole[:2], plain, strict=True)), "it was at work"
