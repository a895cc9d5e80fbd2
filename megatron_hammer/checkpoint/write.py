"""Saving: every rank writes the logical slices that it owns, rank 0 commits.

::

    all ranks   stage      rank 0 makes step-N.tmp-ID, with the tokenizer
    all ranks   write      slices_to_write(shards) -> rank-NNNNN.safetensors, hashed before, fsynced, read back
    rank 0      commit     the ranks' reports -> manifest.json, fsync, rename to step-N, fsync
    rank 0      prune      what is old (``retention.py``)

A failure in any phase (a full disk on one rank, say) is raised on all ranks, the staging folder goes, and the older
checkpoints are untouched. What two ranks hold in common (norms, copies of key/value heads) is written by the one whose
slice is ``owned``; vocabulary padding belongs to no slice and is not written.

A save in the background (``background.py``) does the same with a copy of the views that ``owned_views`` gives.

Memory: 16 MiB beside the state.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import HammerError
from megatron_hammer.base.faults import fault_point
from megatron_hammer.base.files import canonical_json, staging_path, sync_folder
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.commit import SliceToWrite, SliceWatch, commit, stage_tokenizer_files, write_rank
from megatron_hammer.checkpoint.dtypes import DTYPE_NAMES, PRECISION_DTYPES
from megatron_hammer.checkpoint.folder import Note, clean_up, step_name
from megatron_hammer.checkpoint.kinds import style_of
from megatron_hammer.checkpoint.manifest import SavedLayout, TokenizerFiles
from megatron_hammer.checkpoint.retention import LAST_TWO, KnownCheckpoints, Retention, prune
from megatron_hammer.checkpoint.space import check_space, checkpoint_bytes
from megatron_hammer.checkpoint.tensor_files import CHUNK_BYTES
from megatron_hammer.config import ModelConfig
from megatron_hammer.parallel.agreement import all_or_none
from megatron_hammer.parallel.collectives import broadcast, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.sharding import Shard, rectangles
from megatron_hammer.tokenizer.interface import Tokenizer


def slices_to_write(shards: Sequence[Shard]) -> list[SliceToWrite]:
    """The owned rectangles in a rank's shards, as views into the optimizer: weights first, then the moments."""
    return owned_views(shards)[0]


def owned_views(shards: Sequence[Shard]) -> tuple[list[SliceToWrite], list[Tensor]]:
    """``slices_to_write``, and the flat view that each of them gives the bytes of."""
    kinds = list(dict.fromkeys(kind for shard in shards for kind in shard.tensors))
    slices, views = [], []
    for kind in kinds:
        for shard in (s for s in shards if kind in s.tensors and not s.is_copy):
            flat = shard.tensors[kind]
            dtype = DTYPE_NAMES[flat.dtype]
            for part in (s for s in shard.parameter.slices if s.owned):
                for box in rectangles(part, shard.start, shard.stop):
                    views.append(flat[box.position : box.position + box.numel])
                    chunks = partial(chunks_of, views[-1])
                    slices.append(SliceToWrite(part.tensor, kind, box.rows, box.cols, box.shape, dtype, chunks))
    return slices, views


def chunks_of(tensor: Tensor, dtype: torch.dtype | None = None) -> Iterator[Any]:
    """The bytes of a tensor on any device, a chunk at a time, converted to ``dtype`` on the way."""
    flat = tensor.detach().reshape(-1)
    elements = CHUNK_BYTES // flat.element_size()
    for start in range(0, flat.numel(), elements):
        yield flat[start : start + elements].to(dtype or flat.dtype).cpu().contiguous().view(torch.uint8).numpy()


def stage_tokenizer(tokenizer: Tokenizer, staging: Path) -> TokenizerFiles:
    """Copy the tokenizer into the staging folder, durably."""
    return stage_tokenizer_files(tokenizer.save_files, tokenizer.fingerprint, staging)


def save_checkpoint(
    checkpoints_dir: str | Path,
    step: int,
    shards: Sequence[Shard],
    *,
    model: ModelConfig,
    config_tree: Mapping[str, Any],
    state: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    ctx: ParallelContext,
    retention: Retention = LAST_TWO,
    note: Note = say,
    known: KnownCheckpoints | None = None,
) -> Path:
    """Save the ranks' shards as ``checkpoints_dir/step-NNNNNNNN``; all ranks call it. Communicates over the world.

    Args:
        shards: this rank's part, with the kinds to save.
        model: says which logical tensors there must be.
        config_tree: the resolved config (``config_to_tree``).
        state: JSON values, the same on all ranks.
        retention: what is kept beside this one.
        note: called on rank 0 with a line on what was removed beyond the plan.
        known: of this run, remembers from one save to the next which checkpoints can be read.

    Returns:
        the committed folder, on every rank.

    Raises:
        HammerError: on all ranks, when one of them failed; the older checkpoints are as before.
    """
    for name, tree in (("config_tree", config_tree), ("state", state)):
        try:
            canonical_json(tree)  # on all ranks, before any of them depends on another
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{name} must be finite JSON values: {error}") from None
    folder = Path(checkpoints_dir)
    target = folder / step_name(step)
    staging = staging_path(target, f"{agreed_number(ctx):016x}")
    leader = ctx.world.rank == 0
    files: list[TokenizerFiles] = []

    needed = bytes_to_write(model, shards, style_of(config_tree))

    def begin() -> None:
        stage(folder, staging, step, note)
        check_space(folder, needed, ctx.world.size)
        if tokenizer is not None:
            files.append(stage_tokenizer(tokenizer, staging))

    def finish() -> None:
        replaced = commit(
            staging,
            target,
            step=step,
            model=model,
            config_tree=config_tree,
            state=state,
            weights_dtype=PRECISION_DTYPES[config_tree["train"]["precision"]],
            layout=layout_of(ctx, config_tree),
            tokenizer=files[0] if files else None,
        )
        if replaced is not None:
            note(f"{target} was there already: kept as {replaced.name}")

    try:
        ctx.status.mark("saving, staging")
        together(begin if leader else _nothing, ctx, target)
        slices = slices_to_write(shards)
        together(lambda: write_rank(staging, ctx.world.rank, slices, _marked(ctx)), ctx, target)
        ctx.status.mark("saving, committing")
        together(finish if leader else _nothing, ctx, target)
    except HammerError:
        if leader:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    if leader:
        known = KnownCheckpoints() if known is None else known
        known.add(target)
        prune(folder, retention, note, known)
    return target


def stage(folder: Path, staging: Path, step: int, note: Note) -> None:
    """Make the staging folder of a save; called by one rank."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    for line in clean_up(folder):
        note(line)
    staging.mkdir()
    fault_point("stage", 0, step)


def bytes_to_write(model: ModelConfig, shards: Sequence[Shard], style: str) -> int:
    """What a checkpoint of all ranks takes, by the types of this rank's part."""
    kinds = {kind: tensor.element_size() for shard in shards for kind, tensor in shard.tensors.items()}
    return checkpoint_bytes(model, kinds, style)


def layout_of(ctx: ParallelContext, config_tree: Mapping[str, Any]) -> SavedLayout:
    """Who writes, for the manifest."""
    sequence_parallel = bool(config_tree.get("parallel", {}).get("sequence_parallel", False))
    return SavedLayout(ctx.world.size, ctx.tp.size, ctx.samples.size, sequence_parallel, ctx.cp.size, ctx.pp.size)


def together(work: Callable[[], None], ctx: ParallelContext, target: Path) -> None:
    """Do this rank's work; if it failed on any rank, fail on all. Communicates over the world."""
    with all_or_none(ctx, f"saving {target}", target):
        work()


def _marked(ctx: ParallelContext) -> SliceWatch:
    """Note each slice: a rank that writes for long is not one that hangs."""

    def watch(slices: Sequence[SliceToWrite]) -> Iterator[SliceToWrite]:
        for number, wanted in enumerate(slices, start=1):
            ctx.status.mark(f"saving, slice {number} of {len(slices)}")
            yield wanted
        ctx.status.mark("saving, making it durable and reading it back")

    return watch


def _nothing() -> None:
    """What the other ranks do while rank 0 works."""


def agreed_number(ctx: ParallelContext) -> int:
    """A random number of 62 bits, the same on all ranks. Communicates over the world."""
    drawn = torch.tensor([secrets.randbits(62)], device=ctx.device)  # training's generators are not touched
    broadcast(drawn, ctx.world)
    (number,) = read_back(drawn, ctx.world)
    return int(number)
