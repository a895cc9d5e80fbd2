"""Predicts what a run will need before it starts: memory of a rank, disk, and time.

Memory is that of weights, sums of gradients, masters and moments, which is exact, and of activations and buffers at the
worst moment of a step (``rank_peak.py``); what libraries and allocators take comes on top. Time is stated for rates of
devices that are named, since nothing has been measured yet; ``tools/plan.py`` predicts it for a layout.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.space import checkpoint_bytes
from megatron_hammer.config import Config
from megatron_hammer.config.phases import Course
from megatron_hammer.costs.flops import flops_per_token
from megatron_hammer.costs.gpus import GPUS
from megatron_hammer.costs.rank_costs import GIB, owned_elements, without_second_moment
from megatron_hammer.costs.rank_peak import worst_rank
from megatron_hammer.kernels.backend import Backend

CHECKPOINT_BYTES = 12  # of a parameter: fp32 master and two moments; 4 less where Muon has one
ASSUMED_MFU = 0.5
NAMED_DEVICES = ("H100", "A100", "4090")
CPU_TFLOPS = 0.2  # of two cores with 512-bit vectors: an order of magnitude


def forecast(
    config: Config, world_size: int, backends: Mapping[str, Backend], course: Course | None = None
) -> list[str]:
    """What a run on so many ranks will need, in lines for people: memory of the worst rank, disk, time.

    Args:
        course: which samples the steps hold; absent: those of a run that begins with this config.
    """
    snapshot = [_snapshot(config, world_size)] if config.checkpoint.mode == "background" else []
    return [
        _memory(config, world_size, backends),
        *snapshot,
        _disk(config),
        _time(config, world_size, course or config.course()),
    ]


def _memory(config: Config, world_size: int, backends: Mapping[str, Backend]) -> str:
    ranks = config.parallel.pipeline_model_parallel_size
    rank, parts = worst_rank(config, world_size, backends)
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
    where = "" if ranks == 1 else f" of pipeline rank {rank}, the one with most,"
    return f"memory of a rank{where}: at least {_gib(sum(parts.values()))} GiB ({shown})"


def _snapshot(config: Config, world_size: int) -> str:
    """The snapshot of the rank with the largest part of a checkpoint; parts of ranks are alike but for roundings."""
    ranks = config.parallel.pipeline_model_parallel_size
    first = [rank * world_size // ranks for rank in range(ranks)]
    parts = [
        CHECKPOINT_BYTES * owned_elements(config, world_size, rank)
        - 4 * without_second_moment(config, world_size, rank)
        for rank in first
    ]
    return f"host memory of a rank for snapshots (checkpoint.mode=background): {_gib(max(parts))} GiB"


def _disk(config: Config) -> str:
    style, kept = config.optimizer.style, config.checkpoint.keep_last
    one = checkpoint_bytes(config.model, dict.fromkeys(STATE_KINDS, 4), style)
    return (
        f"disk: {_gib(one)} GiB a checkpoint, {_gib(one * (kept + 1))} GiB while one more than "
        f"checkpoint.keep_last={kept} is written"
    )


def _time(config: Config, world_size: int, course: Course) -> str:
    """Tokens, FLOPs and time of what is left to do."""
    begin, end = course.consumed[-1], course.num_samples
    tokens, flops = config.tokens_before(end) - config.tokens_before(begin), 0.0
    pieces = [(phase.first, phase.end, phase.seq_length) for phase in config.phases]
    for first, last, seq_length in pieces or [(0, None, config.data.seq_length)]:
        samples = max(0, min(end, end if last is None else last) - max(begin, first))
        flops += samples * seq_length * flops_per_token(config.model, seq_length)[0]
    of = f" of {config.tokens_before(end):,}" if begin else ""
    what = f"time: {tokens:,}{of} tokens, {flops:.2e} FLOPs"
    if flops < 1e17:
        return f"{what}; on two CPU cores at {CPU_TFLOPS} TFLOP/s about {_duration(flops / (CPU_TFLOPS * 1e12))}"
    parts = []
    for name in NAMED_DEVICES:
        rate = world_size * (GPUS[name].peak(config.train.precision) or 0.0) * 1e12 * ASSUMED_MFU
        parts.append(f"{_duration(flops / rate)} on {world_size} x {name}")
    return f"{what}; at {ASSUMED_MFU:.0%} of the {config.train.precision} peak about {', '.join(parts)}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 10 * GIB else f"{size / GIB:.2g}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.{0 if seconds >= 100 * length else 1}f} {unit}"
    return f"{seconds:.2g} seconds"
