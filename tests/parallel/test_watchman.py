"""Ranks without a launcher of ours: one that stops is named and killed by another, and all leave with code 8."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from megatron_hammer.base import environment
from megatron_hammer.parallel import torchrun
from megatron_hammer.parallel.board import Board
from megatron_hammer.parallel.watchman import Watchman, share_board


class Folder:
    """A store of values, in files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, key: str, value: str) -> None:
        staged = self.path / "staged"
        staged.write_text(value)
        staged.rename(self.path / key.replace("/", "-"))

    def get(self, key: str) -> bytes:
        while True:
            try:
                return (self.path / key.replace("/", "-")).read_bytes()
            except FileNotFoundError:
                pass


def stand_in(path: Path, rank: int, stopped: int, there: Barrier) -> None:
    """In step 3; one of two ranks stops, the other waits for it."""
    sys.stderr = (path / f"said-{rank}").open("w")
    board = share_board(Folder(path), 0, rank, 2)
    there.wait(60)  # one that loaded cores start a second later than the other would be taken for hung
    watchman = Watchman(board, range(2), rank, 1.0, alone=True)
    watchman.status.step(3)
    watchman.status.mark("forward")
    if rank == stopped:
        os.kill(os.getpid(), signal.SIGSTOP)
    with watchman.status.waits("all_reduce"):
        time.sleep(60)  # goes on after a signal


@pytest.mark.parametrize("stopped", [0, 1])
def test_one_that_stops_is_named_by_the_other(stopped: int, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    there = spawn.Barrier(2)
    ranks = [spawn.Process(target=stand_in, args=(tmp_path, rank, stopped, there)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [-9 if rank == stopped else 8 for rank in range(2)]
    said = (tmp_path / f"said-{1 - stopped}").read_text().splitlines()
    assert said[-1].startswith(f"error[E801]: rank {stopped} hung: step 3, forward; silent for ")
    assert f"rank {1 - stopped}, Python stack:" in said and not (tmp_path / f"said-{stopped}").read_text()


def test_a_rank_that_has_left_is_not_dead_and_one_that_has_died_is(tmp_path: Path) -> None:
    board = Board(2)
    watchman = Watchman(board, range(2), 0, 60.0, alone=True)
    assert watchman.dead() is None
    other = board.slot(1)
    other._pid = 2**22 + 1  # beyond what the kernel gives
    other.mark("forward")
    dead = watchman.dead()
    assert dead is not None and dead.code == "E701" and dead.what == "rank 1"
    other.leave()
    assert watchman.dead() is None
    watchman.stop()
    assert board.read(0) is None


def test_a_board_that_cannot_be_opened_is_an_error_of_the_system(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    store.set("board/0", json.dumps([2**22 + 1, [3, 4, 5]]))
    with pytest.raises(OSError):
        share_board(store, 0, 1, 2)


def test_compiled_kernels_stay_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under torchrun and srun as under our launcher: Triton's own place is the home folder, which nodes share.

    But not in a folder that others can write to, as somebody may have made it before: Triton runs what lies there.
    """
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"triton-{os.getuid()}"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(torchrun, "torchrun_store", lambda rank, world_size: Folder(Path("/")))
    monkeypatch.setattr(torchrun, "share_board", unshared)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # is put back at the end, whatever is set meanwhile
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(environment, "GPU_FILES", ("/dev/no-gpu",))
    torchrun.OtherRanks(0, 1, 60)
    assert "TRITON_CACHE_DIR" not in os.environ and not folder.exists()
    monkeypatch.setattr(environment, "GPU_FILES", ("/dev/no-gpu", "/dev/null"))
    for mode, here, kept in ((None, None, str(folder)), (None, "/fast", "/fast"), (0o755, None, str(folder)),
                             (0o777, None, None), (None, None, str(folder))):  # fmt: skip
        if mode is None and folder.exists():
            folder.rmdir()
        if mode is not None:
            folder.mkdir(exist_ok=True)
            folder.chmod(mode)
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        if here:
            monkeypatch.setenv("TRITON_CACHE_DIR", here)
        torchrun.OtherRanks(0, 1, 60)
        assert os.environ.get("TRITON_CACHE_DIR") == kept
    folder.rmdir()
    folder.symlink_to(tmp_path)
    monkeypatch.delenv("TRITON_CACHE_DIR")
    torchrun.OtherRanks(0, 1, 60)
    assert "TRITON_CACHE_DIR" not in os.environ


def unshared(*_: object) -> Board:
    raise OSError(1, "not here")
