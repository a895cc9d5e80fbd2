"""The loop itself: when it reads what a step found."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.train import loop
from tests.train.runs import checkpoint_bytes, metrics, overrides, train_here


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reading_a_step_later_changes_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """What a GPU's loop does, on a CPU: each step is read when the next has been launched (but for those that save or
    evaluate), and every line and every byte of the checkpoints is the same; in fp16 with steps that are skipped.
    """
    outputs, waiting = (tmp_path / "at once", tmp_path / "later"), set[int]()
    read = loop.Run._read

    def noted(run: loop.Run, lag: int, *more: object) -> bool:
        stopped = read(run, lag, *more)
        waiting.add(len(run.pending))
        return stopped

    monkeypatch.setattr(loop.Run, "_read", noted)
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
