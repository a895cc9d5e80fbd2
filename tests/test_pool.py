"""The pool of workers of multi-process tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_hammer.base.cli import leave
from tests.distributed import run_distributed
from tests.faults.kills import ended, forked


def process_number(rank: int) -> int:
    return os.getpid()


def test_a_child_of_a_test_leaves_what_the_test_has() -> None:
    """It ends as a program does, with its exit functions: not with those of the process that it was forked from."""
    before = run_distributed(2, process_number)
    with tempfile.TemporaryDirectory() as folder:
        assert ended(forked(lambda: leave(7))) == 7
        assert Path(folder).is_dir()
        assert run_distributed(2, process_number, timeout=30) == before
