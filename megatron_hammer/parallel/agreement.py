"""How ranks agree on an error: all of them raise it, or none does.

A rank that raises alone would leave the others waiting in their next collective. So work in which a single rank may
fail (reading or writing files) ends in ``raise_together``, and start-up in ``agree_before_start``, which needs no
process group yet.
"""

from __future__ import annotations

import json

import torch

from megatron_hammer.base.errors import HammerError, from_fields, to_fields
from megatron_hammer.parallel.collectives import MAX, all_gather_rows, all_reduce
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.rendezvous import Store


def raise_together(ctx: ParallelContext, error: HammerError | None) -> None:
    """Raise the lowest failing rank's error on every rank, or return on every rank. Communicates over the world."""
    if ctx.world.size == 1:
        if error is not None:
            raise error
        return
    payload = b"" if error is None else json.dumps(to_fields(error)).encode()
    size = torch.tensor([len(payload)], device=ctx.device)
    all_reduce(size, ctx.world, MAX)
    length = int(size.item())
    if length == 0:
        return
    mine = torch.zeros(1, length, dtype=torch.uint8, device=ctx.device)
    mine[0, : len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else 0
    for report in all_gather_rows(mine, ctx.world):
        text = bytes(report.tolist()).rstrip(b"\0")
        if text:
            raise from_fields(json.loads(text))


def agree_before_start(store: Store, rank: int, world_size: int, error: HammerError | None) -> None:
    """Like ``raise_together``, over the rendezvous store: usable before any process group exists."""
    store.set(f"before-start/{rank}", json.dumps(to_fields(error)) if error is not None else "{}")
    for other in range(world_size):
        fields = json.loads(store.get(f"before-start/{other}"))
        if fields:
            raise from_fields(fields)
