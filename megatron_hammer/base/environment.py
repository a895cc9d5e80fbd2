"""Environment variables that a rank has where the user has not set them, whoever started it. Needs no torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def keep_kernels_on_this_machine() -> None:
    """Have Triton keep what it has compiled on a disk of this machine, before it is first used.

    Its default is the home folder, which the ranks of all nodes may share.
    """
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"triton-{os.getuid()}"))
