"""A lock on a file that one process holds at a time: the kernel's ``flock``, which is released when the process ends.

Some file systems have no such locks (Lustre in its default mount, some NFS). There a small file beside the locked one
names its owner instead (``.NAME.owner-1``): host, process, and the time that the process started, so that an owner that
has died is recognised on its own machine. Whether a process of another machine still lives cannot be known: then a note
says so, and the work goes on. ``open_alone`` opens a temporary file that only one process may write. No torch.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.base.system import find_process, locks_held

_MOMENTS, _MOMENT_SECONDS = 20, 0.05  # a file that was made gets its line in less than a millisecond
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what such file systems answer


def take_lock(descriptor: int, path: Path, note: Callable[[str], None] = say) -> bool:
    """Take the exclusive lock of an open file without waiting; ``give_up`` ends it, or the end of the process.

    Args:
        path: of that file.
        note: gets a line where the file system has no locks.

    Returns:
        False where another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return _claim(path, error.strerror or str(error), note)


def open_alone(path: Path) -> int | None:
    """Open a temporary file that only one process may write; what a killed one left in it is still there.

    Returns:
        a descriptor, whose closing gives up the lock; None where another process writes the file.
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


def give_up(descriptor: int, path: Path) -> None:
    """Close a file whose lock was asked for; where a file names the owner, that ends now, and not with the process."""
    os.close(descriptor)
    if (owner := _claimed.pop(path, None)) is not None:
        _remove(owner, os.getpid())


_claimed: dict[Path, Path] = {}
"""Locks that this process holds by such files -> those."""


def _claim(path: Path, reason: str, note: Callable[[str], None]) -> bool:
    """Write ourselves down as the owner of ``path``; False where one that lives is there.

    Each owner makes a file of the next number, which the system gives to one process only. The file of the one before
    stays, so that whoever looks at the same moment finds one of the two.
    """
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    while True:
        owners, remark = _owners(path), ""
        theirs = _owner(owners[-1][1]) if owners else None
        if theirs is not None and theirs != ours:
            if theirs.get("host") == ours["host"]:
                if theirs.get("started") is not None and _started(theirs.get("pid")) == theirs["started"]:
                    return False
            else:
                remark = (
                    f"; process {theirs.get('pid')} of {theirs.get('host')} was the last: make sure that it has ended"
                )
        if theirs == ours:
            mine = owners[-1][1]
            break
        mine = path.with_name(f".{path.name}.owner-{owners[-1][0] + 1 if owners else 1}")
        try:
            descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            continue  # somebody was faster, and is asked about now
        with open(descriptor, "w") as file:
            file.write(json.dumps(ours))
        for _, old in owners[:-1]:
            old.unlink(missing_ok=True)
        atexit.register(_remove, mine, os.getpid())
        break
    _claimed[path] = mine
    note(f"note: {path}: its file system has no locks ({reason}){remark}")
    return True


def _owners(path: Path) -> list[tuple[int, Path]]:
    """The files that name owners of ``path``, by rising number."""
    form = re.compile(rf"\.{re.escape(path.name)}\.owner-(\d{{1,9}})")
    found = ((form.fullmatch(entry), entry) for entry in os.listdir(path.parent))
    return sorted((int(match[1]), path.with_name(name)) for match, name in found if match is not None)


def _owner(path: Path) -> dict[str, Any] | None:
    """What a file says of the owner; None where it is gone, or says nothing although a moment has passed."""
    for _ in range(_MOMENTS):
        try:
            found = parse_json(read_regular(path, follow=False))
        except FileNotFoundError:
            return None
        except ValueError:  # it is being written, or by a process that was killed
            time.sleep(_MOMENT_SECONDS)
            continue
        return found if isinstance(found, dict) else None
    return None


def _remove(owner: Path, process: int) -> None:
    """Remove the file of this process; a fork of it ends in the same way, and owns nothing."""
    if os.getpid() == process:
        owner.unlink(missing_ok=True)


def _started(pid: object) -> str | None:
    """When a process of this machine started, in the kernel's own words; None where there is none."""
    process = find_process(pid)
    return None if process is None else process.started
