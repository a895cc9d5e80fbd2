"""The grid of ranks: its groups are those of the drawing, and every axis cuts the whole world."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.context import build_parallel_context
from megatron_hammer.parallel.fake_world import fake_world
from megatron_hammer.parallel.grid import AXES, Grid, build_grid
from tests.distributed import run_distributed


def test_groups_of_the_drawing() -> None:
    grid = build_grid(8, tp=4, query_groups=2)
    assert grid == Grid(pp=1, dp=2, cp=1, tp=4, kv=2)
    assert grid.groups("tp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid.groups("dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.groups("kv") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("pp") == grid.groups("cp") == [[rank] for rank in range(8)]


def test_all_four_axes() -> None:
    """World 16 as [pp, dp, cp, tp] = [2, 2, 2, 2]: each axis strides over those after it; dp x cp are the replicas."""
    grid = build_grid(16, tp=2, cp=2, pp=2)
    assert grid.dp == 2 and grid.world_size == 16
    starts = {axis: grid.groups(axis)[0] for axis in AXES}
    assert starts == {"pp": [0, 8], "dp": [0, 4], "cp": [0, 2], "tp": [0, 1]}
    assert grid.groups("replicas") == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]


@pytest.mark.parametrize("sizes", list(itertools.product((1, 2, 3), repeat=4)))
def test_every_axis_partitions_the_world(sizes: tuple[int, int, int, int]) -> None:
    pp, dp, cp, tp = sizes
    grid = build_grid(pp * dp * cp * tp, tp=tp, cp=cp, pp=pp)
    assert grid.dp == dp
    for axis in (*AXES, "replicas"):
        groups = grid.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(grid.world_size))
        assert {len(group) for group in groups} == {grid.size(axis)}
    ends = grid.groups("ends")
    assert sorted(rank for group in ends for rank in group) == list(range(grid.world_size))
    assert [group for group in ends if len(group) > 1] == [[row[0], row[-1]] for row in grid.groups("pp") if pp > 1]


def test_two_ranks_share_at_most_one_axis() -> None:
    grid = build_grid(24, tp=2, cp=3, pp=2)
    for a, b in itertools.combinations(range(24), 2):
        assert sum({a, b} <= set(group) for axis in AXES for group in grid.groups(axis)) <= 1


@pytest.mark.parametrize("tp, groups, copies", [(1, 1, 1), (2, 8, 1), (4, 4, 1), (8, 2, 4), (8, 1, 8)])
def test_copies_of_key_and_value_heads(tp: int, groups: int, copies: int) -> None:
    assert build_grid(8, tp=tp, query_groups=groups).kv == copies


GROUPS = {"pp": "pp", "dp": "replicas", "samples": "dp", "cp": "cp", "tp": "tp", "kv": "kv"}
"""What each group of the context is in the grid."""


def _own_groups(rank: int, grid: Grid) -> dict[str, tuple[int, int, float]]:
    """(position, size, sum of the members' ranks over a real collective) of each group."""
    ctx = build_parallel_context(grid, torch.device("cpu"))
    found = {}
    for axis in GROUPS:
        group, total = getattr(ctx, axis), torch.tensor(float(rank))
        if group.size > 1:
            dist.all_reduce(total, group=group.handle)
        found[axis] = (group.rank, group.size, float(total))
    return found


@pytest.mark.parametrize("grid", [build_grid(8, tp=4, query_groups=2), build_grid(8, tp=2, cp=2)], ids=str)
def test_the_context_is_made_of_the_grid(grid: Grid) -> None:
    for rank, found in enumerate(run_distributed(8, _own_groups, grid)):
        for name, axis in GROUPS.items():
            members = next(group for group in grid.groups(axis) if rank in group)
            assert found[name] == (members.index(rank), len(members), float(sum(members))), (rank, name)


def _timeouts(rank: int) -> list[float | None]:
    """Of the tp, kv and dp groups on TP 2 x DP 2 with one query group; None for the world's own group."""
    ctx = build_parallel_context(build_grid(4, tp=2, query_groups=1), torch.device("cpu"), timeout_seconds=7)
    found: list[float | None] = []
    for group in (ctx.tp, ctx.kv, ctx.dp):
        backend = group.process_group._get_backend(torch.device("cpu"))
        found.append(backend.options._timeout.total_seconds())
    return found


def test_every_group_has_the_run_s_timeout() -> None:
    assert run_distributed(4, _timeouts) == 4 * [[7.0, 7.0, 7.0]]


def _is_the_world(rank: int) -> tuple[bool, bool]:
    ctx = build_parallel_context(build_grid(2, tp=1), torch.device("cpu"))
    return ctx.dp.process_group is dist.group.WORLD, ctx.tp.handle is None


def test_a_group_of_the_whole_world_is_no_second_communicator() -> None:
    assert run_distributed(2, _is_the_world) == 2 * [(True, True)]


def test_a_rank_that_makes_groups_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NCCL all ranks come to each group, whoever its members are: whom they wait for is the one that hangs."""
    status, new_group, waited = StatusSlot(), dist.new_group, list[bool]()
    monkeypatch.setattr(
        dist, "new_group", lambda *a, **more: (waited.append(status.is_waiting), new_group(*a, **more))[1]
    )
    with fake_world(0, 8):
        build_parallel_context(build_grid(8, tp=2, pp=2), torch.device("meta"), status=status)
    assert len(waited) > 8 and all(waited) and not status.is_waiting
