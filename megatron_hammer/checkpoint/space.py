"""Checks that a checkpoint fits on its disk, before anything of it is written. Needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from megatron_hammer.base.errors import DiskError
from megatron_hammer.checkpoint.kinds import shapes_of
from megatron_hammer.config import ModelConfig

BESIDE_BYTES = 2**20  # manifest and headers: 90 bytes for each slice
BESIDE_FILES = 16  # manifest, tokenizer, folders


def checkpoint_bytes(model: ModelConfig, kinds: Mapping[str, int], style: str) -> int:
    """Bytes of a model's checkpoint under ``optimizer.style``, where an element of each kind takes so many."""
    elements = {kind: sum(map(math.prod, shapes_of(model, kind, style).values())) for kind in kinds}
    return sum(size * elements[kind] for kind, size in kinds.items()) + BESIDE_BYTES


def check_space(folder: Path, needed: int, ranks: int) -> None:
    """Refuse to begin a checkpoint of so many bytes, of so many ranks, that does not fit.

    Raises:
        DiskError: with both numbers.
    """
    status = os.statvfs(folder)
    free, files = status.f_bavail * status.f_frsize, 2 * ranks + BESIDE_FILES
    remedy = "free space there, or keep fewer checkpoints (checkpoint.keep_last); then run the same command again"
    if free < needed:
        rule = f"has {free / 1e6:,.1f} MB free where the next checkpoint needs {needed / 1e6:,.1f} MB"
        raise DiskError(3, str(folder), rule, remedy)
    if status.f_files > 0 and status.f_favail < files:  # some file systems count no files
        raise DiskError(3, str(folder), f"has {status.f_favail} inodes free where a checkpoint needs {files}", remedy)
