"""The pool of workers of multi-process tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hammer.base.cli import leave
from tests.distributed import run_distributed
from tests.faults.kills import ended, forked, needs_to_train_in_a_child


def gradient() -> int:
    weight = torch.ones(1, requires_grad=True)
    weight.sum().backward()
    return int(weight.grad)  # type: ignore[arg-type]


def process_number(rank: int) -> int:
    return os.getpid()


def test_a_child_of_a_test_leaves_what_the_test_has() -> None:
    """It ends as a program does, with its exit functions: not with those of the process that it was forked from."""
    before = run_distributed(2, process_number)
    with tempfile.TemporaryDirectory() as folder:
        assert ended(forked(lambda: leave(7))) == 7
        assert Path(folder).is_dir()
        assert run_distributed(2, process_number, timeout=30) == before


def test_a_child_computes_gradients_whatever_was_compiled_before() -> None:
    needs_to_train_in_a_child()
    with FakeTensorMode():
        torch.empty(1)
    assert gradient() == ended(forked(gradient)) == 1
