"""Faults for tests: an environment variable makes a process fail at a chosen point of its work.

Where the variable is not set, as in every real run, nothing happens.

``HAMMER_FAULT=KIND@PHASE[,rank=R][,step=S][,part=WORD]`` (several with ``;`` between) says what happens, and where::

    kill@rename,step=20          every rank that renames the checkpoint of step 20 is killed at that moment
    full@write,rank=1            the disk of rank 1 is full in each of its saves
    stop@write,part=background   the process that writes for a rank hangs
    kill-all@fsync,step=20       a rank's whole process group is killed with it

Phases of a save, in order: ``stage`` (the staging folder is there), ``write`` (before the first byte of a rank's
file), ``fsync`` (all its bytes are written), ``manifest``, ``rename`` (all is durable under its temporary name),
``after-rename``, and ``prune`` of the process that writes in the background. Needs no torch.
"""

from __future__ import annotations

import errno
import os
import signal
import time

VARIABLE = "HAMMER_FAULT"
SLOW_SECONDS = 0.5
KINDS = ("kill", "kill-all", "stop", "raise", "full", "io", "slow")


def fault_point(phase: str, rank: int, step: int, part: str = "") -> None:
    """Do here what ``HAMMER_FAULT`` asks for, if anything.

    Args:
        part: tells a process that works for a rank from the rank itself.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    here = {"rank": str(rank), "step": str(step), "part": part}
    for fault in wanted.split(";"):
        kind, _, place = fault.partition("@")
        where, *conditions = place.split(",")
        assert kind in KINDS, f"{VARIABLE}: {kind!r} is none of {', '.join(KINDS)}"
        if where == phase and all(here[name] == value for name, _, value in (c.partition("=") for c in conditions)):
            _happen(kind, f"{VARIABLE}={fault}")


def _happen(kind: str, why: str) -> None:
    if kind == "kill-all":
        os.killpg(0, signal.SIGKILL)
    elif kind in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    elif kind in ("full", "io"):
        number = errno.ENOSPC if kind == "full" else errno.EIO
        raise OSError(number, os.strerror(number))
    elif kind == "slow":
        time.sleep(SLOW_SECONDS)
    else:
        raise RuntimeError(why)
