"""One writer in an output folder, whatever happens to its lock; and what kills leave there goes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from megatron_hammer.base.errors import CheckpointError, RefusedError
from megatron_hammer.train.output import clear_output, only_writer
from megatron_hammer.train.prepare import prepare
from megatron_hammer.train.run import run_rank
from tests.train.runs import config_for, overrides


def test_a_second_run_is_refused_even_where_the_lock_was_deleted(tmp_path: Path) -> None:
    with only_writer(tmp_path / "run") as held:
        held.check()
        for _ in range(2):
            with pytest.raises(RefusedError, match=r"E581.*in use"), only_writer(tmp_path / "run"):
                pass
            (tmp_path / "run" / ".lock").unlink(missing_ok=True)
        with pytest.raises(RefusedError, match=r"E587.*\.lock was deleted"):
            held.check()
    with only_writer(tmp_path / "run"):
        pass


@pytest.mark.parametrize("make", ["link", "pipe", "folder"])
def test_a_lock_that_is_something_else_is_refused_and_untouched(tmp_path: Path, make: str) -> None:
    precious, lock = tmp_path / "precious", tmp_path / ".lock"
    precious.write_text("precious")
    {"link": lambda: lock.symlink_to(precious), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[make]()
    with pytest.raises(RefusedError, match=r"E587.*\.lock.*where the lock of the run belongs"), only_writer(tmp_path):
        pass
    assert precious.read_text() == "precious"


def test_a_folder_that_another_start_has_made_meanwhile_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(RefusedError, match=r"E581"), only_writer(tmp_path / "run", is_new=True):
        pass


def test_the_content_of_a_lock_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("4711\n")
    with only_writer(tmp_path):
        assert (tmp_path / ".lock").read_text() == "4711\n"


@pytest.mark.parametrize("how", ["deleted", "replaced", "moved"])
def test_a_folder_that_went_away_is_noticed(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    with only_writer(run) as held:
        run.rename(tmp_path / "moved")
        if how == "deleted":
            shutil.rmtree(tmp_path / "moved")
        if how == "replaced":
            shutil.copytree(tmp_path / "moved", run)
        with pytest.raises(RefusedError, match=rf"E587.*{run}"):
            held.check()


def test_nothing_is_saved_into_a_folder_that_went_away(data: Path, tmp_path: Path, monkeypatch) -> None:
    """It is not made again either: the run ends with the reason."""
    run = tmp_path / "run"
    config = config_for(overrides(data, run, "train.num_steps=1", "data.valid=null"))
    monkeypatch.setattr("megatron_hammer.train.loop.TrainLoop._collect_garbage", lambda self: None)
    monkeypatch.setattr("megatron_hammer.metrics.metrics_file.MetricsFile.sync", lambda self: shutil.rmtree(run))
    with pytest.raises(RefusedError, match=r"E587.*was deleted, moved or replaced"):
        run_rank(config, 0, 0, 1, None)
    assert not run.exists()


def test_names_are_durable_before_the_first_checkpoint(data: Path, tmp_path: Path, monkeypatch) -> None:
    """The output folder and the one above it are synced, and after a file in it has got its name."""
    run, synced, sync = tmp_path / "run", list[str](), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    assert run_rank(config_for(overrides(data, run, "train.num_steps=1", "data.valid=null")), 0, 0, 1, None) == 0
    above, first, *_ = (at for at, path in enumerate(synced) if path in (str(tmp_path), str(run)))
    assert [synced[above], synced[first]] == [str(tmp_path), str(run)]
    metrics = next(at for at, path in enumerate(synced) if "metrics.jsonl.tmp-" in path)
    staged = next(at for at, path in enumerate(synced) if path.endswith("rank-00000.safetensors"))
    assert str(run) in synced[metrics:staged], "metrics.jsonl has its name"
    assert str(run / "metrics.jsonl") in synced[metrics:staged], "and all its lines"
    assert str(run) in synced[staged:], "so has .saved, after the commit"


@pytest.mark.parametrize("make", ["file", "dangling link"])
def test_checkpoints_that_are_no_folder_end_the_start(data: Path, tmp_path: Path, make: str) -> None:
    """Not the first save, and not in a silent new start: what it leads to may be on a disk that is not there."""
    run = tmp_path / "run"
    run.mkdir()
    place = run / "checkpoints"
    place.write_text("") if make == "file" else place.symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=r"E401.*checkpoints is not a folder"):
        run_rank(config_for(overrides(data, run, "train.num_steps=1")), 0, 0, 1, None)


def test_a_run_that_never_had_a_checkpoint_begins_again(data: Path, tmp_path: Path, monkeypatch) -> None:
    """However many steps it has done: its saves may have failed, and it may have been told to go on."""
    run = tmp_path / "run"
    arguments = overrides(data, run, "train.num_steps=2", "data.valid=null", "checkpoint.save_interval_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_hammer.train.loop.TrainLoop._save", lambda self, last: None)
        assert run_rank(config_for(arguments), 0, 0, 1, None) == 0
    assert not (run / "checkpoints").exists() and len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert run_rank(config_for(arguments), 0, 0, 1, None) == 0
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match=r"E586"):
        run_rank(config_for(arguments), 0, 0, 1, None)


def test_what_kills_leave_goes_at_every_start(data: Path, tmp_path: Path) -> None:
    """Also at that of a finished run. What a save has replaced is kept, or comes back."""
    run = tmp_path / "run"
    arguments = overrides(data, run, "train.num_steps=1", "data.valid=null")
    assert run_rank(config_for(arguments), 0, 0, 1, None) == 0
    (run / "checkpoints" / "step-00000009.tmp-abc").mkdir()
    (run / "checkpoints" / "step-00000009.tmp-abcd").write_text("x")
    (run / "checkpoints" / "step-00000001.old-1234567890abcdef").mkdir()
    (run / "incidents").mkdir()
    (run / "trackers").mkdir()
    (run / "report.html.tmp-1").write_text("tools/report.py is writing it now")
    for name in ("metrics.jsonl", "starts.jsonl", "ledger.jsonl", "generations.jsonl", "evaluations.jsonl", ".saved",
                 "trackers/wandb.json", "trackers/prometheus.json",
                 "incidents/step-00000003.metrics.jsonl", "incidents/step-00000003-after-1-rewinds.json"):  # fmt: skip
        (run / f"{name}.tmp-77").write_text("x")
    (run / f".probe-{'0' * 32}").write_text("")
    (run / "notes.tmp-1").write_text("somebody's")
    assert run_rank(config_for(arguments), 0, 0, 1, None) == 0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "step-00000001", "step-00000001.aside-1234567890abcdef"
    ]  # fmt: skip
    assert sorted(p.name for p in run.iterdir()) == [".lock", ".saved", "checkpoints", "incidents", "metrics.jsonl",
                                                      "notes.tmp-1", "report.html.tmp-1", "starts.jsonl",
                                                      "trackers"]  # fmt: skip
    assert clear_output(run) == [] == list((run / "incidents").iterdir()) == list((run / "trackers").iterdir())


def test_a_finished_run_says_so_from_a_folder_that_nobody_may_write_to(data: Path, tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "run"
    arguments = overrides(data, run, "train.num_steps=1", "data.valid=null")
    assert run_rank(config_for(arguments), 0, 0, 1, None) == 0

    def forbidden(folder: Path, is_new: bool) -> None:
        raise PermissionError(13, "Permission denied", str(folder / ".lock"))

    monkeypatch.setattr("megatron_hammer.train.begin.only_writer", forbidden)
    assert run_rank(config_for(arguments), 0, 0, 1, None) == 0
    assert prepare(config_for(arguments), 1).is_finished
