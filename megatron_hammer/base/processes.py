"""Other processes of this machine, as the kernel's ``/proc/PID/stat`` describes them. Linux; needs no torch."""

from __future__ import annotations

from pathlib import Path

KILL_SECONDS = 10.0
"""For a killed process to be gone: milliseconds, unless it waits in the kernel for a disk or a device (state D)."""
STATE, PARENT, STARTED = 0, 1, 19  # positions in ``stat_fields``
USER_TICKS, SYSTEM_TICKS = 11, 12


def stat_fields(pid: object) -> list[str] | None:
    """What stands behind a process's name, which may hold anything; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()


def outlives_a_kill(pid: int) -> str:
    """What to say of a process that is still there so long after SIGKILL."""
    fields = stat_fields(pid)
    state = "unknown" if fields is None else fields[STATE]
    return (
        f"process {pid} has not ended {KILL_SECONDS:g} s after SIGKILL (state {state}): it is left to the kernel, "
        "which ends it when the disk or the device that it waits for answers"
    )


def parents() -> dict[int, int]:
    """Each process's parent, as the kernel sees it."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := stat_fields(folder.name)) is not None:
            found[int(folder.name)] = int(fields[PARENT])
    return found
