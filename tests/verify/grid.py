"""The grid of layouts up to eight ranks, a subset in which every pair of values occurs, and the check of one layout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import HammerError
from megatron_hammer.checkpoint.folder import open_checkpoint
from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.state import RunState
from megatron_hammer.train.step import train_step
from megatron_hammer.verify.compare import (
    NUMBER_BOUNDS,
    Deviation,
    LayoutSizes,
    compare_numbers,
    compare_pieces,
    whole_tensors,
)
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.shrink import alone
from megatron_hammer.verify.steps import gradient_pieces
from tests.model.tiny import exact_steps, make_context, rank_batches, tiny_config

Layout = dict[str, Any]
STEPS, MOST_RANKS = 20, 8

VALUES: dict[str, Sequence[Any]] = {
    "tensor_model_parallel_size": (1, 2, 4, 8),
    "sequence_parallel": (False, True),
    "tp_comm_overlap": ("bulk", "chunks"),
    "pipeline_model_parallel_size": (1, 2, 4),
    "virtual_pipeline_stages": (1, 2),
    "context_parallel_size": (1, 2, 4),
    "data": (1, 2, 4),
    "shard": ("optimizer", "gradients", "weights"),
    "attention_mask": ("causal", "document"),
}


def ranks_of(layout: Layout) -> int:
    """Of all axes together."""
    sizes = [layout[name] for name in VALUES if name.endswith("_size")]
    total: int = layout["data"]
    for size in sizes:
        total *= size
    return total


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model__qkv_bias": True},
    "qwen3 with biases": {"model__qk_norm": True, "model__qkv_bias": True, "model__attention_output_bias": True},
    "llama with biases": {"model__qkv_bias": True, "model__attention_output_bias": True, "model__mlp_bias": True},
}


def with_variants(layouts: Sequence[Layout]) -> list[tuple[Layout, str]]:
    """Each layout with a kind of model: in turn, so that each kind meets every number of tensor-parallel ranks."""
    turns: dict[int, itertools.cycle[str]] = {}
    for layout in layouts:
        turns.setdefault(layout["tensor_model_parallel_size"], itertools.cycle(VARIANTS))
    return [(layout, next(turns[layout["tensor_model_parallel_size"]])) for layout in layouts]


def with_kinds(layouts: Sequence[Layout]) -> list[tuple[Layout, str, str]]:
    """Each layout with a kind of model, and with an optimizer: Muon for a few in which every value occurs."""
    of_muon: list[Layout] = []
    missing = {value for layout in layouts for value in layout.items()}
    while missing:
        of_muon.append(max(layouts, key=lambda layout: len(missing & layout.items())))
        missing -= of_muon[-1].items()
    return [(layout, variant, "muon" if layout in of_muon else "adamw") for layout, variant in with_variants(layouts)]


def config_of(layout: Layout, variant: str = "llama", style: str = "adamw") -> Config:
    """A tiny model with that layout; the same global batch for each."""
    # Few layers and micro-batches: a layer for each stage (the last one may do with its head), and for interleaved
    # stages as many micro-batches as a pipeline has ranks.
    in_turn = layout["pipeline_model_parallel_size"] if layout["virtual_pipeline_stages"] > 1 else 1
    micro_batch = 2 if 4 // layout["data"] >= in_turn else 1
    stages = layout["pipeline_model_parallel_size"] * layout["virtual_pipeline_stages"]
    settings = {f"parallel__{name}": value for name, value in layout.items() if name not in ("data", "attention_mask")}
    return tiny_config(
        **settings, **VARIANTS[variant],
        model__num_layers=max(4, stages), model__num_attention_heads=8, data__attention_mask=layout["attention_mask"],
        train__micro_batch_size=micro_batch, train__global_batch_size=8, train__num_steps=STEPS,
        parallel__gradient_bucket_bytes=400_000,
        # A large eps: without it AdamW's first steps are the signs of gradients, which rounding decides near zero.
        optimizer__eps=1e-3, optimizer__lr=1e-3, optimizer__style=style,
        optimizer__newton_schulz="fp32" if style == "muon" else "auto",
    )  # fmt: skip


def whole_grid() -> list[Layout]:
    """Every layout that eight ranks can have and the settings admit."""
    found = []
    for values in itertools.product(*VALUES.values()):
        layout = dict(zip(VALUES, values, strict=True))
        if ranks_of(layout) > MOST_RANKS:
            continue
        try:
            config_of(layout).validate(ranks_of(layout))
        except HammerError:
            continue
        found.append(layout)
    return found


def pairs_of(layout: Layout) -> set[tuple[str, Any, str, Any]]:
    """Every two values that meet in a layout."""
    return {(a, layout[a], b, layout[b]) for a, b in itertools.combinations(VALUES, 2)}


def covering(grid: Sequence[Layout]) -> list[Layout]:
    """Few layouts in which every pair of values of the grid meets at least once: the best next one, again and again."""
    chosen: list[Layout] = []
    pairs = [pairs_of(layout) for layout in grid]
    missing = set().union(*pairs)
    while missing:
        best = max(range(len(grid)), key=lambda i: len(pairs[i] & missing))
        missing -= pairs[best]
        chosen.append(grid[best])
    return chosen


@cache
def exact_alone(config: Config) -> Outcome:
    """Two steps in fp64 of one process."""
    return exact_steps(0, config)


def findings_of(config: Config, outcomes: list[Outcome]) -> list[Deviation]:
    """What of the ranks' steps in fp64 is not one process's: sums are in another order, losses fp32 scalars."""
    reference, sizes = exact_alone(alone(config)), LayoutSizes(1, 1, 1)
    findings = compare_numbers(outcomes, reference, NUMBER_BOUNDS["fp64"], sizes)[1]
    return findings + compare_pieces(outcomes, whole_tensors(reference.pieces), 1e-10, sizes)[1]


def many_steps(rank: int, config: Config, steps: int, resume: Path | None, save: Path | None) -> list[Outcome]:
    """Loss, norm and gradient of each of so many steps in fp32; or of the second half, from a checkpoint of the first.

    Args:
        save: where the checkpoint at the half is written.
    """
    ctx = make_context(config)
    model, optimizer = build_stages(config, ctx)
    first = 1
    if resume is not None:
        manifest = open_checkpoint(resume)
        load_shards(manifest, optimizer.shards(), model=config.model, kinds=STATE_KINDS, ctx=ctx)
        optimizer.copy_params_from_masters()
        optimizer.load_scalar_state(manifest.state["optimizer"])
        first = manifest.step + 1
    reports = []
    for step in range(first, steps + 1):
        report = train_step(model, optimizer, rank_batches(config, step, ctx), config, step, ctx)
        reports.append(Outcome([float(report.loss)], [float(report.grad_norm)], list(gradient_pieces(optimizer))))
        if save is not None and step == steps // 2:
            save_checkpoint(
                save, step, optimizer.shards(), model=config.model, config_tree=config_to_tree(config),
                state=RunState(step, step * config.train.global_batch_size, "").to_manifest(optimizer),
                tokenizer=None, ctx=ctx,
            )  # fmt: skip
    return reports
