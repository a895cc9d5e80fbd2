"""Which layouts a model can be trained in on given GPUs: all that the settings allow, with what each needs.

A layout changes how ranks share the work and what they keep, never what is computed: tensor, pipeline (interleaved or
not) and context parallelism, what is sharded, micro-batch and recompute; and where several precisions are asked for,
these. Each candidate is a config of its own, checked by ``Config.validate`` as a run checks it; what the settings
refuse is rejected in their words, what does not fit by how much it is too large. Memory is by ``rank_peak.py``, time by
``rank_speed.py``. Needs no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config, Recompute, Sharded
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_peak import fused_backends, worst_rank
from megatron_hammer.costs.rank_speed import Cluster, StepTime, step_time

HEADROOM = 0.08  # of a GPU's memory: the CUDA context and NCCL (2 to 3 GiB), workspaces, holes between allocations
MOST_CONTEXT_PARALLEL = 16
MOST_MICRO_BATCH = 64
WORTH = 0.01  # of the speed: what loses less is not interleaved, as the roofline knows no cost of many small stages
MOST_STAGES = 8  # of a rank: more shorten the wait by little (it is a v-th), and send as many times more
PRECISIONS = ("bf16", "fp8", "fp16", "fp32")
"""fp8 is bf16 with the layers' products in 8 bits (``kernels.fp8=current``)."""

SHARDS: tuple[Sharded, ...] = get_args(Sharded)
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class PlannedLayout:
    """A candidate: its config, and what a step of it is predicted to need."""

    config: Config
    world_size: int
    cluster: Cluster
    pp_rank: int
    """The pipeline rank that needs most memory."""
    memory: dict[str, int]
    """Bytes of that rank at its worst moment, by part (``rank_peak.PARTS``)."""

    @cached_property
    def time(self) -> StepTime:
        """Predicted time of a step; worked out when it is asked for, as it never is of layouts that do not fit."""
        return step_time(self.config, self.world_size, self.cluster)

    @property
    def bytes(self) -> int:
        """Bytes of the rank that needs most."""
        return sum(self.memory.values())

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """TP, PP, CP, DP."""
        grid = self.config.grid(self.world_size)
        return grid.tp, grid.pp, grid.cp, grid.dp

    @property
    def stages(self) -> int:
        """Stages of each pipeline rank: more than one where they are interleaved."""
        return self.config.parallel.virtual_pipeline_stages

    @property
    def name(self) -> str:
        """The layout in one line."""
        return name_of(self.config, self.world_size)


@dataclass(frozen=True)
class RejectedLayout:
    """A layout that was tried and cannot be used."""

    layout: str
    reason: str
    kind: str
    """``settings``, ``batch`` or ``memory``."""
    missing: int = 0
    """Bytes."""


@dataclass(frozen=True)
class FoundLayouts:
    """All candidates of a config on so many GPUs."""

    fitting: list[PlannedLayout]
    """The fastest first."""
    too_large: list[PlannedLayout]
    """Those that do not fit, the smallest first."""
    rejected: list[RejectedLayout]
    """In the order in which they were tried."""
    limit: int
    """Bytes that a rank may need."""

    @property
    def ranked(self) -> list[PlannedLayout]:
        """The table: of layouts that fit and differ in their micro-batch alone the fastest; of those that differ in the
        stages of a pipeline rank the one with the fewest that loses no more than ``WORTH``."""
        families: dict[tuple[object, ...], dict[int, PlannedLayout]] = {}
        for layout in self.fitting:
            config = layout.config
            family = (*layout.sizes, shard_of(config), config.train.recompute, precision_of(config))
            families.setdefault(family, {}).setdefault(layout.stages, layout)
        chosen = []
        for each in families.values():
            enough = (1 - WORTH) * max(layout.time.tokens_per_second for layout in each.values())
            chosen.append(next(each[v] for v in sorted(each) if each[v].time.tokens_per_second >= enough))
        return sorted(chosen, key=_place)


def name_of(config: Config, world_size: int) -> str:
    """A layout in one line."""
    parallel, train, cp = config.parallel, config.train, config.parallel.context_parallel_size
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    interleaved = f"x{parallel.virtual_pipeline_stages}" if parallel.virtual_pipeline_stages > 1 else ""
    return (
        f"TP {tp} PP {pp}{interleaved} CP {cp} DP {world_size // (tp * pp * cp)}, shard={shard_of(config)}, "
        f"micro-batch {train.micro_batch_size}, recompute={train.recompute}, {precision_of(config)}"
    )


def shard_of(config: Config) -> str:
    """What is sharded, and among how many ranks where not among all: ``weights/8``."""
    parallel = config.parallel
    return parallel.shard if parallel.shard_size is None else f"{parallel.shard}/{parallel.shard_size}"


def precision_of(config: Config) -> str:
    """The precision of a config, as ``PRECISIONS`` names it."""
    return "fp8" if config.kernels.fp8 != "off" else config.train.precision


def with_precision(config: Config, precision: str) -> Config:
    """The config in another precision."""
    if precision == precision_of(config):
        return config
    kernels = replace(config.kernels, fp8="current" if precision == "fp8" else "off", fp8_head=False)
    train = replace(config.train, precision="bf16" if precision == "fp8" else precision)  # type: ignore[arg-type]
    return replace(config, kernels=kernels, train=train)


def search_layouts(
    config: Config,
    world_size: int,
    cluster: Cluster,
    memory_gib: float,
    precisions: Sequence[str] = (),
    headroom: float = HEADROOM,
    tried: Callable[[int], None] = lambda count: None,
) -> FoundLayouts:
    """Try all layouts.

    Args:
        config: with its vocabulary; its own layout is only where the search starts.
        memory_gib: of a GPU.
        precisions: those to try; none: the config's.
        headroom: share of the memory that is left to libraries and holes.
        tried: called for each family of layouts, which differ in their micro-batch alone, when it is tried, with the
            number of families.
    """
    limit = round(memory_gib * GIB * (1 - headroom))
    fitting, too_large, rejected = list[PlannedLayout](), list[PlannedLayout](), list[RejectedLayout]()
    families = list(_families(config, world_size, cluster, precisions))
    for alike in (_alike(config, world_size, *family) for family in families):
        tried(len(families))
        for name, candidate in alike:
            if (refused := refusal(candidate, world_size)) is not None:
                batch = "global_batch_size" in refused or "micro-batches a step" in refused
                rejected.append(RejectedLayout(name, refused, "batch" if batch else "settings"))
                continue
            layout = need_of(candidate, world_size, cluster)
            if layout.bytes > limit:  # and so are those with larger micro-batches
                too_large.append(layout)
                reason = f"needs {layout.bytes / GIB:.2f} GiB of {limit / GIB:.2f}"
                rejected.append(RejectedLayout(name, reason, "memory", layout.bytes - limit))
                break
            fitting.append(layout)
            _ = layout.time  # half of the work: here, where ``tried`` shows how far it is
    fitting.sort(key=_place)
    too_large.sort(key=lambda layout: layout.bytes)
    return FoundLayouts(fitting, too_large, rejected, limit)


def need_of(config: Config, world_size: int, cluster: Cluster) -> PlannedLayout:
    """What a step of a valid config needs."""
    pp_rank, memory = worst_rank(config, world_size, fused_backends(config.kernels))
    return PlannedLayout(config, world_size, cluster, pp_rank, memory)


def _families(
    config: Config, world_size: int, cluster: Cluster, precisions: Sequence[str]
) -> Iterator[tuple[str, int, int, int, int, Sharded, int | None, Recompute]]:
    """Layouts but for their micro-batch: precision, TP, CP, PP, stages of a pipeline rank, what is sharded and among
    how many ranks (None: all, or as the config has it), recompute.

    Tensor-parallel ranks stay within a node.
    """
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    tensor = [t for t in divisors if t <= min(cluster.gpus_per_node, config.model.num_attention_heads)]
    most = min(MOST_CONTEXT_PARALLEL, config.data.seq_length // 2)
    context = [c for c in divisors if c & (c - 1) == 0 and c <= most]
    pipeline = [p for p in divisors if p <= config.model.num_layers]
    for precision, tp, cp, pp in itertools.product(precisions or [precision_of(config)], tensor, context, pipeline):
        if world_size % (tp * cp * pp):
            continue
        shards = _shards(config, world_size // (tp * pp), cluster.gpus_per_node // tp)
        for stages, (shard, size), recompute in itertools.product(_stages(config, pp), shards, RECOMPUTES):
            yield precision, tp, cp, pp, stages, shard, size, recompute


def _shards(config: Config, replicas: int, near: int) -> list[tuple[Sharded, int | None]]:
    """What may be sharded, and among how many: weights also within a node alone, whose ``near`` replicas have fast
    links to each other, with a copy in each node."""
    if replicas == 1:
        return [(SHARDS[0], None)]
    shards: list[tuple[Sharded, int | None]] = [(shard, None) for shard in SHARDS]
    if 1 < near < replicas and replicas % near == 0 and config.parallel.shard_size is None:
        shards.append(("weights", near))
    return shards


def _alike(
    config: Config,
    world_size: int,
    precision: str,
    tp: int,
    cp: int,
    pp: int,
    stages: int,
    shard: Sharded,
    shard_size: int | None,
    recompute: Recompute,
) -> list[tuple[str, Config]]:
    """The layouts of a family by name, valid or not, the smallest micro-batch first."""
    config, alike = with_precision(config, precision), []
    for micro_batch in _micro_batches(config, world_size // (tp * cp * pp)):
        changed = with_layout(config, tp, cp, pp, stages, shard, recompute, micro_batch, shard_size)
        alike.append((name_of(changed, world_size), changed))
    return alike


def _stages(config: Config, pp: int) -> list[int]:
    """Stages that a pipeline rank may have: counts that divide its layers, powers of two, what the config has."""
    layers, most = config.model.num_layers, min(MOST_STAGES, config.model.num_layers // pp)
    if pp == 1:
        return [1]
    here, there = config.parallel.virtual_pipeline_stages, config.parallel.pipeline_model_parallel_size
    equal = {v for v in range(2, most + 1) if layers % (pp * v) == 0 or v & (v - 1) == 0}
    return sorted({1, *equal, *([here] if pp == there else [])})


def with_layout(
    config: Config,
    tp: int,
    cp: int,
    pp: int,
    stages: int,
    shard: Sharded,
    recompute: Recompute,
    micro_batch: int,
    shard_size: int | None = None,
) -> Config:
    """The config in this layout; what belongs to another one is left out.

    Args:
        stages: of each pipeline rank.
        shard_size: None: as the config has it, where that is of this ``shard``.
    """
    parallel = config.parallel
    stays = (pp, stages) == (parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_stages)
    overlap = parallel.tp_comm_overlap if tp > 1 or parallel.tp_comm_overlap != "chunks" else "bulk"
    parallel = replace(
        parallel,
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1 and config.data.seq_length % (tp * cp) == 0,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_stages=stages,
        pipeline_split=parallel.pipeline_split if stays else None,
        shard=shard,
        shard_size=parallel.shard_size if shard_size is None and shard == parallel.shard else shard_size,
        reshard_after_forward=parallel.reshard_after_forward or shard != "weights",
        tp_comm_overlap=overlap,
    )
    layers = config.train.recompute_layers if recompute == config.train.recompute else None
    train = replace(config.train, recompute=recompute, recompute_layers=layers, micro_batch_size=micro_batch)
    return replace(config, parallel=parallel, train=train)


def _micro_batches(config: Config, dp: int) -> list[int]:
    """Powers of two that divide a rank's share of the batch; 1 where none does, which the settings then refuse."""
    share, left = divmod(config.train.global_batch_size, dp)
    sizes = [2**i for i in range(MOST_MICRO_BATCH.bit_length()) if share % 2**i == 0]
    return [1] if left or not share else sizes


def refusal(config: Config, world_size: int) -> str | None:
    """Why the settings do not allow a config on so many ranks; None where they do."""
    try:
        config.validate(world_size)
    except ConfigError as error:
        return f"{error.what} {error.rule}"
    return None


def _place(layout: PlannedLayout) -> tuple[float, int, int, int]:
    """The fastest first; of those that are as fast, as what they send is hidden, the one with fewer axes and stages,
    then the one that divides, and so sends, less, then the smaller."""
    tp, pp, cp, _ = layout.sizes
    divided = SHARDS.index(layout.config.parallel.shard)
    return -round(layout.time.tokens_per_second, 1), tp * pp * layout.stages * cp, divided, layout.bytes
