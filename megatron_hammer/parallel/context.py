"""This rank's groups: with whom it shares what. Groups are passed to whatever needs them, never looked up.

``ParallelContext`` has one ``Group`` for each axis of the grid (``grid.py``), and one for what sums gradients. A group
of size 1 never communicates, so one process runs the same code as many.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_hammer.parallel.grid import Axis, Grid


@dataclass(frozen=True)
class Group:
    """Some ranks that communicate; ``rank`` is the position within them."""

    rank: int = 0
    size: int = 1
    handle: Any = field(default=None, repr=False, compare=False)
    """torch's process group; None when size is 1 or the group is the whole world."""

    @property
    def process_group(self) -> Any:
        """torch's process group, for libraries that take no None for the whole world. Only where size is above 1."""
        return dist.group.WORLD if self.handle is None else self.handle


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the grid; built once, passed to whatever needs a group."""

    device: torch.device
    world: Group = field(default_factory=Group)
    tp: Group = field(default_factory=Group)
    cp: Group = field(default_factory=Group)
    dp: Group = field(default_factory=Group)
    """All ranks that hold the same weights, the ``replicas`` of the grid: those that see other samples and, under
    context parallelism, other parts of the same ones. Gradients and losses are summed over it, without any factor."""
    samples: Group = field(default_factory=Group)
    """The grid's axis dp alone: ranks that read different samples. The same group as ``dp`` where cp is 1."""
    pp: Group = field(default_factory=Group)
    kv: Group = field(default_factory=Group)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process that never communicates."""
        return cls(torch.device(device))


def build_parallel_context(grid: Grid, device: torch.device, timeout_seconds: float | None = None) -> ParallelContext:
    """Cut torch's default process group into the groups of the grid; a grid of one rank needs none.

    Every rank makes every group, in the same order, as torch demands. A group of the whole world is torch's default
    group and no second communicator.

    Args:
        timeout_seconds: after which a collective of any of these groups fails; None: torch's default (30 minutes on
            gloo, 10 on NCCL), whatever the default group has.
    """
    if grid.world_size == 1:
        return ParallelContext.single(device)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == grid.world_size, f"the process group has {size} ranks, the grid {grid.world_size}"
    order: tuple[Axis, ...] = ("tp", "cp", "replicas", "pp", "kv")
    timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
    groups = {str(axis): _own_group(grid.groups(axis), rank, timeout) for axis in order}
    dp = groups.pop("replicas")
    samples = dp if grid.cp == 1 else _own_group(grid.groups("dp"), rank, timeout)
    return ParallelContext(device, Group(rank, size), dp=dp, samples=samples, **groups)


def _own_group(partition: list[list[int]], rank: int, timeout: datetime.timedelta | None) -> Group:
    """Make all groups of a partition of the world; return the one that holds ``rank``."""
    own = Group()
    for members in partition:
        handle = None
        if len(members) > 1:
            handle = dist.group.WORLD if len(partition) == 1 else dist.new_group(members, timeout=timeout)
        if rank in members:
            own = Group(members.index(rank), len(members), handle)
    return own
