"""Runs two training steps on one rank and keeps what a proof compares: losses, gradients, weights and moments.

The kinds of pieces (``outcome.py``) are::

    initial weight     this rank's shard of the masters before the first step
    initial model      what the rank's model computes with then, gathered from all shards
    gradient           this rank's shard of the first step's gradient, summed over all ranks
    weight             this rank's shard of the masters after two steps
    exp_avg, exp_avg_sq   of the moments
    step-1 weight, ...    the same three after the first step
    model              what the rank's model computes with after two steps, gathered from all shards
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.kernels.selection import COMPUTE_DTYPES
from megatron_hammer.model.llama import Model, stages_of
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.context import ParallelContext, build_parallel_context
from megatron_hammer.parallel.rendezvous import collective_timeout, end_process_group, start_process_group
from megatron_hammer.parallel.sharding import Shard, rectangles
from megatron_hammer.sampling import loader
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.begin import check_machine, device_of_rank
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.cuda_graph import give_up, micro_batch_runner
from megatron_hammer.train.pipeline import pipelined_losses
from megatron_hammer.train.source_sums import LOSS, WEIGHT, Sources
from megatron_hammer.train.state import RunState
from megatron_hammer.train.step import loss_and_gradients
from megatron_hammer.verify.outcome import FIRST, INITIAL, Forward, Outcome, TensorPiece, write_outcome
from megatron_hammer.verify.points import ForwardWatch, in_row_order
from megatron_hammer.verify.shrink import STEPS

EXACT = {"fp64": torch.float64, "fp32": torch.float32}
SOURCES = 2
"""Samples are taken to come from so many sources in turn, so that the losses of each can be compared."""


# ---- the steps -------------------------------------------------------------------------------------------------------


def take_steps(config: Config, ctx: ParallelContext, dtype: torch.dtype, checkpoint: Path | None = None) -> Outcome:
    """Train ``STEPS`` steps on samples that the seed defines, the same global batch for every layout.

    Args:
        checkpoint: a folder for a checkpoint of the end.
    """
    model, optimizer = build_stages(config, ctx, dtype=dtype)
    vary_vectors(optimizer)
    run = micro_batch_runner(config.kernels, optimizer.store.of_stages[0])
    found = forward_alone(model, config, ctx)
    losses: list[float] = []
    norms: list[float] = []
    by_source: list[list[float]] = []
    in_steps: list[Forward] = []
    pieces = [p for p in _pieces_of(optimizer.shards(), INITIAL) if p.kind == INITIAL + "weight"]
    pieces += model_pieces(optimizer, INITIAL + "model")
    for step in range(1, STEPS + 1):
        # As ``train_step`` does it, in halves: the update may use the gradients' memory.
        batches = own_micro_batches(config, step, ctx)
        # Looked at in fp64 alone, which only the diagnosis needs: what runs then is never compiled, nor a CUDA graph.
        watch = ForwardWatch(batches)
        with watch.on(stages_of(model) if dtype == torch.float64 else []):
            loss, table = loss_and_gradients(model, optimizer, batches, config, ctx, run, Sources(SOURCES))
        if dtype == torch.float64:
            in_steps.append(_forward_of(watch, config, step, ctx))
        norm = optimizer.clip_grad_norm(config.optimizer.clip_grad)
        losses.append(float(loss))
        by_source.append((table[:, LOSS] / table[:, WEIGHT]).tolist())
        norms.append(float(norm))
        if step == 1:
            pieces += gradient_pieces(optimizer)
        optimizer.step(learning_rate(config, step))
        if step == 1:  # nobody waits here for weights that are on their way: the next forward has to
            pieces += _pieces_of(optimizer.rule.own_shards(), FIRST)
    give_up(run)
    pieces += state_pieces(optimizer)
    pieces += model_pieces(optimizer)
    refused = ""
    if checkpoint is not None:
        state = RunState(STEPS, STEPS * config.train.global_batch_size, "").to_manifest(optimizer)
        try:
            save_checkpoint(
                checkpoint, STEPS, optimizer.shards(), model=config.model, config_tree=config_to_tree(config),
                state=state, tokenizer=None, ctx=ctx,
            )  # fmt: skip
        except CheckpointError as error:  # what the ranks hold does not make a checkpoint: a finding
            refused = f"{error.what.rsplit(': ', 1)[-1]} {error.rule}"
    return Outcome(losses, norms, pieces, source_losses=by_source, refused=refused, in_steps=in_steps, **vars(found))


@torch.no_grad()
def vary_vectors(optimizer: Optimizer) -> None:
    """Have weights of norms that are not one and biases that are not zero, so that one that is left out shows."""
    for shard in (shard for shard in optimizer.shards() if len(shard.parameter.shape) == 1):
        for s in shard.parameter.slices:
            for r in rectangles(s, shard.start, shard.stop):
                wave = 0.1 * torch.cos(torch.arange(*r.rows, dtype=torch.float64) * (1 + len(s.tensor)))
                weight = shard.tensors["weight"][r.position : r.position + r.numel]
                weight.add_(wave.to(weight.device, weight.dtype))
    optimizer.copy_params_from_masters()


def global_batch(config: Config, step: int) -> tuple[Tensor, list[list[int]]]:
    """Tokens [samples, s + 1] of a step, and the lengths of each sample's documents."""
    assert config.model.vocab_size is not None
    generator = torch.Generator().manual_seed(config.train.seed % 2**31 + step)
    samples, s, v = config.train.global_batch_size, config.data.seq_length, config.model.vocab_size
    tokens = torch.randint(0, v, (samples, s + 1), generator=generator)
    # Common tokens as in real text, and the highest ids, which lie beside the padding of the last rank.
    common = torch.rand(tokens.shape, generator=generator) < 0.5
    tokens = torch.where(common, tokens % 7, tokens)
    tokens[:, ::9] = v - 1 - tokens[:, ::9] % 5
    documents: list[list[int]] = []
    for _ in range(samples):
        lengths: list[int] = []
        while (left := s - sum(lengths)) > 0:
            lengths.append(min(left, int(torch.randint(1, s // 2 + 2, (), generator=generator))))
        # One document that nearly fills its sample: context-parallel ranks cannot balance it but by cutting it.
        documents.append([s - s // 8, s // 8] if len(documents) % 3 == 0 else lengths)
    return tokens, documents


def own_micro_batches(config: Config, step: int, ctx: ParallelContext) -> list[Batch[Tensor]]:
    """This rank's part of the global batch, as the loader deals it out."""
    windows, documents = global_batch(config, step)
    samples = _Samples(windows[:, :-1].numpy(), windows[:, 1:].numpy(), _lengths(config, documents))
    return [batch.to(ctx.device) for batch in _shares(config, samples, ctx)]


@dataclass(frozen=True)
class _Samples:
    """The global batch of a step where a run has its data (``loader.Samples``)."""

    tokens: np.ndarray
    labels: np.ndarray
    documents: list[list[int]] | None

    def read(self, first: int, count: int) -> Batch[np.ndarray]:
        """The samples with these numbers."""
        ends, these = None, slice(first, first + count)
        if self.documents is not None:
            ends = np.cumsum([0, *(n for sample in self.documents[these] for n in sample)]).astype(np.int32)
        sources = np.arange(first, first + count) % SOURCES
        return Batch(self.tokens[these], self.labels[these], documents=ends, sources=sources)


def _lengths(config: Config, documents: list[list[int]]) -> list[list[int]] | None:
    return documents if config.data.attention_mask == "document" else None


def _shares(config: Config, samples: _Samples, ctx: ParallelContext) -> list[Batch[np.ndarray]]:
    train, dp = config.train, ctx.samples
    whole = loader.micro_batches(samples, 0, train.global_batch_size, train.micro_batch_size, dp.rank, dp.size)
    return [batch.shard(ctx.cp.rank, ctx.cp.size) for batch in whole]


@torch.no_grad()
def forward_alone(model: Model, config: Config, ctx: ParallelContext) -> Forward:
    """The forward of the first step's batches, without a step."""
    batches = own_micro_batches(config, 1, ctx)
    with ForwardWatch(batches).on(stages_of(model)) as watch:
        if ctx.pp.size > 1:
            pipelined_losses(stages_of(model), batches, ctx, lambda batch, found: None)
        else:
            (whole,) = stages_of(model)
            for batch in batches:
                whole(batch.tokens, batch.labels, batch.documents)
    return _forward_of(watch, config, 1, ctx)


def _forward_of(watch: ForwardWatch, config: Config, step: int, ctx: ParallelContext) -> Forward:
    """What was seen, and of which tokens it is; on a stage without a head there are no losses."""
    windows, documents = global_batch(config, step)
    numbers = np.arange(windows[:, 1:].numel()).reshape(len(windows), -1)  # take the same way as the tokens
    shares = _shares(config, _Samples(numbers, numbers, _lengths(config, documents)), ctx)
    part, parts = (ctx.tp.rank, ctx.tp.size) if config.parallel.sequence_parallel else (0, 1)
    rows = [in_row_order(share.tokens, share.documents is not None, part, parts) for share in shares]
    tokens = np.concatenate([share.tokens.ravel() for share in shares])
    losses = watch.losses
    return Forward(
        tokens if len(losses) else tokens[:0], losses, np.concatenate([row.ravel() for row in rows]), watch.points
    )


# ---- pieces ----------------------------------------------------------------------------------------------------------


def gradient_pieces(optimizer: Optimizer) -> Iterator[TensorPiece]:
    """Gradients of this rank's shards, as they are after the step: summed, neither clipped nor scaled."""
    scale = float(optimizer.scaler.scale)
    for stretch in optimizer.store.stretches():
        at = 0
        for part in stretch.parts:
            flat = stretch.grad[at : at + part.stop - part.start].double() / scale
            yield from _cut("gradient", part.parameter, part.start, part.stop, flat)
            at += part.stop - part.start


def state_pieces(optimizer: Optimizer) -> Iterator[TensorPiece]:
    """Masters and moments of this rank's shards."""
    yield from _pieces_of(optimizer.shards())


def _pieces_of(shards: Iterable[Shard], prefix: str = "") -> Iterator[TensorPiece]:
    for shard in shards:
        for kind, flat in shard.tensors.items():
            yield from _cut(prefix + kind, shard.parameter, shard.start, shard.stop, flat)


def model_pieces(optimizer: Optimizer, kind: str = "model") -> Iterator[TensorPiece]:
    """All weights that this rank's model has, copies included."""
    for store in optimizer.store.of_stages:
        for row, weight in zip(store.table, store.weights, strict=True):
            store.acquire(row.part)
            # A copy: torch lets nobody resize memory that NumPy has seen, and the store may want to give it up.
            yield from _cut(kind, row, 0, row.numel, weight.detach().flatten().clone())
            store.release(row.part)


def _cut(kind: str, parameter: Any, start: int, stop: int, flat: Tensor) -> Iterator[TensorPiece]:
    for s in parameter.slices:
        for r in rectangles(s, start, stop):
            values = flat[r.position : r.position + r.numel].reshape(r.shape)
            yield TensorPiece(kind, s.tensor, r.rows, r.cols, values.double().cpu().numpy().copy())


# ---- a rank of its own -----------------------------------------------------------------------------------------------


def run_rank(
    config: Config, rank: int, local_rank: int, world_size: int, store: Any, check_data: bool, status: StatusSlot
) -> int:
    """Entry of a rank that the launcher starts: all precisions of the proof; writes them to ``train.output``."""
    folder, device = Path(config.train.output), device_of_rank(config, local_rank)
    timeout = collective_timeout(config.parallel.timeout_seconds)
    torch.set_num_threads(1)
    check_machine(config, device)
    if store is not None:
        start_process_group(store, rank, world_size, device, timeout, status)
    ctx = build_parallel_context(config.grid(world_size), device, timeout, status)
    for name, dtype in precisions(config).items():
        # Masters are fp32 in checkpoints, so the fp64 steps have none.
        checkpoint = None if dtype == torch.float64 else folder / "checkpoints"
        write_outcome(folder / f"{name}-{rank}", take_steps(config, ctx, dtype, checkpoint))
    with status.waits("the end of all ranks"):
        end_process_group()
    return 0


def precisions(config: Config) -> dict[str, torch.dtype]:
    """The types in which the ranks take the steps: fp64 and fp32 on CPUs, else what the config says."""
    exact = config.train.device == "cpu" and config.train.precision == "fp32"
    return EXACT if exact else {config.train.precision: COMPUTE_DTYPES[config.train.precision]}
