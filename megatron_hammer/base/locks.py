"""A lock on a file that one process holds at a time: the kernel's ``flock``, which is released when the process ends.

Some file systems have no such locks (Lustre in its default mount, some NFS). There a small file beside the locked one
names its owner instead: host, process, and the time that the process started, so that an owner that has died is
recognised on its own machine. Whether a process of another machine still lives cannot be known: then a note says so,
and the work goes on. ``open_alone`` opens a temporary file that only one process may write. No torch.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.base.system import find_process, locks_held

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # what such file systems answer


def take_lock(descriptor: int, path: Path, note: Callable[[str], None] = say) -> bool:
    """Take the exclusive lock of an open file without waiting; closing it gives the lock up.

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
        return _claim(path.with_name(f".{path.name}.owner"), path, error.strerror or str(error), note)


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


def _claim(owner_path: Path, path: Path, reason: str, note: Callable[[str], None]) -> bool:
    """Write ourselves down as the owner of ``path``; False where one that lives is there."""
    ours = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    try:
        theirs = parse_json(read_regular(owner_path, follow=False))
    except (FileNotFoundError, ValueError):
        theirs = None
    remark = ""
    if isinstance(theirs, dict) and theirs != ours:
        if theirs.get("host") == ours["host"]:
            if theirs.get("started") is not None and _started(theirs.get("pid")) == theirs["started"]:
                return False
        else:
            remark = f"; process {theirs.get('pid')} of {theirs.get('host')} was the last: make sure that it has ended"
    note(f"note: {path}: its file system has no locks ({reason}){remark}")
    owner_path.write_text(json.dumps(ours))
    atexit.register(owner_path.unlink, missing_ok=True)
    return True


def _started(pid: object) -> str | None:
    """When a process of this machine started, in the kernel's own words; None where there is none."""
    process = find_process(pid)
    return None if process is None else process.started
