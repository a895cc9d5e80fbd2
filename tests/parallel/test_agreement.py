"""Errors that all ranks raise together, after a start and before one."""

from __future__ import annotations

import pytest
import torch

from megatron_hammer.base.errors import CheckpointError, DataError, HammerError
from megatron_hammer.parallel.agreement import raise_together
from megatron_hammer.parallel.context import Group, ParallelContext
from tests.distributed import run_distributed

ERRORS: dict[int, HammerError] = {
    1: CheckpointError(11, "rank-00001.safetensors", "has changed since it was saved", "restore the file"),
    2: DataError(3, "p.bin", "ends too early", "write it again"),
}


def _raised(rank: int, failing: list[int]) -> str:
    ctx = ParallelContext(torch.device("cpu"), world=Group(rank, 3))
    try:
        raise_together(ctx, ERRORS[rank] if rank in failing else None)
    except HammerError as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


@pytest.mark.parametrize("failing", [[], [1], [2], [1, 2]])
def test_all_raise_the_lowest_rank_s_error_or_none(failing: list[int]) -> None:
    expected = f"{type(ERRORS[failing[0]]).__name__} {ERRORS[failing[0]]}" if failing else "nothing"
    assert run_distributed(3, _raised, failing) == [expected] * 3


def test_one_process_raises_its_own() -> None:
    raise_together(ParallelContext.single(), None)
    with pytest.raises(DataError, match="ends too early"):
        raise_together(ParallelContext.single(), ERRORS[2])
