"""A world of which only one rank exists: torch's fake process group, and the collectives that this rank calls in it.

The groups of any grid can be made, and each collective returns at once without having moved anything. With tensors on
the meta device a step of one rank of thousands takes seconds and no memory. torch keeps the fake group among its own
tests, and how an operator names its group is private too: the same in torch 2.11 to 2.15 (tests/test_private_torch.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.grid import AXES

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
    "alltoall_base_": "all-to-all",
    "send": "send",
    "recv_": "receive",
}

LABELS = (*AXES, "kv", "ends", "shard", "copies", "world", "whole")


@dataclass(frozen=True, order=True)
class Collective:
    """One call on a rank."""

    axis: str
    """"tp", "dp", ..., or "world"; where several have the same ranks, the first of ``LABELS``."""
    kind: str
    """As in ``KINDS``."""
    bytes: int
    """Of the whole tensor: what an all-gather returns, what a reduce-scatter takes."""


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Let this process be ``rank`` of a default process group of ``world_size`` ranks that do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def find_collective(operator: Any, arguments: Sequence[Any], ctx: ParallelContext) -> Collective | None:
    """What a call of a torch operator communicates; None for operators that do not."""
    if operator.namespace != "c10d":
        return None
    kind = KINDS[operator.name().partition("::")[2].partition(".")[0]]
    tensors = [x for argument in arguments for x in (argument if isinstance(argument, list) else [argument])]
    size = max(x.numel() * x.element_size() for x in tensors if isinstance(x, torch.Tensor))
    return Collective(_axis(arguments, ctx), kind, size)


def _axis(arguments: Sequence[Any], ctx: ParallelContext) -> str:
    names = {
        group.process_group.group_name: label for label in reversed(LABELS) if (group := getattr(ctx, label)).size > 1
    }
    names |= {link.process_group.group_name: "pp" for link in vars(ctx.links).values() if link.size > 1}
    groups = (argument for argument in arguments if isinstance(argument, torch.ScriptObject))
    found = (names.get(_group_name(group)) for group in groups)
    return next(axis for axis in found if axis is not None)


def _group_name(argument: torch.ScriptObject) -> str:
    """Empty for an argument that is no process group, such as a reduction's operation."""
    try:
        return str(dist.ProcessGroup.unbox(argument).group_name)
    except RuntimeError:
        return ""
