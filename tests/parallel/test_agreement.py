"""Errors that all ranks raise together, after a start and before one."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import CheckpointError, DataError, HammerError
from megatron_hammer.parallel.agreement import BeforeStart, Fact, all_or_none, raise_together
from megatron_hammer.parallel.context import Group, ParallelContext
from megatron_hammer.parallel.rendezvous import host_store, join_store
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


def _done(rank: int, failing: int) -> str:
    ctx = ParallelContext(torch.device("cpu"), world=Group(rank, 3))
    try:
        with all_or_none(ctx, "looking around"):
            if rank == failing:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done = "done"
        return done
    except HammerError as error:
        return f"{type(error).__name__} {error}"


def test_a_block_is_done_on_all_ranks_or_on_none() -> None:
    assert run_distributed(3, _done, 3) == ["done"] * 3
    found = run_distributed(3, _done, 2)
    assert len(set(found)) == 1 and found[0].startswith("DiskError") and "looking around failed" in found[0]


# ---- before the start -----------------------------------------------------------------------------------------------


def start_together(size: int, work: Callable[[BeforeStart], Any]) -> list[Any]:
    """Run ``work`` as every rank, each in a thread, over one store; what each returned, or the error it raised."""
    meeting = host_store("127.0.0.1", 0, 20)

    def one(rank: int) -> Any:
        store = join_store(meeting.address, meeting.port, 20).store
        try:
            return work(BeforeStart(store, rank, size))
        except HammerError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def test_all_hear_what_rank_0_tells() -> None:
    def work(ranks: BeforeStart) -> list[Any]:
        heard = []
        for name in ("first", "second"):
            with ranks.round(name) as mine:
                mine.sent = {name: ranks.rank}
                mine.facts = [Fact("seed", "train.seed is", "5", "use one")]
            heard.append(mine.received)
        return heard

    assert start_together(3, work) == [[{"first": 0}, {"second": 0}]] * 3


@pytest.mark.parametrize("failing", [[0], [1], [2, 1]])
def test_one_error_before_the_start_is_raised_by_all(failing: list[int]) -> None:
    def work(ranks: BeforeStart) -> None:
        with ranks.round("inputs") as mine:
            mine.facts = [Fact("seed", "train.seed is", str(ranks.rank), "use one")]  # an error comes before them
            if ranks.rank in failing:
                raise DataError(3, f"file of rank {ranks.rank}", "ends too early", "write it again")

    found = start_together(3, work)
    assert {str(error) for error in found} == {
        f"error[E303]: file of rank {min(failing)} ends too early; write it again"
    }


def test_a_file_that_cannot_be_read_is_an_error_of_all() -> None:
    def work(ranks: BeforeStart) -> None:
        with ranks.round("inputs"):
            if ranks.rank == 1:
                raise OSError(5, "Input/output error", "/some/file")

    assert ["E601" in str(error) for error in start_together(2, work)] == [True, True]


@pytest.mark.parametrize("where", [1, 2])
def test_a_fact_that_differs_names_rank_and_file(where: int) -> None:
    def work(ranks: BeforeStart) -> None:
        value = "fingerprint b" if ranks.rank == where else "fingerprint a"
        with ranks.round("inputs") as mine:
            mine.facts = [Fact("source 1", f"/node{ranks.rank}/zh.bin has", value, "copy it")]

    assert {str(error) for error in start_together(3, work)} == {
        f"error[E585]: rank {where}: /node{where}/zh.bin has fingerprint b where rank 0's /node0/zh.bin has "
        "fingerprint a; copy it"
    }


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_fact_that_one_rank_lacks(lacking: int) -> None:
    def work(ranks: BeforeStart) -> None:
        with ranks.round("inputs") as mine:
            mine.facts = [] if ranks.rank == lacking else [Fact("data.valid[zh]", "/zh.bin has", "3 tokens", "copy it")]

    assert {str(error) for error in start_together(2, work)} == {
        f"error[E585]: rank {lacking}: data.valid[zh] is not there, where rank {1 - lacking}'s /zh.bin has 3 tokens; "
        "copy it"
    }


def test_a_single_process_agrees_with_itself() -> None:
    ranks = BeforeStart(None, 0, 1)
    with ranks.round("inputs") as mine:
        mine.sent = "a"
    assert mine.received == "a"
    with pytest.raises(DataError), ranks.round("more"):
        raise ERRORS[2]
