"""Whether driver and NCCL of a machine fit its torch, as far as files and what is installed tell.

Needs no torch.
"""

from __future__ import annotations

import re
from contextlib import suppress
from importlib import metadata
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVERS = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580,)}
"""For each CUDA, by the tables of minor version compatibility in NVIDIA's release notes of the toolkit and in its
"CUDA Compatibility" (docs.nvidia.com/deploy/cuda-compatibility), compared on 2026-11-30."""


def driver_version(path: Path = DRIVER) -> str | None:
    """The version of the kernel module that is loaded, such as ``550.54.14``; None where none is."""
    with suppress(OSError):
        if found := re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", path.read_text(errors="replace")):
            return found[1]
    return None


def driver_fault(driver: str | None, cuda: str) -> str | None:
    """What is wrong with a driver for a torch of this CUDA; None where nothing is, as far as is known."""
    if driver is None:
        return f"no driver of NVIDIA is loaded ({DRIVER} is not there)"
    oldest = OLDEST_DRIVERS.get(_numbers(cuda)[0])
    if oldest is None or _numbers(driver) >= oldest:
        return None
    return f"the driver {driver} is older than {'.'.join(map(str, oldest))}, which CUDA {cuda} needs"


def nccl_fault(loaded: tuple[int, ...]) -> str | None:
    """Whether the NCCL that torch has loaded is another one than that which torch was published with.

    Args:
        loaded: its version, as torch says it.
    """
    for line in metadata.requires("torch") or ():
        if (wanted := re.match(r"nvidia-nccl-\S+?\s*==\s*([\d.]+)", line)) and _numbers(wanted[1])[:3] != loaded[:3]:
            return f"NCCL {'.'.join(map(str, loaded))} is loaded, and torch was published with {wanted[1]}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
