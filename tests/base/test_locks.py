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


def owner_files(path: Path) -> list[int]:
    return [number for number, _ in locks._owners(path)]


def test_without_locks_the_owner_is_written_down(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, owner = tmp_path / "lock", tmp_path / ".lock.owner-1"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    lock = take_lock(descriptor, path)
    assert lock is not None and json.loads(owner.read_text())["pid"] == os.getpid()
    assert f"note: {path}: its file system has no locks (" in capsys.readouterr().err
    assert take_lock(descriptor, path) is None, "this process has it"
    lock.give_up()

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:  # lives
        stat = Path(f"/proc/{other.pid}/stat").read_text()
        started = stat.rpartition(")")[2].split()[19]
        theirs = {"host": socket.gethostname(), "pid": other.pid, "started": started, "inode": path.stat().st_ino}
        owner.write_text(json.dumps(theirs))
        assert take_lock(descriptor, path) is None
        looks = locks._owners
        with monkeypatch.context() as patch:
            patch.setattr(locks, "_owners", lambda path: patch.undo() or [])  # it made its file a moment later
            assert take_lock(descriptor, path) is None and looks(path) == [(1, owner)]
        owner.write_text(json.dumps(theirs | {"inode": theirs["inode"] + 1}))
        lock = take_lock(descriptor, path)
        assert lock is not None, "it owns a file that was renamed or removed since"
        assert owner_files(path) == [2]
        lock.give_up()
        owner.with_name(".lock.owner-2").write_text(json.dumps(theirs))
        other.kill()
    lock = take_lock(descriptor, path)
    assert lock is not None, "a dead owner holds nothing"
    lock.give_up()
    owner.with_name(".lock.owner-4").write_text("")
    monkeypatch.setattr(locks, "_MOMENT_SECONDS", 0.0)
    lock = take_lock(descriptor, path)
    assert lock is not None, "killed before it wrote a line"
    lock.give_up()
    owner.with_name(".lock.owner-6").write_text(json.dumps({"host": "another", "pid": 7, "started": "1"}))
    capsys.readouterr()
    for asks in (True, False):  # once: then it was ours
        lock = take_lock(descriptor, path)
        assert lock is not None
        lock.give_up()
        remark = "; process 7 of another was the last: make sure that it has ended"
        assert (remark in capsys.readouterr().err) == asks
    os.close(descriptor)


def test_who_looked_before_others_came_and_went_is_no_owner(
    tmp_path: Path, no_locks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are made anew once their files are gone: whoever has made one looks whether there is a higher one."""
    path = tmp_path / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    first = take_lock(descriptor, path)
    assert first is not None
    first.give_up()
    seen, last = locks._owners(path), None
    for _ in range(2):
        last = take_lock(descriptor, path)
        assert last is not None
        last.give_up()
    last = take_lock(descriptor, path)
    assert last is not None and owner_files(path) == [4]
    looks, reads, made = [seen], [locks._RELEASED], list[int]()  # what that process saw, then what is there
    owners, owner, create = locks._owners, locks._owner, os.open
    monkeypatch.setattr(locks, "_owners", lambda path: looks.pop() if looks else owners(path))
    monkeypatch.setattr(locks, "_owner", lambda path: reads.pop() if reads else owner(path))
    monkeypatch.setattr(os, "open", lambda *words: (made.append(words[1] & os.O_EXCL), create(*words))[1])
    assert take_lock(descriptor, path) is None and any(made) and not looks and not reads
    assert owner_files(path) == [4]
    first.give_up()  # a second time, as at the end of its process
    assert take_lock(descriptor, path) is None and owner_files(path) == [4]
    last.give_up()
    assert take_lock(descriptor, path) is not None
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
