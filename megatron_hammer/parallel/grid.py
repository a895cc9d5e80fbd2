"""Which rank shares what with whom: the rank grid as one array, and groups that are passed, never looked up.

The world is laid out as ``[dp, tp]`` with tensor-parallel ranks side by side (fastest links)::

    world 8, TP 4:   tp groups {0 1 2 3} {4 5 6 7}     dp groups {0 4} {1 5} {2 6} {3 7}

With more tensor-parallel ranks than query groups, each query group's key/value heads live on ``tp / g`` neighbouring
ranks; these are the ``kv`` group. A ``Group`` of size 1 never communicates, so one process runs the same code as many.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_hammer.base.errors import HammerError, from_fields, to_fields


@dataclass(frozen=True)
class Group:
    """Some ranks that communicate; ``rank`` is the position within them."""

    rank: int = 0
    size: int = 1
    handle: Any = field(default=None, repr=False, compare=False)
    """torch's process group; None when size is 1 or the group is the whole world."""


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place in the grid; built once, passed to whatever needs a group."""

    device: torch.device
    world: Group = field(default_factory=Group)
    tp: Group = field(default_factory=Group)
    dp: Group = field(default_factory=Group)
    kv: Group = field(default_factory=Group)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process that never communicates."""
        return cls(torch.device(device))

    def raise_together(self, error: HammerError | None) -> None:
        """Raise the lowest failing rank's error on every rank, or return on every rank. Communicates over the world.

        Call it on all ranks at the end of work in which a single rank may fail (reading or writing files): a rank that
        raises alone would leave the others waiting in their next collective.
        """
        if self.world.size == 1:
            if error is not None:
                raise error
            return
        payload = b"" if error is None else json.dumps(to_fields(error)).encode()
        size = torch.tensor([len(payload)], device=self.device)
        dist.all_reduce(size, op=dist.ReduceOp.MAX)
        length = int(size.item())
        if length == 0:
            return
        mine = torch.zeros(length, dtype=torch.uint8, device=self.device)
        mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
        everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(everyone, mine)
        for report in everyone:
            text = bytes(report.tolist()).rstrip(b"\0")
            if text:
                raise from_fields(json.loads(text))


def build_parallel_context(
    tensor_model_parallel_size: int, num_query_groups: int, device: torch.device
) -> ParallelContext:
    """Cut torch's default process group (or one process, when there is none) into the grid's groups.

    Every rank makes every group, in the same order, as torch demands.
    """
    if not dist.is_initialized():
        return ParallelContext.single(device)
    rank, size, tp = dist.get_rank(), dist.get_world_size(), tensor_model_parallel_size
    assert size % tp == 0, f"world size {size} must be a multiple of tensor_model_parallel_size {tp}"
    grid = [list(range(first, first + tp)) for first in range(0, size, tp)]  # [dp, tp]
    columns = [[row[i] for row in grid] for i in range(tp)]
    replicas = max(1, tp // num_query_groups)
    copies = [row[i : i + replicas] for row in grid for i in range(0, tp, replicas)]
    return ParallelContext(
        device,
        world=Group(rank, size),
        tp=_own_group(grid, rank),
        dp=_own_group(columns, rank),
        kv=_own_group(copies, rank),
    )


def _own_group(partition: list[list[int]], rank: int) -> Group:
    """Make all groups of a partition of the world; return the one that holds ``rank``."""
    own = Group()
    for members in partition:
        handle = dist.new_group(members) if len(members) > 1 else None
        if rank in members:
            own = Group(members.index(rank), len(members), handle)
    return own


def start_process_group(
    store: dist.Store, rank: int, world_size: int, device: torch.device, timeout_seconds: int
) -> None:
    """Join torch's default process group: NCCL on GPUs, gloo on CPUs."""
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl", store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def agree_before_start(store: dist.Store, rank: int, world_size: int, error: HammerError | None) -> None:
    """Like ``raise_together``, over the rendezvous store: usable before any process group exists."""
    store.set(f"before-start/{rank}", json.dumps(to_fields(error)) if error is not None else "{}")
    for other in range(world_size):
        fields = json.loads(store.get(f"before-start/{other}"))
        if fields:
            raise from_fields(fields)
