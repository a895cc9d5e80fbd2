"""Explains "out of memory": where the memory goes by formula, and the cheapest changes of settings that would fit.

Where the prediction is several times the memory of the device, the run is refused with the same text before the first
step (``refuse_far_too_large``). A smaller excess is left to the device, since the formulas may err and swap may help.
Explained is only a shortage of tensors, on a GPU or of torch on a CPU; memory that Python itself cannot get is not in
the formulas. Of the device only name and size are asked. The proposed changes keep what is computed: micro-batch,
recompute, sequence parallelism, what is sharded, twice the tensor or pipeline parallel ranks.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace

import torch

from megatron_hammer.base.errors import MemoryShortage, lacks_tensor_memory
from megatron_hammer.config import Config
from megatron_hammer.costs.comparison import device_name
from megatron_hammer.costs.gpus import GPUS, find_gpu
from megatron_hammer.costs.layouts import (
    HEADROOM,
    RECOMPUTES,
    SHARDS,
    PlannedLayout,
    need_of,
    refusal,
    with_layout,
)
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_speed import Cluster

SUGGESTED = 3
ANOTHER = "H100"  # by whose rates changes are compared where the table has none of the device
BELOW_PREDICTION = 0.95  # what did not fit is larger than predicted: a change must save something at least
FAR_TOO_LARGE = 4.0  # times the memory of the device: beyond any error of the formulas (5 %), swap and shared pages
SETTINGS = {
    "parallel": (
        "tensor_model_parallel_size",
        "sequence_parallel",
        "pipeline_model_parallel_size",
        "virtual_pipeline_stages",
        "shard",
    ),
    "train": ("micro_batch_size", "recompute"),
}
"""What a change may set."""


def explained(
    error: BaseException, config: Config, world_size: int, rank: int, device: torch.device
) -> MemoryShortage | None:
    """E1001 with what the rank was predicted to need and what would fit; None for any other error, and where a formula
    fails: then the error is said as it came."""
    if not (lacks_tensor_memory(error) or _nccl_lacks_memory(error, device)):
        return None
    try:
        size = memory_of(device) if device.type == "cuda" else None  # on a CPU nobody knows who else took it
        return shortage(error, config, world_size, rank, device_name(device), size)
    except Exception:
        return None


def _nccl_lacks_memory(error: BaseException, device: torch.device) -> bool:
    """Whether NCCL found no memory for its buffers, which come with the first message of a kind.

    It says the same where its call came behind another fault of the GPU; then nothing can be launched any more.
    """
    if not any(words in str(error) for words in ("Failed to CUDA calloc", "Failed to CUDA malloc")):
        return False
    try:
        torch.ones(1, device=device)
    except RuntimeError as fault:
        return lacks_tensor_memory(fault)
    return True


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU, or of the whole machine for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def shortage(
    error: BaseException, config: Config, world_size: int, rank: int, name: str, size: int | None
) -> MemoryShortage:
    """The same for a device of this name that has ``size`` bytes; None: unknown."""
    whose, needed, parts, remedy = _needs(config, world_size, name, size)
    of = "" if size is None else f" of {size / GIB:.1f}"
    text = " ".join(str(error).split()) or type(error).__name__
    rule = f"has no memory left ({text[:400]}); {whose} is predicted to need {needed / GIB:.2f} GiB{of}: {parts}"
    return MemoryShortage(1, f"rank {rank}", rule, remedy)


def refuse_far_too_large(predicted: int, config: Config, world_size: int, name: str, size: int) -> None:
    """Raise where rank 0 of the config is predicted to need ``FAR_TOO_LARGE`` times the bytes of its device, or more.

    Raises:
        MemoryShortage: E1003, with the parts and what would fit.
    """
    if predicted < FAR_TOO_LARGE * size:
        return
    whose, needed, parts, remedy = _needs(config, world_size, name, size)
    rule = (
        f"is predicted to need {needed / GIB:,.0f} GiB, {needed / size:,.0f} times the {size / GIB:.1f} GiB "
        f"of this {'machine' if name == 'cpu' else 'GPU'}: {parts}"
    )
    raise MemoryShortage(3, whose, rule, remedy)


def _needs(config: Config, world_size: int, name: str, size: int | None) -> tuple[str, int, str, str]:
    """Which rank needs most, its bytes, these by part, and the remedy: the changes that would fit."""
    config = config.largest
    gpu = find_gpu(name)
    cluster = Cluster(name, gpu if gpu is not None and gpu.peak(config.train.precision) else GPUS[ANOTHER])
    now = need_of(config, world_size, cluster)
    parts = ", ".join(f"{part} {amount / GIB:,.2f}" for part, amount in now.memory.items() if amount)
    limit = BELOW_PREDICTION * now.bytes
    limit = limit if size is None else min(limit, (1 - HEADROOM) * size)
    whose = "a rank" if config.parallel.pipeline_model_parallel_size == 1 else f"pipeline rank {now.pp_rank}"
    changes = cheapest_changes(config, world_size, cluster, limit)
    described = "; ".join(f"({i}) {_described(config, now, layout)}" for i, layout in enumerate(changes, start=1))
    remedy = (
        f"use one of these, the fastest first: {described}"
        if changes
        else "no micro-batch, recompute or sharding fits: use more ranks, a shorter data.seq_length or a larger GPU"
    )
    return whose, now.bytes, parts, remedy


def cheapest_changes(config: Config, world_size: int, cluster: Cluster, limit: float) -> list[PlannedLayout]:
    """The fastest layouts near this one that need at most ``limit`` bytes, none with a change that is not needed."""
    fitting = []
    for changed in _neighbours(config, world_size):
        if changed != config and refusal(changed, world_size) is None:
            layout = need_of(changed, world_size, cluster)
            if layout.bytes <= limit:
                fitting.append(layout)
    fitting.sort(key=lambda layout: (layout.time.total / layout.time.tokens, len(_changes(config, layout.config))))
    chosen: list[PlannedLayout] = []
    for layout in fitting:
        mine = _changes(config, layout.config)
        if not any(_changes(config, other.config).items() <= mine.items() for other in chosen):
            chosen.append(layout)
    return chosen[:SUGGESTED]


def _neighbours(config: Config, world_size: int) -> Iterator[Config]:
    """Layouts that need no more memory than this one in any respect."""
    parallel, train = config.parallel, config.train
    tp, pp, cp = (
        parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size,
    )  # fmt: skip
    shards = SHARDS[SHARDS.index(parallel.shard) :] if config.grid(world_size).shard > 1 else (parallel.shard,)
    recomputes = RECOMPUTES[RECOMPUTES.index(train.recompute) :]
    sizes = [size for size in range(1, train.micro_batch_size + 1) if train.micro_batch_size % size == 0]
    kept = parallel.virtual_pipeline_stages
    for more_tp, more_pp, stages in dict.fromkeys(((1, 1, kept), (1, 1, 1), (2, 1, kept), (1, 2, 1))):
        if world_size % (tp * more_tp * cp * pp * more_pp):
            continue
        for shard, recompute, size in itertools.product(shards, recomputes, sizes):
            changed = with_layout(config, tp * more_tp, cp, pp * more_pp, stages, shard, recompute, size)
            if more_tp == 1 and not parallel.sequence_parallel:
                yield replace(changed, parallel=replace(changed.parallel, sequence_parallel=False))
            if changed.parallel.sequence_parallel or tp * more_tp == 1:
                yield changed


def _changes(old: Config, new: Config) -> dict[str, str]:
    """Setting -> its new value."""
    return {
        f"{group}.{name}": str(getattr(getattr(new, group), name)).lower()
        for group, names in SETTINGS.items()
        for name in names
        if getattr(getattr(new, group), name) != getattr(getattr(old, group), name)
    }


def _described(config: Config, now: PlannedLayout, layout: PlannedLayout) -> str:
    settings = " ".join(f"{name}={value}" for name, value in _changes(config, layout.config).items())
    slower = layout.time.total / now.time.total - 1
    speed = f"about {slower:.0%} slower" if slower >= 0.005 else "about as fast"
    return f"{settings} ({layout.bytes / GIB:.2f} GiB, {speed})"
