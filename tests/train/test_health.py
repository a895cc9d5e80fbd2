"""Steps that are not finite or spikes: the same decisions after a resume, what is written of them, what is saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hammer.base.errors import NonFiniteError
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.train import health, loop
from megatron_hammer.train.health import Health
from tests.train.runs import checkpoint_bytes, metrics, overrides, train_here


def _noise(steps: int, spikes: tuple[int, ...]) -> list[tuple[float, float]]:
    rng = np.random.default_rng(0)
    loss = 5 - 0.01 * np.arange(steps) + rng.normal(0, 0.05, steps)
    norm = rng.lognormal(0, 0.2, steps)
    for step in spikes:
        loss[step] += 5
    return list(zip(loss.tolist(), norm.tolist(), strict=True))


def test_only_spikes_are_found_and_a_resume_decides_the_same() -> None:
    values = _noise(300, (60, 61, 200))
    whole, found = Health(64, 12.0), []
    for step, (loss, norm) in enumerate(values):
        limits = whole.limits(step)
        if step % 7 == 0:  # a checkpoint, and a run that goes on from it
            resumed = Health(64, 12.0)
            resumed.load(json.loads(json.dumps(whole.to_tree())))
            assert resumed.limits(step) == limits
            whole = resumed
        if whole.take(step, loss, norm, True, limits, False) == "spike":
            found.append(step)
    assert found == [60, 61, 200]


def test_another_phase_has_limits_of_its_own() -> None:
    """Its losses are no spikes for being others; what follows from its own steps is what a resume finds, too."""
    one = Health(64, 12.0)
    for step, (loss, norm) in enumerate(_noise(80, (70,)), start=1):
        loss += 3 if step >= 41 else 0
        if step == 41:
            assert (known := one.limits(41)) is not None and loss > known.loss
            one.begin_anew(41)
        if step == 50:
            tree = json.loads(json.dumps(one.to_tree()))
            one = Health(64, 12.0)
            one.load(tree)
        limits = one.limits(step)
        assert (limits is None) == (step <= 21 or 41 <= step < 62), step
        assert one.take(step, loss, norm, True, limits, False) == ("spike" if step == 71 else "")


def test_what_is_not_finite_and_what_looks_for_a_loss_scale() -> None:
    one = Health(64, 12.0)
    assert one.limits(1) is None
    assert one.take(1, math.nan, 1.0, False, None, False) == "nonfinite" and one.streak == 1
    assert one.take(2, 1.0, math.inf, False, None, False) == "nonfinite" and one.streak == 2
    assert one.take(3, 1.0, math.inf, False, None, True) == "" and (one.streak, one.skips) == (0, 3)
    assert one.take(4, math.inf, math.inf, False, None, True) == "nonfinite" and one.streak == 1
    assert one.take(5, 1.0, 1.0, True, None, False) == "" and (one.streak, one.skips) == (0, 0)
    assert [step for step, *_ in one.recent] == [5]


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, float]]:
    """{step: factor}: a module's output is multiplied in these steps, and when they are looked at again."""
    factors: dict[int, float] = {}
    step_of, hooks = loop.TrainLoop._step, list[Any]()

    def step(run: loop.TrainLoop, number: int) -> Any:
        while hooks:
            hooks.pop().remove()
        if number in factors:
            factor = factors[number]
            where = "layers.1" if math.isnan(factor) else "norm"  # before the last norm, no finite factor counts
            layer = [m for name, m in run.stages[0].named_modules() if name.endswith(where)][-1]

            def multiply(_: Any, __: Any, output: Any) -> Any:
                return tuple(t * factor for t in output) if isinstance(output, tuple) else output * factor

            hooks.append(layer.register_forward_hook(multiply))
        return step_of(run, number)

    monkeypatch.setattr(loop.TrainLoop, "_step", step)
    yield factors


def test_a_step_that_is_not_finite_is_skipped_and_written_down(
    data: Path, tmp_path: Path, spoil: dict[int, float]
) -> None:
    """Nothing is saved while such steps follow each other: the save is made up for after the first good one."""
    spoil |= {6: math.nan, 7: math.nan}
    assert train_here(0, overrides(data, tmp_path / "run", "checkpoint.keep_last=9")) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if line["skipped"]] == [6, 7]
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == [3, 8, 9, 12]
    (incident,) = (tmp_path / "run" / "incidents").iterdir()  # the first of the two
    tree = json.loads(incident.read_text())
    assert (tree["step"], tree["finding"], tree["action"], tree["loss"]) == (6, "nonfinite", "skip", None)
    (rank,) = tree["ranks"]
    assert rank["rank"] == 0 and rank["micro_batch"] == 0 and "layers.1" in rank["module"]
    assert [sample["sample"] for sample in tree["samples"]] == [40, 41] and rank["first_sample"] == 40
    assert tree["samples"][0]["pieces"][0].keys() >= {"document", "offset", "length"}
    assert "recent" in read_manifest(tmp_path / "run" / "checkpoints" / "step-00000012").state["health"]


def test_a_run_that_ends_in_bad_steps_keeps_the_older_checkpoints(
    data: Path, tmp_path: Path, spoil: dict[int, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether or not the disk takes what there is to say of them."""
    spoil |= {11: math.nan, 12: math.nan}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "incidents").write_text("no folder")
    assert train_here(0, overrides(data, tmp_path / "run", "checkpoint.keep_last=2")) == 0
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved == [6, 9, 12]
    assert "incidents/step-00000011.json, which could not be written (File exists)" in capsys.readouterr().out


def test_stop_ends_the_run_with_nothing_saved_of_it(data: Path, tmp_path: Path, spoil: dict[int, float]) -> None:
    spoil |= {6: math.nan}
    with pytest.raises(NonFiniteError, match=r"E902.*step 6: loss=nan.*stop.*see \S+/step-00000006.json; look"):
        train_here(0, overrides(data, tmp_path / "run", "train.on_nonfinite=stop"))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert (tmp_path / "run" / "incidents" / "step-00000006.json").is_file()


def test_stop_names_no_record_that_is_not_there(data: Path, tmp_path: Path, spoil: dict[int, float]) -> None:
    spoil |= {1: math.nan}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "incidents").write_text("no folder")
    with pytest.raises(NonFiniteError, match=r"E902.*see \S+/step-00000001.json, which could not be written \(File ex"):
        train_here(0, overrides(data, tmp_path / "run", "train.on_nonfinite=stop"))


def test_spikes_are_reported_skipped_or_end_the_run(
    data: Path, tmp_path: Path, spoil: dict[int, float], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And looking on changes no bit of a run, nor does reading its numbers one step late."""
    monkeypatch.setattr(health, "SMALLEST_HISTORY", 4)
    more = ("train.spike_z_score=4", "train.eval_interval_steps=12", "checkpoint.save_interval_steps=12")
    spoil |= {9: 100.0}
    for lag, policy in enumerate(("skip", "skip", "report")):
        monkeypatch.setitem(loop.READ_LAG_STEPS, "cpu", lag % 2)
        assert train_here(0, overrides(data, tmp_path / f"{lag}", *more, f"train.on_spike={policy}")) == 0
        lines = metrics(tmp_path / f"{lag}")
        assert [line["step"] for line in lines if line["skipped"]] == ([9] if policy == "skip" else [])
        assert (tmp_path / f"{lag}" / "incidents" / "step-00000009.json").exists() == (policy == "skip")
    assert "step 9" in capsys.readouterr().out
    assert metrics(tmp_path / "0") == metrics(tmp_path / "1")
    assert checkpoint_bytes(tmp_path / "0", 12) == checkpoint_bytes(tmp_path / "1", 12)
    with pytest.raises(NonFiniteError, match=r"E903.*step 9: .*is a spike \(limits"):
        train_here(0, overrides(data, tmp_path / "stop", *more, "train.on_spike=stop"))
