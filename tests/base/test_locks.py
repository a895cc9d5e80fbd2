"""Locks, on file systems that have them and on those that have none."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.base import locks
from megatron_hammer.base.locks import open_alone, take_lock


@pytest.fixture(params=[errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system such as Lustre in its default mount."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = (os.open(path, os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert take_lock(first, path) and not take_lock(second, path)
    os.close(first)
    assert take_lock(second, path)
    os.close(second)


def test_without_locks_the_owner_is_written_down(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, owner = tmp_path / "lock", tmp_path / ".lock.owner-1"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    assert take_lock(descriptor, path)
    assert json.loads(owner.read_text())["pid"] == os.getpid()
    assert f"note: {path}: its file system has no locks (" in capsys.readouterr().err

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:  # lives
        stat = Path(f"/proc/{other.pid}/stat").read_text()
        started = stat.rpartition(")")[2].split()[19]
        owner.write_text(json.dumps({"host": socket.gethostname(), "pid": other.pid, "started": started}))
        assert not take_lock(descriptor, path)
        looks = locks._owners
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_owners", lambda path: patch.undo() or [])  # it made its file a moment later
            assert not take_lock(descriptor, path) and looks(path) == [(1, owner)]
        other.kill()
    assert take_lock(descriptor, path), "a dead owner holds nothing"
    assert [number for number, _ in locks._owners(path)] == [1, 2], "whoever looks now sees the one or the other"
    locks.give_up(descriptor, path)
    assert locks._owners(path) == [(1, owner)]
    descriptor = os.open(path, os.O_RDWR)
    owner.write_text("")
    monkeypatch.setattr(locks, "_MOMENT_SECONDS", 0.0)
    assert take_lock(descriptor, path), "killed before it wrote a line"
    owner.with_name(".lock.owner-3").write_text(json.dumps({"host": "another", "pid": 7, "started": "1"}))
    assert take_lock(descriptor, path)
    assert [number for number, _ in locks._owners(path)] == [3, 4]
    assert "; process 7 of another was the last: make sure that it has ended" in capsys.readouterr().err
    os.close(descriptor)


def test_other_errors_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"):
        open_alone(tmp_path / "file")


def test_temporary_files_without_locks(tmp_path: Path, no_locks: None) -> None:
    descriptor = open_alone(tmp_path / "file.tmp")
    assert descriptor is not None
    os.close(descriptor)
