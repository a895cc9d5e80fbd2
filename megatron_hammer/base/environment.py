"""Environment variables that a rank has where the user has not set them, whoever started it; what they say of GPUs.

Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of the drivers of NVIDIA, of AMD, and of Windows beneath Linux


def offers_gpu() -> bool:
    """Whether a driver of NVIDIA is at work here, whose GPUs nobody has hidden."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1") and os.path.exists(GPU_FILES[0])


def keep_kernels_on_this_machine() -> None:
    """Have Triton keep what it has compiled on a disk of this machine, before it is first used; only where a GPU is.

    Its default is the home folder, which the ranks of all nodes may share. Where somebody else has, or can write to, a
    folder of the name, whose code Triton would run, it stays the default.
    """
    folder = Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"
    if "TRITON_CACHE_DIR" not in os.environ and any(map(os.path.exists, GPU_FILES)) and _is_ours(folder):
        os.environ["TRITON_CACHE_DIR"] = str(folder)


def _is_ours(folder: Path) -> bool:
    """Whether it is a folder that nobody else writes to; it is made where nothing has the name."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return False
