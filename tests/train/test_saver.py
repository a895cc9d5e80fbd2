"""Saves of a run: in the background as while training waits, what is kept, and what a save that fails means."""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_hammer.base.errors import DiskError, MemoryShortage
from megatron_hammer.base.faults import VARIABLE
from megatron_hammer.checkpoint import background, snapshot
from megatron_hammer.checkpoint.background import BackgroundSaver, WriterProcess
from megatron_hammer.checkpoint.folder import find_checkpoints, step_of
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.checkpoint.snapshot import Snapshot
from megatron_hammer.train.run import run_rank
from tests.distributed import run_distributed
from tests.train.runs import checkpoint_bytes, config_for, metrics, overrides, train_here

BACKGROUND = "checkpoint.mode=background"
QUICK = ("train.num_steps=8", "checkpoint.save_interval_steps=2", "train.eval_interval_steps=null",
         "checkpoint.keep_last=9", "log.interval_steps=100")  # fmt: skip


def saved(output: Path) -> list[int]:
    return [step_of(path) for path in find_checkpoints(output)]


@pytest.mark.parametrize("ranks, layout", [(1, []), (2, ["parallel.tensor_model_parallel_size=2"])])
def test_a_save_in_the_background_has_the_bytes_of_a_blocking_one(
    data: Path, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    """And training computes what it would have computed."""
    blocking, background = tmp_path / "blocking", tmp_path / "background"
    for output, more in ((blocking, []), (background, [BACKGROUND])):
        arguments = overrides(data, output, *QUICK, *layout, *more)
        assert set(run_distributed(ranks, train_here, arguments) if ranks > 1 else [train_here(0, arguments)]) == {0}
    assert metrics(background) == metrics(blocking)
    assert saved(background) == saved(blocking) == [2, 4, 6, 8]
    for step in (2, 4, 6, 8):
        assert checkpoint_bytes(background, step) == checkpoint_bytes(blocking, step)
        ours, theirs = (read_manifest(out / "checkpoints" / f"step-{step:08d}") for out in (background, blocking))
        assert (ours.files, ours.tensors, ours.state) == (theirs.files, theirs.tensors, theirs.state)
        verify_checkpoint(ours)
    assert not [p for p in (background / "checkpoints").iterdir() if ".tmp-" in p.name]


def test_weights_change_only_after_their_copy(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late that comes: here not before somebody waits for it."""
    wait, copy, take, asked = Snapshot.wait, snapshot._CopyWork.copy, Snapshot.take, threading.Event()

    def takes(self: Snapshot, *arguments: Any) -> None:
        asked.clear()
        take(self, *arguments)

    def waits(self: Snapshot) -> None:
        asked.set()
        wait(self)

    def copies(self: Any) -> None:
        assert asked.wait(60)
        copy(self)

    monkeypatch.setattr(Snapshot, "take", takes)
    monkeypatch.setattr(Snapshot, "wait", waits)
    monkeypatch.setattr(snapshot._CopyWork, "copy", copies)
    for output, more in (("blocking", []), ("background", [BACKGROUND])):
        assert train_here(0, overrides(data, tmp_path / output, *QUICK, "train.num_steps=4", *more)) == 0
    assert checkpoint_bytes(tmp_path / "background", 2) == checkpoint_bytes(tmp_path / "blocking", 2)


@pytest.mark.parametrize("fault, why, expected", [
    ("full@write,step=2", "No space left", [3, 4, 6, 8]),
    ("kill@rename,step=2", "was killed by SIGKILL", [4, 6, 8]),
    ("kill@after-rename,step=2", "was killed by SIGKILL", [2, 4, 6, 8]),
])  # fmt: skip
def test_a_save_in_the_background_that_fails_is_followed_by_a_blocking_one(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    why: str,
    expected: list[int],
) -> None:
    """At once. The process is waited for in each step: after step 3 it has written, and after step 4 committed."""
    flags = BackgroundSaver.flags

    def ready(self: BackgroundSaver) -> int:
        while (mine := flags(self)) == background.BUSY:
            time.sleep(0.001)
        return mine

    monkeypatch.setattr(BackgroundSaver, "flags", ready)
    monkeypatch.setenv(VARIABLE, f"{fault},part=background")
    assert train_here(0, overrides(data, tmp_path / "run", *QUICK, BACKGROUND)) == 0
    said = capsys.readouterr().err
    assert re.search(rf"warning: saving .*step-00000002 in the background has failed.*{why}", said), said
    assert saved(tmp_path / "run") == expected
    for path in find_checkpoints(tmp_path / "run"):
        verify_checkpoint(read_manifest(path))
    assert not [p for p in (tmp_path / "run" / "checkpoints").iterdir() if ".tmp-" in p.name]


def test_whoever_waits_for_a_copy_takes_part_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is handed over once, by the one that copies the last piece, when that is there."""
    monkeypatch.setattr(snapshot, "PIECE_BYTES", 4)
    begun, go_on, handed = threading.Event(), threading.Event(), list[bytes]()
    real, copied_by = snapshot.copy, set[str]()

    def copies(target: np.ndarray, source: np.ndarray) -> None:
        copied_by.add(threading.current_thread().name)
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(60)
        else:
            go_on.set()
        real(target, source)

    monkeypatch.setattr(snapshot, "copy", copies)
    tensors = [torch.arange(100, dtype=torch.int32), torch.arange(7, dtype=torch.int16)]
    offsets, size = snapshot.places_of([tensor.nbytes for tensor in tensors])
    taken = Snapshot(size, torch.device("cpu"))
    try:
        taken.take(tensors, offsets, lambda: handed.append(os.pread(taken.descriptor, size, 0)))
        assert begun.wait(60) and not taken.is_handed_over
        taken.wait()
        assert len(copied_by) == 2 and taken.is_handed_over and len(handed) == 1
        for tensor, at in zip(tensors, offsets, strict=True):
            assert handed[0][at : at + tensor.nbytes] == tensor.numpy().tobytes()
    finally:
        taken.close()


def test_a_copy_past_the_caches_has_the_same_bytes_and_no_others() -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, 1024, np.uint8)
    for size in (*range(200), 800):
        at, place = (int(rng.integers(0, 100)) for _ in range(2))
        target = np.full(1024, 7, np.uint8)
        expected = target.copy()
        expected[place : place + size] = source[at : at + size]
        snapshot.copy(target[place : place + size], source[at : at + size])
        np.testing.assert_array_equal(target, expected)


def test_a_limit_on_files_is_none_on_memory() -> None:
    """``ulimit -f``, by which the drill makes a disk full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        Snapshot(2**20, torch.device("cpu")).close()
        assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == 4096
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_memory_that_a_gpu_cannot_reach_is_an_error_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the failure is torch's to find, after some kernel that has nothing to do with it: of the ranks' agreement
    on this error, say, for CUDA keeps an error until somebody asks for it."""
    last_error = list[int]()

    def register(address: int, size: int, flags: int) -> int:
        last_error.append(801)
        return 801

    def launch(*size: int, device: torch.device) -> torch.Tensor:
        if last_error:
            raise RuntimeError(f"CUDA error {last_error.pop()}")  # torch asks behind each launch, once
        return torch.empty(size)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "ones", launch)
    taken, take_memory = list[mmap.mmap](), snapshot.take_memory
    monkeypatch.setattr(
        snapshot, "take_memory", lambda descriptor, size: taken.append(take_memory(descriptor, size)) or taken[0]
    )
    with pytest.raises(MemoryShortage, match=r"cannot be pinned for the GPU \(cudaHostRegister: error 801\).*blocking"):
        Snapshot(2**20, torch.device("cuda"))
    assert taken[0].closed, "the memory is free while the error is on its way"
    assert not last_error, "the next kernel is not to blame"


def test_a_snapshot_of_a_gpu_touches_no_other_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for GPU 3: the copy is made on a stream of its own behind the step, the next update waits for it, and
    the thread that waits is on this GPU. A new thread is on GPU 0, where a context of each rank would take memory."""
    calls, mine = list[tuple[str, int]](), threading.get_ident()

    def note(what: str) -> None:
        calls.append((what, threading.get_ident()))

    stream = SimpleNamespace(device="cuda:3", wait_stream=lambda other: note(f"copies wait for {other}"))
    event = SimpleNamespace(
        record=lambda where: note("recorded" if where is stream else "elsewhere"),
        synchronize=lambda: note("waited for"),
        wait=lambda where: note(f"{where} waits"),
    )
    library = SimpleNamespace(cudaHostRegister=lambda *a: 0, cudaHostUnregister=lambda address: note("not pinned"))
    stand_ins = {
        "Stream": lambda device: stream, "cudart": lambda: library, "stream": contextlib.nullcontext,
        "current_stream": lambda device: "the step", "Event": lambda blocking: event,
        "set_device": lambda device: note(f"on {device}"),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    copied = Snapshot(4096, torch.device("cuda", 3))
    copied.take([torch.arange(9.0)], [0], lambda: note("written from"))
    copied.wait()
    copied.finish()
    assert torch.equal(copied._bytes[:36].view(torch.float32), torch.arange(9.0))
    copied.close()
    of_thread = [what for what, thread in calls if thread != mine]
    assert of_thread == ["on cuda:3", "waited for", "written from"]
    ours = [what for what, thread in calls if thread == mine]
    assert ours == ["copies wait for the step", "recorded", "the step waits", "not pinned"]


def test_the_next_save_begins_when_what_is_old_is_gone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else both remove the same folder, and the one that comes second ends the run with E601. The first one begins at
    once, also where the process is only being started."""
    begin, stage, savers, waiting = BackgroundSaver.begin, background.stage, list[BackgroundSaver](), list[int]()
    wait, waits_before = WriterProcess.wait, list[int]()

    def begins(self: BackgroundSaver, *arguments: Any) -> None:
        savers.append(self)
        begin(self, *arguments)

    def stages(*arguments: Any) -> None:
        waiting.append(savers[-1]._pruning(math.inf))
        stage(*arguments)

    def waits(self: WriterProcess, seconds: float) -> None:
        waits_before.append(len(waiting))
        wait(self, seconds)

    monkeypatch.setattr(BackgroundSaver, "begin", begins)
    monkeypatch.setattr(background, "stage", stages)
    monkeypatch.setattr(WriterProcess, "wait", waits)
    monkeypatch.setenv(VARIABLE, "slow@prune,part=background")
    assert train_here(0, overrides(data, tmp_path / "run", *QUICK, BACKGROUND)) == 0
    assert waiting == [0, 0, 0] and saved(tmp_path / "run") == [2, 4, 6, 8]
    assert waits_before and min(waits_before) == 1, "for what the saves before remove, and for nothing else"


def test_a_run_that_fails_while_a_copy_is_made_ends_with_its_own_error(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is handed over when the process that it is for has been ended already."""
    ended, end, copy, begin = threading.Event(), WriterProcess.end, snapshot._CopyWork.copy, BackgroundSaver.begin

    def ends(self: WriterProcess) -> str:
        try:
            return end(self)
        finally:
            ended.set()

    def copies(self: Any) -> None:
        assert ended.wait(60)
        copy(self)

    def begins(self: BackgroundSaver, *arguments: Any) -> None:
        begin(self, *arguments)
        raise MemoryError

    monkeypatch.setattr(WriterProcess, "end", ends)
    monkeypatch.setattr(snapshot._CopyWork, "copy", copies)
    monkeypatch.setattr(BackgroundSaver, "begin", begins)
    with pytest.raises(MemoryError):
        train_here(0, overrides(data, tmp_path / "run", *QUICK, BACKGROUND))


def test_a_removal_that_hangs_holds_up_the_next_save_for_a_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "stop@prune,step=2,part=background")
    patience = "checkpoint.background_timeout_seconds=1"
    assert train_here(0, overrides(data, tmp_path / "run", *QUICK, BACKGROUND, patience)) == 0
    assert re.search(r"warning: .*has not removed what is old in 1 s", capsys.readouterr().err)
    assert saved(tmp_path / "run")[0] == 2 and saved(tmp_path / "run")[-1] == 8


def test_a_writer_that_outlives_a_kill_is_named_and_left(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a process does that waits in the kernel for a disk; here it is stopped, and not killed."""
    kept = list[int]()
    monkeypatch.setenv(VARIABLE, "stop@fsync,step=2,part=background")
    monkeypatch.setattr(background, "KILL_SECONDS", 0.2)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: kept.append(process.pid))
    patience = "checkpoint.background_timeout_seconds=0.5"
    try:
        assert train_here(0, overrides(data, tmp_path / "run", *QUICK, BACKGROUND, patience)) == 0
    finally:
        for process in kept:
            with contextlib.suppress(ProcessLookupError):  # of a later save that was slow: not stopped, it has ended
                os.kill(process, signal.SIGKILL)
    said = capsys.readouterr().err
    assert f"rank 0, writer of checkpoints: process {kept[0]} has not ended 10 s after SIGKILL (state T)" in said
    assert re.search(r"step-00000002 in the background has failed.*has not written .* in 0\.5 s", said)
    assert 2 not in saved(tmp_path / "run") and saved(tmp_path / "run")[-1] == 8


@pytest.mark.parametrize("mode", ["blocking", "background"])
def test_a_full_disk_ends_the_run_or_costs_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    arguments = overrides(data, tmp_path / "run", *QUICK, f"checkpoint.mode={mode}", "checkpoint.max_save_errors=2")
    monkeypatch.setenv(VARIABLE, "full@stage,step=4")
    with pytest.raises(DiskError, match=r"E601.*No space left"):
        train_here(0, arguments)
    assert saved(tmp_path / "run") == [2]
    goes_on = [*arguments, "checkpoint.on_save_error=continue"]
    assert train_here(0, goes_on) == 0
    assert saved(tmp_path / "run") == [2, 6, 8] and len(metrics(tmp_path / "run")) == 8
    assert "warning: step 4 was not saved (1 of at most 1 in a row" in capsys.readouterr().err
    further = [*goes_on, "train.num_steps=14", "schedule.style=constant", "--accept=schedule.style"]
    monkeypatch.setenv(VARIABLE, "full@stage,step=10;full@stage,step=12")
    with pytest.raises(DiskError, match="E601"):
        train_here(0, further)
    assert saved(tmp_path / "run") == [2, 6, 8]
    monkeypatch.setenv(VARIABLE, "full@stage,step=14")
    with pytest.raises(DiskError, match="E601"):  # the last save of a run must succeed
        train_here(0, further)
    monkeypatch.delenv(VARIABLE)
    assert train_here(0, further) == 0
    assert saved(tmp_path / "run") == [2, 6, 8, 10, 12, 14]


def test_pinned_steps_and_every_nth_are_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a leftover that stays where it is costs one line, and another when the reason is another."""
    remove, tries = shutil.rmtree, list[Path]()

    def removes(path: Path, **how: Any) -> None:
        if path.name != "step-00000007.tmp-ab":
            return remove(path, **how)
        tries.append(path)
        number = errno.EBUSY if len(tries) < 4 else errno.EPERM
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shutil, "rmtree", removes)
    for mode in ("blocking", "background"):
        (tmp_path / mode / "checkpoints" / "step-00000007.tmp-ab").mkdir(parents=True)
        arguments = overrides(
            data, tmp_path / mode, *QUICK, f"checkpoint.mode={mode}", "checkpoint.keep_last=2",
            "checkpoint.keep_every_steps=4", "checkpoint.pinned_steps=[1, 3]", "train.num_steps=10",
        )  # fmt: skip
        assert run_rank(config_for(arguments), 0, 0, 1, None) == 0
        assert saved(tmp_path / mode) == [1, 3, 4, 8, 10]
        said = re.findall(r"could not remove .*step-00000007.*: (.*)", "".join(capsys.readouterr()))  # out, then err
        assert said == [os.strerror(errno.EBUSY), os.strerror(errno.EPERM)] and len(tries) > 5
        tries.clear()


@pytest.mark.parametrize("mode", ["blocking", "background"])
def test_a_checkpoint_that_does_not_fit_is_not_begun(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    real = os.statvfs
    for field, rule in (("f_bavail", r"has 0\.0 MB free where .* needs \d+\.\d MB"), ("f_favail", "has 0 inodes free")):
        arguments = overrides(data, tmp_path / field, *QUICK, f"checkpoint.mode={mode}")
        with monkeypatch.context() as patch:
            patch.setattr(os, "statvfs", partial(_with_none, real, field))
            with pytest.raises(DiskError, match=f"E603.*checkpoints {rule}"):
                train_here(0, arguments)
        assert list((tmp_path / field / "checkpoints").iterdir()) == []


def _with_none(real: Any, field: str, path: Any) -> SimpleNamespace:
    """The file system of a path as it would be with nothing left of one thing."""
    found = real(path)
    names = [name for name in dir(found) if name.startswith("f_")]
    return SimpleNamespace(**{name: getattr(found, name) for name in names} | {field: 0})
