"""The time that a killed process gets to end, and the message for one that takes longer. Needs no torch."""

from __future__ import annotations

from megatron_hammer.base.system import find_process

KILL_SECONDS = 10.0
"""For a killed process to be gone: milliseconds, unless it waits in the kernel for a disk or a device (state D)."""


def outlives_a_kill(pid: int) -> str:
    """What to say of a process that is still there so long after SIGKILL."""
    process = find_process(pid)
    state = "unknown" if process is None else process.state
    return (
        f"process {pid} has not ended {KILL_SECONDS:g} s after SIGKILL (state {state}): it is left to the kernel, "
        "which ends it when the disk or the device that it waits for answers"
    )
