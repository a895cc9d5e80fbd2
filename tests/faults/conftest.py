"""The dataset of runs that train, and a small tokenizer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dataset.conftest import tokenizer
from tests.train.conftest import data

__all__ = ["data", "memory_folder", "tokenizer"]


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: hundreds of fsyncs take minutes on a busy disk, and nothing here tests the disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))  # a TemporaryDirectory is removed by forked programs at their end
    yield folder
    shutil.rmtree(folder)
