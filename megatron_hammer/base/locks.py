"""A lock on a file that one process holds at a time: the kernel's ``flock``, which is released when the process ends.

Some file systems have no such locks (Lustre in its default mount, some NFS). There a small file beside the locked one
names its owner instead: host, process, the time that the process started, and the inode of the locked file, so that an
owner that has died, or whose file is no longer that one, is recognised on its own machine. Whether a process of another
machine still lives cannot be known: then a note says so, and the work goes on::

    .NAME.owner-1   released         whoever wants the lock next makes .NAME.owner-2, which the system gives to one only
    .NAME.owner-2   host, process    its maker looks once more: a higher number there is of one who came before it

Only the owner of a higher number removes a file, so the highest is always there. ``open_alone`` opens a temporary file
that only one process may write. No torch.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.base.system import find_process, locks_held

_MOMENTS, _MOMENT_SECONDS = 20, 0.05  # a file that was made gets its line in less than a millisecond
_RELEASED: Mapping[str, Any] = {"released": True}  # what an owner's file says when the lock is free
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what such file systems answer


@dataclass(eq=False)
class Lock:
    """A lock that this process holds until ``give_up`` and the closing of its file, or until its own end."""

    owner: Path | None = None
    """The file that names the process, where the file system has no locks."""
    process: int = field(default_factory=os.getpid)

    def give_up(self) -> None:
        """Where a file names the owner: write down there that the lock is free. Else closing its file frees it."""
        if self.owner is None or os.getpid() != self.process:  # a fork owns nothing
            return
        atexit.unregister(self.give_up)
        with contextlib.suppress(OSError), open(os.open(self.owner, os.O_WRONLY | os.O_TRUNC), "w") as file:
            file.write(json.dumps(_RELEASED))
        self.owner = None


def take_lock(descriptor: int, path: Path, note: Callable[[str], None] = say) -> Lock | None:
    """Take the exclusive lock of an open file without waiting.

    Args:
        path: of that file.
        note: gets a line where the file system has no locks.

    Returns:
        None where another process, or this one by another descriptor, holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Lock()
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return _claim(descriptor, path, error.strerror or str(error), note)


def open_alone(path: Path) -> int | None:
    """Open a temporary file that only one process may write; what a killed one left in it is still there.

    Returns:
        a descriptor, whose closing gives up the lock (without ``flock`` only the process's end does, or the file's new
        name); None where somebody else writes the file.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    if take_lock(descriptor, path) and path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
        return descriptor
    os.close(descriptor)  # locked, or renamed to its final name between opening and locking
    return None


def is_locked(path: Path) -> bool | None:
    """Whether a process of this machine holds the lock of a file; None where that is unknown. Takes no lock itself."""
    try:
        found = path.lstat()
    except OSError:
        return None
    held = locks_held()
    if held is None:
        return None
    inode = f":{found.st_ino}"
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    return any("FLOCK" in line and f" {device}{inode} " in line for line in held)


def _claim(descriptor: int, path: Path, reason: str, note: Callable[[str], None]) -> Lock | None:
    """Write ourselves down as the owner of ``path``; None where one that lives is there."""
    ours = {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid()),
        "inode": os.fstat(descriptor).st_ino,
    }  # fmt: skip
    while True:
        owners, remark = _owners(path), ""
        theirs = _owner(owners[-1][1]) if owners else _RELEASED
        if theirs is None:
            continue  # gone since: there is a higher number
        if theirs != _RELEASED and theirs.get("inode", ours["inode"]) == ours["inode"]:
            if theirs.get("host") != ours["host"]:
                who = f"process {theirs.get('pid')} of {theirs.get('host')}"
                remark = f"; {who} was the last: make sure that it has ended"
            elif theirs.get("started") is not None and _started(theirs.get("pid")) == theirs["started"]:
                return None
        number = owners[-1][0] + 1 if owners else 1
        mine = path.with_name(f".{path.name}.owner-{number}")
        try:
            made = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue  # somebody was faster, and is asked about now
        with open(made, "w") as file:
            file.write(json.dumps(ours))
        present = _owners(path)
        if not present or present[-1][0] != number:  # owners have come and gone since we looked
            mine.unlink(missing_ok=True)
            continue
        for _, old in present[:-1]:
            old.unlink(missing_ok=True)
        note(f"note: {path}: its file system has no locks ({reason}){remark}")
        lock = Lock(mine.absolute())
        atexit.register(lock.give_up)
        return lock


def _owners(path: Path) -> list[tuple[int, Path]]:
    """The files that name owners of ``path``, by rising number."""
    form = re.compile(rf"\.{re.escape(path.name)}\.owner-(\d{{1,9}})")
    found = ((form.fullmatch(entry), entry) for entry in os.listdir(path.parent))
    return sorted((int(match[1]), path.with_name(name)) for match, name in found if match is not None)


def _owner(path: Path) -> Mapping[str, Any] | None:
    """What a file says of the owner; None where it is gone. One that says nothing although a moment has passed is of a
    process that was killed before it wrote its line: nobody's."""
    for _ in range(_MOMENTS):
        try:
            found = parse_json(read_regular(path, follow=False))
        except FileNotFoundError:
            return None
        except ValueError:  # it is being written
            time.sleep(_MOMENT_SECONDS)
            continue
        return found if isinstance(found, dict) else _RELEASED
    return _RELEASED


def _started(pid: object) -> str | None:
    """When a process of this machine started, in the kernel's own words; None where there is none."""
    process = find_process(pid)
    return None if process is None else process.started
