"""Committing, finding, replacing and pruning: a crash anywhere leaves old, or old and new; never less, never half."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import pytest

from megatron_hammer.base.errors import CheckpointError, DiskError
from megatron_hammer.checkpoint import retention
from megatron_hammer.checkpoint.folder import (
    checkpoint_of_step,
    clean_up,
    find_checkpoints,
    newest_checkpoint,
    open_checkpoint,
    step_name,
)
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.checkpoint.retention import LAST_TWO, KnownCheckpoints, Retention, prune
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.parallel.context import ParallelContext
from tests.checkpoint.layouts import FakeTokenizer, config_tree, random_logical, rank_shards, tiny_model, write_layout

MODEL = tiny_model(hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=33)


def save_step(folder: Path, step: int, seed: int = 0, keep_last: int = 2, known=None) -> Path:
    shards = rank_shards(MODEL, 0, 1, 1, random_logical(MODEL, seed))
    return save_checkpoint(folder, step, shards, model=MODEL, config_tree=config_tree(MODEL), state={"seed": seed},
                           tokenizer=FakeTokenizer(), ctx=ParallelContext.single(), retention=Retention(keep_last),
                           known=known)  # fmt: skip


def steps(folder: Path) -> list[int]:
    return [read_manifest(p).step for p in find_checkpoints(folder)]


def break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def test_the_last_ones_are_kept_and_never_fewer_than_two(tmp_path):
    run = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30, 40):
        save_step(run, step, keep_last=1)
        assert steps(run) == [s for s in (step - 10, step) if s]
    save_step(run, 50, keep_last=3)
    assert steps(run) == [30, 40, 50]
    assert sorted(p.name for p in run.iterdir()) == [step_name(s) for s in (30, 40, 50)]


def count_reads(monkeypatch) -> list[str]:
    """Names of the checkpoints whose manifests are read from now on."""
    read, original = [], retention.read_manifest
    monkeypatch.setattr(retention, "read_manifest", lambda path: read.append(Path(path).name) or original(path))
    return read


def test_a_save_reads_no_manifest_that_is_known(tmp_path, monkeypatch):
    """Of what the run has written or read itself nothing is read again; what was there before it, once."""
    for step in (10, 20, 30):
        save_step(tmp_path, step, keep_last=9)
    read, known = count_reads(monkeypatch), KnownCheckpoints()
    for step in (40, 50, 60, 70):
        save_step(tmp_path, step, keep_last=4, known=known)
    assert steps(tmp_path) == [40, 50, 60, 70]
    assert read == [step_name(20), step_name(30)] or read == [step_name(30), step_name(20)]


def test_what_is_known_of_a_checkpoint_ends_when_it_is_written_again(tmp_path, monkeypatch):
    known, told = KnownCheckpoints(), []
    for step in (10, 20, 30):
        save_step(tmp_path, step, keep_last=3, known=known)
    break_manifest(tmp_path / step_name(20))
    read = count_reads(monkeypatch)
    for _ in range(2):
        prune(tmp_path, LAST_TWO, told.append, known)
        assert [p.name for p in find_checkpoints(tmp_path)] == [step_name(s) for s in (10, 20, 30)]
    assert read == [step_name(20)] and len(told) == 1 and "E403" in told[0], "the broken one is read and told once"


def test_unreadable_checkpoints_do_not_count_as_kept(tmp_path):
    for step in (10, 20, 30, 40):
        write_layout(tmp_path, MODEL, random_logical(MODEL), step=step)
    break_manifest(tmp_path / step_name(40))
    break_manifest(tmp_path / step_name(20))
    told: list[str] = []
    prune(tmp_path, LAST_TWO, told.append)
    assert [p.name for p in find_checkpoints(tmp_path)] == [step_name(s) for s in (10, 20, 30, 40)]
    assert len(told) == 2 and step_name(40) in told[0]
    write_layout(tmp_path, MODEL, random_logical(MODEL), step=50)
    prune(tmp_path, LAST_TWO, told.append)
    assert [p.name for p in find_checkpoints(tmp_path)] == [step_name(s) for s in (30, 40, 50)]


def test_the_latest_is_found_by_looking_and_what_is_skipped_is_told(tmp_path):
    run = tmp_path / "run"
    assert newest_checkpoint(run) is None
    for step in (99, 100, 100_000_000):
        write_layout(run / "checkpoints", MODEL, random_logical(MODEL), step=step)
    (run / "checkpoints" / "step-00000200.tmp-0000000000000a1b").mkdir()
    (run / "checkpoints" / "step-00000300").symlink_to(run / "checkpoints" / step_name(99))
    (run / "checkpoints" / "notes").mkdir()
    told: list[str] = []
    newest = run / "checkpoints" / step_name(100_000_000)
    assert newest_checkpoint(run, told.append).folder == newest_checkpoint(run / "checkpoints").folder == newest
    for meant in (run, run / "checkpoints", newest):
        assert open_checkpoint(meant).folder == newest
    assert told == []
    break_manifest(newest)
    assert newest_checkpoint(run, told.append).folder == run / "checkpoints" / step_name(100)
    assert len(told) == 1 and str(newest) in told[0] and "E403" in told[0]
    for path in find_checkpoints(run):
        break_manifest(path)
    with pytest.raises(CheckpointError, match="3 checkpoints, none with a readable"):
        newest_checkpoint(run, told.append)


def test_what_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"E401.*nowhere is not there; name a checkpoint"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"E401.*holds no checkpoint"):
        open_checkpoint(tmp_path)
    staging = tmp_path / "step-00000007.tmp-0000000000000123"
    write_layout(tmp_path, MODEL, random_logical(MODEL)).folder.rename(staging)
    with pytest.raises(CheckpointError, match=r"E402.*never committed"):
        open_checkpoint(staging)


def test_replacing_keeps_the_old_when_the_rename_fails(tmp_path, monkeypatch):
    run = tmp_path / "checkpoints"
    save_step(run, 10, seed=1)
    original, calls = os.rename, []

    def failing(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(5, "Input/output error", str(a))
        original(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(DiskError, match=r"E601.*Input/output"):
        save_step(run, 10, seed=2)
    monkeypatch.undo()
    assert [read_manifest(p).state["seed"] for p in find_checkpoints(run)] == [1]
    assert [p.name for p in run.iterdir()] == [step_name(10)]


def test_a_disk_that_fills_while_writing_leaves_nothing(tmp_path, monkeypatch):
    run = tmp_path / "checkpoints"
    save_step(run, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(DiskError, match=r"E601.*rank-00000\.safetensors.*[\d,]+ bytes needed for this file"):
            save_step(run, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert [p.name for p in run.iterdir()] == [step_name(10)]
    verify_checkpoint(read_manifest(run / step_name(10)))


def test_files_are_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    events: list[str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.readlink(f"/proc/self/fd/{fd}")) or sync(fd))
    monkeypatch.setattr(os, "rename", lambda a, b: events.append(f"rename {Path(b).name}") or rename(a, b))
    target = save_step(tmp_path / "checkpoints", 10)
    at = events.index(f"rename {target.name}")
    synced = {Path(e).name for e in events[:at]}
    assert {p.name for p in target.rglob("*")} <= synced
    assert any(".tmp-" in Path(e).name for e in events[:at]), "the staging folder itself"
    assert str(tmp_path / "checkpoints") in events[at + 1 :]


def test_leftovers_are_removed_and_what_was_set_aside_comes_back(tmp_path):
    for step in (10, 20):
        write_layout(tmp_path, MODEL, random_logical(MODEL), step=step)
    (tmp_path / step_name(10)).rename(tmp_path / "step-00000010.old-abababababababab")
    (tmp_path / "step-00000020.old-cdcdcdcdcdcdcdcd").mkdir()
    (tmp_path / "step-00000030.tmp-efefefefefefefef").mkdir()
    (tmp_path / "other.tmp-efefefefefefefef").mkdir()
    assert steps(tmp_path) == [10, 20]
    lines = clean_up(tmp_path)
    assert [re.search(r"step-\d+\.(old|tmp|aside)-|step-\d+", line)[0] for line in lines] == [
        "step-00000010", "step-00000020.aside-", "step-00000030.tmp-"
    ]  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "other.tmp-efefefefefefefef", step_name(10), step_name(20), "step-00000020.aside-cdcdcdcdcdcdcdcd"
    ]  # fmt: skip
    assert clean_up(tmp_path) == clean_up(tmp_path / "nowhere") == []


def test_a_leftover_that_cannot_be_removed_is_named_and_stays(tmp_path, monkeypatch):
    """One with a mount point in it, say: no start and no save ends for it."""

    def busy(path):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "m")

    left = tmp_path / "step-00000030.tmp-efefefefefefefef"
    left.mkdir()
    monkeypatch.setattr(shutil, "rmtree", busy)
    assert clean_up(tmp_path) == [f"could not remove {left}, left by a save that was cut short: {os.strerror(16)}"]
    assert left.is_dir()


@pytest.mark.parametrize("make", ["file", "link", "folder"])
def test_what_is_in_the_way_of_a_save_is_kept_and_costs_nothing(tmp_path, make):
    run, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    target = run / step_name(10)
    {"file": lambda: target.write_text("x"), "link": lambda: target.symlink_to(elsewhere), "folder": target.mkdir}[
        make
    ]()
    save_step(run, 10)
    verify_checkpoint(read_manifest(target))
    (kept,) = (p for p in run.iterdir() if p != target)
    assert kept.name.startswith("step-00000010.aside-") and elsewhere.is_dir()
    assert kept.is_symlink() == (make == "link") and kept.is_file() == (make == "file")


def test_incomplete_slices_are_not_committed(tmp_path):
    """A rank that wrote too little would otherwise be noticed only when the checkpoint is needed."""
    shards = rank_shards(MODEL, 0, 1, 1, random_logical(MODEL))
    shards.pop()
    with pytest.raises(CheckpointError, match=r"E407.*lm_head\.weight lacks"):
        save_checkpoint(tmp_path, 1, shards, model=MODEL, config_tree=config_tree(MODEL), state={}, tokenizer=None,
                        ctx=ParallelContext.single())  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_names_what_is_meant(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "runs" / "a" / "checkpoints").mkdir(parents=True)
    for name, cure in (
        ("hf", "with tools/hf_to_checkpoint.py first"),
        ("runs", f"name a run in it: {tmp_path}/runs/a"),
    ):
        with pytest.raises(CheckpointError, match="E401") as error:
            open_checkpoint(tmp_path / name)
        assert str(error.value).endswith(cure)


def test_a_step_that_is_named_in_another_way(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (100, 200):
        (run / "checkpoints" / step_name(step)).mkdir(parents=True)
    hundred = run / "checkpoints" / step_name(100)
    assert checkpoint_of_step(run, 100) == checkpoint_of_step(run / "checkpoints", 100) == hundred
    with pytest.raises(CheckpointError, match=r"E401.*step 150 has no checkpoint; choose .* there: 100, 200"):
        checkpoint_of_step(run, 150)
    for wrong, cure in (
        ("step-100", f"did you mean {hundred}?"),
        ("checkpoints/step-100", f"did you mean {hundred}?"),
        ("checkpoints/100", f"did you mean {hundred}?"),
        ("checkpoints/step-00000150", "choose a step that is there: 100, 200"),
        ("checkpoint", f"did you mean {run}/checkpoints?"),
    ):
        with pytest.raises(CheckpointError, match=r"E401.*is not there") as error:
            open_checkpoint(run / wrong)
        assert str(error.value).endswith(cure)
