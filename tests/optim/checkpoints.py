"""Two steps and a checkpoint of them, and what goes on from it, on any layout."""

from __future__ import annotations

from pathlib import Path

from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.model.llama import Stage
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.step import train_step
from tests.model.tiny import build, make_context, rank_batches

STEPS = 2


def save_two_steps(config: Config, folder: str) -> tuple[ParallelContext, Stage, Optimizer]:
    """This rank, after the steps and their checkpoint."""
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, rank_batches(config, step, ctx), config, step, ctx)
    save_checkpoint(
        folder, STEPS, optimizer.shards(), model=config.model, config_tree=config_to_tree(config),
        state={"optimizer": optimizer.scalar_state()}, tokenizer=None, ctx=ctx,
    )  # fmt: skip
    return ctx, model, optimizer


def load_two_steps(config: Config, folder: str) -> tuple[ParallelContext, Stage, Optimizer]:
    """A rank of a new model, with the checkpoint's state."""
    ctx, manifest = make_context(config), read_manifest(Path(folder) / f"step-{STEPS:08d}")
    model, optimizer = build(config, ctx, initial=False)
    load_shards(manifest, optimizer.shards(), model=config.model, kinds=STATE_KINDS, ctx=ctx)
    optimizer.copy_params_from_masters()
    optimizer.load_scalar_state(manifest.state["optimizer"])
    return ctx, model, optimizer
