"""Other processes of this machine, as the kernel's ``/proc/PID/stat`` describes them. Linux; needs no torch."""

from __future__ import annotations

from pathlib import Path

STATE, PARENT, STARTED = 0, 1, 19  # positions in ``stat_fields``
USER_TICKS, SYSTEM_TICKS = 11, 12


def stat_fields(pid: object) -> list[str] | None:
    """What stands behind a process's name, which may hold anything; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()


def parents() -> dict[int, int]:
    """Each process's parent, as the kernel sees it."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := stat_fields(folder.name)) is not None:
            found[int(folder.name)] = int(fields[PARENT])
    return found
