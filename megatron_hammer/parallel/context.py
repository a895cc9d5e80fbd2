"""The groups of ranks that this rank communicates with. They are passed to whatever needs them, never looked up.

``ParallelContext`` has one ``Group`` for each axis of the grid (``grid.py``), and one for what sums gradients. A group
of size 1 never communicates, so one process runs the same code as many.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.grid import Axis, Grid


@dataclass(frozen=True)
class Group:
    """Some ranks that communicate; ``rank`` is the position within them."""

    rank: int = 0
    size: int = 1
    handle: Any = field(default=None, repr=False, compare=False)
    """torch's process group; None when size is 1 or the group is the whole world."""
    status: StatusSlot = field(default_factory=StatusSlot, repr=False, compare=False)
    """Where the collectives of this group are noted, for whoever watches this rank."""

    @property
    def process_group(self) -> Any:
        """torch's process group, for libraries that take no None for the whole world. Only where size is above 1."""
        return dist.group.WORLD if self.handle is None else self.handle


@dataclass(frozen=True)
class Links:
    """The ways to the neighbouring stages of a pipeline, whose ranks are a ring: one for each direction of each kind.

    A link is a group of two ranks on which one sends and the other receives, first in, first out. With NCCL a group is
    a queue of a GPU: were a receive that waits and a send that could go in the same one, the send would wait too, and
    with both neighbours doing so, for ever.
    """

    forward_in: Group = field(default_factory=Group)
    """From the stage before: hidden states."""
    forward_out: Group = field(default_factory=Group)
    """To the stage after."""
    backward_in: Group = field(default_factory=Group)
    """From the stage after: the gradient of the hidden states."""
    backward_out: Group = field(default_factory=Group)
    """To the stage before."""


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
    ends: Group = field(default_factory=Group)
    """First and last pipeline rank; size 1 on the others."""
    links: Links = field(default_factory=Links)
    shard: Group = field(default_factory=Group)
    """Where states are divided over a part of ``dp`` only: this part. Else a group of one rank."""
    copies: Group = field(default_factory=Group)
    """Ranks of ``dp`` that hold the same shards as this one."""
    whole: Group = field(default_factory=Group)
    """Ranks that have all states of their layers between them, once: ``sharing`` and ``tp`` together, of which ``tp``
    is the faster axis. The same group as one of these where the other has one rank."""
    status: StatusSlot = field(default_factory=StatusSlot, compare=False)
    """Where this rank notes what it does."""

    @property
    def sharing(self) -> Group:
        """The ranks that divide one copy of the states among them: ``shard`` where there are copies, else ``dp``."""
        return self.dp if self.copies.size == 1 else self.shard

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process that never communicates."""
        return cls(torch.device(device))


def build_parallel_context(
    grid: Grid, device: torch.device, timeout_seconds: float | None = None, status: StatusSlot | None = None
) -> ParallelContext:
    """Cut torch's default process group into the groups of the grid; a grid of one rank needs none.

    Every rank makes every group, in the same order, as torch demands. A group of the whole world is torch's default
    group and no second communicator.

    Args:
        timeout_seconds: after which a collective of any of these groups fails; None: torch's default (30 minutes on
            gloo, 10 on NCCL), whatever the default group has.
        status: of this rank; its collectives are noted there.
    """
    status = StatusSlot() if status is None else status
    if grid.world_size == 1:
        return ParallelContext(device, status=status)
    rank, size = dist.get_rank(), dist.get_world_size()
    assert size == grid.world_size, f"the process group has {size} ranks, the grid {grid.world_size}"
    order: tuple[Axis, ...] = ("tp", "cp", "replicas", "pp", "kv", "ends")
    timeout = None if timeout_seconds is None else datetime.timedelta(seconds=timeout_seconds)
    groups = {str(axis): _own_group(grid.groups(axis), rank, timeout, status) for axis in order}
    dp = groups.pop("replicas")
    samples = dp if grid.cp == 1 else _own_group(grid.groups("dp"), rank, timeout, status)
    if grid.copies > 1:
        divided: tuple[Axis, ...] = ("shard", "copies")
        groups |= {str(axis): _own_group(grid.groups(axis), rank, timeout, status) for axis in divided}
    of_axis = {**groups, "replicas": dp}
    axis = grid.whole_axis
    groups["whole"] = of_axis[axis] if axis in of_axis else _own_group(grid.groups(axis), rank, timeout, status)
    links = _build_links(grid, rank, device, timeout, status)
    world = Group(rank, size, status=status)
    return ParallelContext(device, world, dp=dp, samples=samples, links=links, status=status, **groups)


def _build_links(
    grid: Grid, rank: int, device: torch.device, timeout: datetime.timedelta | None, status: StatusSlot
) -> Links:
    """Make all links of the world, as torch demands, and open this rank's: send something over each.

    So none has to be opened in the middle of a step. Both ends of each come to it in the same order.
    """
    found = {}
    for ring in grid.groups("pp") if grid.pp > 1 else []:
        for kind, ahead in (("forward", 1), ("backward", -1)):
            for place, source in enumerate(ring):
                target = ring[(place + ahead) % len(ring)]
                members = sorted((source, target))  # as torch counts them
                handle = _new_group(members, timeout, status)
                if rank not in members:
                    continue
                name, other = (f"{kind}_out", target) if rank == source else (f"{kind}_in", source)
                found[name] = Group(members.index(rank), 2, handle, status)
                with status.waits():
                    (dist.send if rank == source else dist.recv)(torch.zeros(1, device=device), other, group=handle)
    return Links(**found)


def _new_group(members: list[int], timeout: datetime.timedelta | None, status: StatusSlot) -> Any:
    """torch's process group; with NCCL all ranks wait for each other in each, whoever its members are."""
    status.mark("making groups of ranks")  # of a thousand it takes minutes: each is a sign of life
    with status.waits():
        return dist.new_group(members, timeout=timeout)


def _own_group(partition: list[list[int]], rank: int, timeout: datetime.timedelta | None, status: StatusSlot) -> Group:
    """Make all groups of a partition of the world; return the one that holds ``rank``."""
    own = Group()
    for members in partition:
        handle = None
        if len(members) > 1:
            handle = dist.group.WORLD if len(partition) == 1 else _new_group(members, timeout, status)
        if rank in members:
            own = Group(members.index(rank), len(members), handle, status)
    return own
