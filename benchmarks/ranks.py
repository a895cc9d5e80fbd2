"""Ranks of a benchmark that meet over gloo on this machine, one thread each."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def meet(rank: int, ranks: int, store: str) -> None:
    """Join torch's default process group of ``ranks`` ranks through the file ``store``."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
