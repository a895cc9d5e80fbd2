"""System calls that differ between operating systems: everything that Linux has and macOS lacks is in this module.

::

    purpose                      Linux                        macOS, and any other POSIX system
    cores of this process        sched_getaffinity            all cores of the machine
    what is written is durable   fsync                        F_FULLFSYNC: fsync stops at the disk's own cache there
    past the page cache          O_DIRECT                     F_NOCACHE
    memory of several processes  memfd_create                 an unlinked file in the folder for temporary ones
    a process's state, parents   /proc                        ps
    end with the parent          parent-death signal          a thread that looks once a second
    adopt orphaned descendants   PR_SET_CHILD_SUBREAPER       nothing: several ranks are refused (``require_linux``)
    resident memory, its peak    /proc/self                   ps, getrusage (bytes there, KiB on Linux)
    hints: huge pages, fadvise,  madvise, posix_fadvise,      nothing: the work is the same without them
      batch scheduling             sched_setscheduler

What has no equivalent elsewhere is refused before it begins: ``require_linux`` (``errors.py``), E292. Windows has no
POSIX and is refused where the package is imported (``megatron_hammer/__init__.py``). ``tests/base/test_system.py``
checks that no other module makes such calls, and runs the chain from text to an export with everything taken away that
macOS lacks. Needs no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

IS_LINUX = sys.platform == "linux"
LOOPBACK = "lo" if IS_LINUX else "lo0"
"""The network interface of 127.0.0.1."""
PARENT_SECONDS = 1.0
"""Between two looks at the parent, where the kernel does not tell of its end."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_SIOCGIFADDR = 0x8915  # linux/sockios.h
_PROCESSES = Path("/proc")

C = ctypes.CDLL(None, use_errno=True)
"""The C library of this process."""


def _read(path: str) -> str:
    """A file of the kernel; empty where it is not there."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# ---- processors ------------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor_text() -> str:
    """What the kernel says of the processors, instruction sets among it; empty where it says nothing."""
    return _read("/proc/cpuinfo")


def processor_name() -> str:
    """As its maker calls it, where the kernel says so."""
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", processor_text(), re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


def take_no_core_by_waking() -> None:
    """This thread, and those that it starts from now on, wait for a free core when they wake (SCHED_BATCH)."""
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # where a sandbox forbids it, messages cost more and nothing else changes
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


# ---- files -----------------------------------------------------------------------------------------------------------


def sync(descriptor: int) -> None:
    """Have the disk itself keep what was written to a file, or the names of a folder."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:  # network file systems do not know it
            if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY):
                raise
    os.fsync(descriptor)


def begin_to_write_out(descriptor: int, first: int, count: int) -> None:
    """Have the system begin to write a range of a file to the disk, and let it go from memory; a wish."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, first, count, os.POSIX_FADV_DONTNEED)


def set_direct(descriptor: int, wanted: bool = True) -> bool:
    """Turn reading and writing past the page cache on or off for an open file; returns what it is then.

    Asked after opening, since a refused open may have made the file.
    """
    try:
        if hasattr(os, "O_DIRECT"):
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if wanted else flags & ~os.O_DIRECT)
        elif (no_cache := getattr(fcntl, "F_NOCACHE", None)) is not None:
            fcntl.fcntl(descriptor, no_cache, int(wanted))
        else:
            return False
    except OSError as error:
        if error.errno != errno.EINVAL or not wanted:
            raise
        return False
    return wanted


def open_direct(descriptor: int) -> int | None:
    """A second descriptor of an open file that reads past the page cache; None where there is none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        # The same file, whatever its name stands for by now.
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return None


def open_descriptors() -> list[int]:
    """All descriptors that this process has open, and that of the list itself."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc/self/fd" if IS_LINUX else "/dev/fd")]
    return []


def read_at(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill flat bytes from a file, from ``offset`` on; the count, 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    part = os.pread(descriptor, len(view), offset)  # macOS before 11
    view[: len(part)] = part
    return len(part)


def end_of_hole(descriptor: int, at: int) -> int:
    """The first byte of a file from ``at`` on that lies in no hole, or its size; ``at`` if nobody can tell."""
    if hasattr(os, "SEEK_DATA"):
        with contextlib.suppress(OSError):
            here = os.lseek(descriptor, 0, os.SEEK_CUR)
            try:
                return os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return max(at, os.fstat(descriptor).st_size)
            finally:  # a buffer over it counts from there
                os.lseek(descriptor, here, os.SEEK_SET)
    return at


def locks_held() -> list[str] | None:
    """The kernel's lines on locks of files that processes of this machine hold; None where it has no such list."""
    return _read("/proc/locks").splitlines() if os.path.exists("/proc/locks") else None


# ---- memory ----------------------------------------------------------------------------------------------------------


def shared_memory_file(name: str) -> int:
    """An open file without a name and of no bytes, for memory that processes share by its descriptor."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create(name)
    descriptor, path = tempfile.mkstemp(prefix=name.replace(" ", "-"))
    os.unlink(path)
    return descriptor


def take_memory(descriptor: int, size: int) -> mmap.mmap:
    """Memory of a file of ``shared_memory_file``, all of it taken from the machine now.

    Raises:
        OSError: there is not so much.
    """
    with _any_file_size():
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))


@contextlib.contextmanager
def _any_file_size() -> Iterator[None]:
    """Within the block a limit on the sizes of files does not count, as far as this process may lift it: memory that
    processes share is a file to the kernel, and the limit is meant for disks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def on_huge_pages(memory: mmap.mmap, first: int, size: int) -> None:
    """Have a range of memory lie on huge pages; a wish."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, first, size)


def memory_bytes() -> tuple[int, int | None]:
    """Of this machine, and the limit of this container, where there is one."""
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE, int(limit) if limit.isdigit() else None


def resident_bytes() -> int:
    """Resident memory of this process, now."""
    with contextlib.suppress(OSError):
        return int((_PROCESSES / "self/statm").read_text().split()[1]) * resource.getpagesize()
    return int(_ps("rss", os.getpid()) or 0) * 1024


def peak_resident_bytes() -> int:
    """The most that was ever resident of this process, or since ``reset_peak``."""
    with contextlib.suppress(OSError):
        lines = (_PROCESSES / "self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Count the peak from now on, where the kernel allows it; else it stays that of the whole process."""
    with contextlib.suppress(OSError):
        (_PROCESSES / "self/clear_refs").write_text("5")  # resets VmHWM (proc(5))


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process of this machine."""

    state: str
    """A letter: R runs, S sleeps, D (macOS: U) waits for a device, T is stopped, Z has ended."""
    parent: int
    cpu_seconds: float
    started: str
    """When it was started, in the system's own words: no other process of its number has the same."""


def find_process(pid: object) -> Process | None:
    """A process by its number; None where there is none."""
    if _PROCESSES.is_dir():
        try:
            stat = (_PROCESSES / str(pid) / "stat").read_text()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # what stands behind its name, which may hold anything (proc(5))
        return Process(fields[0], int(fields[1]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
                       fields[19])  # fmt: skip
    fields = _ps("state=,ppid=,time=,lstart", pid).split(maxsplit=3)
    if len(fields) < 4:
        return None
    seconds = 0.0
    for part in fields[2].replace("-", ":").split(":"):  # minutes and seconds on macOS, hours before them elsewhere
        seconds = seconds * 60 + float(part)
    return Process(fields[0][0], int(fields[1]), seconds, fields[3].strip())


def parents() -> dict[int, int]:
    """Each process's parent, as the kernel sees it."""
    found = {}
    if _PROCESSES.is_dir():
        for folder in _PROCESSES.iterdir():
            if folder.name.isdigit() and (process := find_process(folder.name)) is not None:
                found[int(folder.name)] = process.parent
        return found
    for line in _ps("pid=,ppid", None).splitlines():
        pid, parent = line.split()
        found[int(pid)] = int(parent)
    return found


def wait_channel(pid: int) -> str:
    """The function of the kernel in which a process sleeps; empty where the kernel does not tell."""
    try:
        return (_PROCESSES / str(pid) / "wchan").read_text()
    except OSError:
        return ""


def command_of(pid: int) -> bytes:
    """The words that a process was started with, NUL between them; empty where that cannot be told."""
    with contextlib.suppress(OSError):
        return (_PROCESSES / str(pid) / "cmdline").read_bytes()
    return b""


def open_of_process(pid: int, descriptor: int) -> int:
    """Open what another process has open, for reading and writing.

    Raises:
        OSError: it cannot be opened, as everywhere but on Linux.
    """
    return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)


def _ps(columns: str, pid: object) -> str:
    """What ``ps`` says of a process, or of all; empty where there is none, or no such program."""
    which = ["-A"] if pid is None else ["-p", str(pid)]
    try:
        words = ["ps", *which, "-o", f"{columns}="]
        return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    except OSError:
        return ""


def die_with_parent(parent: int) -> None:
    """Kill this process when its parent, of this id, dies, however that happens.

    On Linux the kernel does it at once. Elsewhere a thread looks every ``PARENT_SECONDS``; it does not outlive an
    ``exec``, so that a program which is started by that must see to it itself.
    """
    if IS_LINUX:
        C.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch_parent, args=(parent,), name="parent", daemon=True).start()
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans(here: bool) -> None:
    """Have the kernel give this process the children of its descendants that die, or give that up; Linux only."""
    if IS_LINUX:
        C.prctl(_PR_SET_CHILD_SUBREAPER, int(here))


# ---- network ---------------------------------------------------------------------------------------------------------


def interface_address(probe: int, name: str) -> bytes | None:
    """The four bytes of a network interface's IPv4 address, asked through any socket; None where it has none."""
    if not IS_LINUX:
        return None
    try:
        return fcntl.ioctl(probe, _SIOCGIFADDR, name.encode()[:15].ljust(256, b"\0"))[20:24]
    except OSError:
        return None
