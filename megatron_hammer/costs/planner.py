"""The planner: all layouts of a config on given GPUs, with predicted memory, speed, time and cost.

``layouts.py`` finds and judges the layouts, ``plan_report.py`` shows them. Needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_hammer.base.errors import ConfigError, MemoryShortage
from megatron_hammer.config import Config
from megatron_hammer.costs.gpus import named_gpu
from megatron_hammer.costs.layouts import (
    HEADROOM,
    PRECISIONS,
    FoundLayouts,
    PlannedLayout,
    precision_of,
    search_layouts,
)
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_peak import GRADIENTS, OPTIMIZER, WEIGHTS
from megatron_hammer.costs.rank_speed import Cluster, Efficiency
from megatron_hammer.model.parameters import count_parameters
from megatron_hammer.tokenizer.load import load_tokenizer, with_vocab_size

ASSUMED_VOCABULARY = 100_000
"""Rows where the config names none: between those of bilingual tokenizers, 64,000 to 152,000."""


@dataclass(frozen=True)
class PlanRequest:
    """What is to be planned, as the command line of ``tools/plan.py`` says it; see there for each."""

    gpus: int
    gpu: str
    memory: float | None = None
    headroom: float | None = None
    tokens: float | None = None
    price: float | None = None
    precision: str | None = None
    gpus_per_node: int = 8
    node_link: float | None = None
    network: float = 50.0
    efficiency: Sequence[str] = ()
    show: int = 8


@dataclass(frozen=True)
class LayoutPlan:
    """The layouts of a config on some GPUs, with what was assumed in ranking them."""

    config: Config
    """With its vocabulary."""
    world_size: int
    cluster: Cluster
    memory_gib: float
    """Of a GPU."""
    headroom: float
    tokens: int
    price: float | None
    """Of a GPU hour, in the user's currency."""
    found: FoundLayouts
    is_vocabulary_assumed: bool = False
    """``ASSUMED_VOCABULARY``: neither a size nor a tokenizer was named."""

    def gpu_hours(self, layout: PlannedLayout) -> float:
        """GPU hours that a layout takes for all tokens."""
        return self.tokens / layout.time.tokens_per_second / 3600 * self.world_size


def check_found(plan: LayoutPlan) -> None:
    """Whether there is a layout at all.

    Raises:
        MemoryShortage: E1002, none fits; names the smallest and what is missing.
        ConfigError: E205, the settings refuse all.
    """
    found, gpus = plan.found, f"{plan.world_size} x {plan.cluster.name}"
    if found.fitting:
        return
    if found.too_large:
        closest = found.too_large[0]
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in closest.memory.items() if size)
        lacks = (closest.bytes - found.limit) / GIB
        state = sum(closest.memory[name] for name in (WEIGHTS, GRADIENTS, OPTIMIZER))
        shorter = f", or a shorter data.seq_length than {plan.config.data.seq_length}" if state < found.limit else ""
        raise MemoryShortage(
            2, gpus,
            f"have no layout that fits: the closest, {closest.name}, needs {closest.bytes / GIB:.1f} GiB on a rank "
            f"({parts}), and {found.limit / GIB:.1f} of {plan.memory_gib:g} may be used",
            f"{lacks:.1f} GiB are missing: take more GPUs (--gpus {2 * plan.world_size}) or larger ones{shorter}",
        )  # fmt: skip
    refused = [rejected for rejected in found.rejected if rejected.kind == "batch"]
    if refused:
        size, unit = plan.config.train.global_batch_size, plan.world_size
        nearest = max(unit, round(size / unit) * unit)
        raise ConfigError(
            5,
            f"train.global_batch_size={size}",
            f"can be divided over the ranks of no layout on {gpus}",
            f"use a multiple of {unit}, such as {nearest}, or another number of GPUs",
        )
    first = found.rejected[0]
    raise ConfigError(5, gpus, f"have no layout: {first.layout}: {first.reason}", "change the setting that it names")


def plan_layouts(config: Config, request: PlanRequest, tried: Callable[[int], None] = lambda count: None) -> LayoutPlan:
    """Find all layouts of a config on the GPUs that were asked for.

    Args:
        tried: called for each family of layouts when it is tried, with the number of families.

    Raises:
        ConfigError: a number or name that cannot be, or no layout that the settings allow.
        MemoryShortage: E1002, no layout fits.
    """
    _check_numbers(request)
    name, gpu = named_gpu(request.gpu)
    precisions = _precisions(config, request)
    if config.log.peak_tflops is not None:
        gpu = gpu.with_peak(config.train.precision, config.log.peak_tflops)
    for precision in precisions:
        if gpu.peak(precision) is None:
            rule = f"has no published peak in {precision}"
            raise ConfigError(38, f"--gpu {request.gpu}", rule, "set log.peak_tflops=TFLOP/s of one GPU")
    if "fp8" in precisions and not gpu.fp8:
        raise ConfigError(38, f"--precision fp8: {name}", "has no products in 8 bits", "use --precision bf16")
    link = gpu.link if request.node_link is None else request.node_link
    cluster = Cluster(
        name, replace(gpu, link=link), request.gpus_per_node, request.network,
        efficiency=_efficiency(request.efficiency),
    )  # fmt: skip
    assumed = config.tokenizer.path is None and config.model.vocab_size is None
    whole = with_vocab_size(
        replace(config, model=replace(config.model, vocab_size=ASSUMED_VOCABULARY)) if assumed else config,
        None if config.tokenizer.path is None or config.model.vocab_size else load_tokenizer(config.tokenizer.path),
    )
    memory = gpu.memory_gib if request.memory is None else request.memory
    headroom = HEADROOM if request.headroom is None else request.headroom
    found = search_layouts(whole, request.gpus, cluster, memory, precisions, headroom, tried)
    tokens = config.num_tokens if request.tokens is None else round(request.tokens)
    plan = LayoutPlan(whole, request.gpus, cluster, memory, headroom, tokens, request.price, found, assumed)
    check_found(plan)
    return plan


def _check_numbers(request: PlanRequest) -> None:
    """Refuse what cannot be (E240)."""
    above: dict[str, float | None] = {
        "memory": request.memory, "tokens": request.tokens, "gpus-per-node": request.gpus_per_node,
        "node-link": request.node_link, "network": request.network, "gpus": request.gpus, "show": request.show,
    }  # fmt: skip
    for name, value in above.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(40, f"--{name}={value:g}", "must be above 0", f"raise --{name}")
    if request.price is not None and not 0 <= request.price < float("inf"):
        raise ConfigError(40, f"--price={request.price:g}", "must not be negative", "give the price of a GPU hour")
    if request.headroom is not None and not 0 <= request.headroom < 1:
        raise ConfigError(40, f"--headroom={request.headroom:g}", "must lie in [0, 1)", f"{HEADROOM} is usual")


def _precisions(config: Config, request: PlanRequest) -> list[str]:
    names = [precision_of(config)] if request.precision is None else request.precision.split(",")
    for name in names:
        if name not in PRECISIONS:
            raise ConfigError(3, f"--precision {name}", "is no precision", f"use {', '.join(PRECISIONS)}")
    return list(dict.fromkeys(names))


def _efficiency(given: Sequence[str]) -> Efficiency:
    """``NAME=SHARE`` in place of the defaults."""
    rates, names = Efficiency(), [field.name for field in fields(Efficiency)]
    for text in given:
        name, _, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        most = 2.0 if name == "fp8" else 1.0
        fits = 0 <= number < 1 if name == "gaps" else 0 < number <= most
        if name not in names or not fits:
            rule = f"must be NAME=SHARE, NAME one of {', '.join(names)} and SHARE above 0 and at most {most:g}"
            raise ConfigError(40, f"--efficiency {text}", rule, "write --efficiency products=0.7")
        rates = replace(rates, **{name: number})
    return rates


def plan_to_tree(plan: LayoutPlan) -> dict[str, Any]:
    """All of it as JSON values, rejected layouts included."""
    cluster = {key: value for key, value in asdict(plan.cluster).items() if key != "gpu"}
    return {
        "parameters": count_parameters(plan.config.model),
        "vocab_size": plan.config.model.vocab_size,
        "vocab_size_is_assumed": plan.is_vocabulary_assumed,
        "gpus": plan.world_size,
        "machine": cluster | asdict(plan.cluster.gpu),
        "memory_gib": plan.memory_gib,
        "headroom": plan.headroom,
        "limit_bytes": plan.found.limit,
        "tokens": plan.tokens,
        "price_per_gpu_hour": plan.price,
        "layouts": [_layout(plan, layout) for layout in plan.found.fitting],
        "rejected": [asdict(rejected) for rejected in plan.found.rejected],
    }


def _layout(plan: LayoutPlan, layout: PlannedLayout) -> dict[str, Any]:
    tp, pp, cp, dp = layout.sizes
    hours = plan.gpu_hours(layout)
    return {
        "tp": tp, "pp": pp, "cp": cp, "dp": dp,
        "virtual_pipeline_stages": layout.stages,
        "sequence_parallel": layout.config.parallel.sequence_parallel,
        "shard": layout.config.parallel.shard,
        "shard_size": layout.config.parallel.shard_size,
        "micro_batch_size": layout.config.train.micro_batch_size,
        "recompute": layout.config.train.recompute,
        "precision": precision_of(layout.config),
        "memory_bytes": layout.memory,
        "total_bytes": layout.bytes,
        "seconds": layout.time.seconds,
        "tokens_per_second": layout.time.tokens_per_second,
        "mfu": layout.time.mfu,
        "days": hours / plan.world_size / 24,
        "gpu_hours": hours,
        "cost": None if plan.price is None else plan.price * hours,
    }  # fmt: skip


def chosen_config(plan: LayoutPlan, config: Config, number: int) -> Config:
    """The config that was planned, in layout ``number`` of the table; its vocabulary stays as it was written."""
    ranked, count = plan.found.ranked, len(plan.found.ranked)
    if not 1 <= number <= count:
        raise ConfigError(40, f"--choose={number}", f"must be from 1 to {count}, the layouts that fit", "choose one")
    return replace(ranked[number - 1].config, model=config.model)
