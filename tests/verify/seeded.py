"""Seeded faults, each of which replaces one function while a rank takes the steps of a proof."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from megatron_hammer.config import Config
from megatron_hammer.kernels import argument_types, context_parallel
from megatron_hammer.kernels import linear as linear_layers
from megatron_hammer.kernels.newton_schulz import orthogonalise
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.model import layers, llama, parameters
from megatron_hammer.model.head_loss import HeadAndLoss
from megatron_hammer.optim import store
from megatron_hammer.optim.adamw import AdamW
from megatron_hammer.optim.matrices import Exchange
from megatron_hammer.optim.muon import Muon, update_scale
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.store import FlatStore, StoredGradient
from megatron_hammer.parallel import placement
from megatron_hammer.parallel.collectives import Done
from megatron_hammer.parallel.context import Group, build_parallel_context
from megatron_hammer.parallel.sequence_split import SequenceShare
from megatron_hammer.sampling import batch
from megatron_hammer.train import schedules
from megatron_hammer.train import step as training_step
from megatron_hammer.verify import steps
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.steps import take_steps

BEGUN = 1  # the version of weights before the first update: they have been gathered once


def _norms_not_summed() -> Any:
    real = parameters._norm
    return mock.patch.object(
        parameters, "_norm", lambda *a: dataclasses.replace(
            row := real(*a), slices=tuple(dataclasses.replace(s, sum_over="none") for s in row.slices)))  # fmt: skip


def _padding_counts() -> Any:
    real = argument_types.Columns.of
    return mock.patch.object(argument_types.Columns, "of", lambda rank, local, vocab: real(rank, local, 10**6))


def _wrong_groups() -> Any:
    """Query groups dealt out from the other end."""
    real = placement._share
    return mock.patch.object(
        placement, "_share", lambda total, i, n: real(total, n - 1 - i if total == 2 and n > 1 else i, n))  # fmt: skip


def _gathered_early() -> Any:
    """The first bucket goes out before the update."""

    def gather(self: FlatStore) -> None:
        old = self.params[: self.buckets[0].stop].clone() if self.version == BEGUN else None
        real(self)
        self.wait()
        if old is not None:
            self.params[: self.buckets[0].stop] = old

    real = FlatStore.gather
    return mock.patch.object(FlatStore, "gather", gather)


def _shards_swapped() -> Any:
    """What a rank updates lands where the other's shard belongs."""

    def gather(full: torch.Tensor, shard: torch.Tensor, group: Group) -> Any:
        real(full, shard, group).wait()
        full.copy_(torch.cat(full.chunk(group.size)[::-1]))
        return Done()

    real = store.all_gather_into
    return mock.patch.object(store, "all_gather_into", gather)


def _overwritten_early() -> Any:
    """A prefetched layer's weights come into memory that is used until then by the layer before."""

    def acquire(self: FlatStore, part: str, then: Sequence[str] = ()) -> None:
        real(self, part, then)
        if (part, tuple(then)) == ("layers.0", ("layers.1",)):
            for here, other in zip(*(self._buckets_of[name] for name in (part, *then)), strict=True):
                store._wait_for(other)
                self.weight_buffers.full[here].copy_(self.weight_buffers.full[other])

    real = FlatStore.acquire
    return mock.patch.object(FlatStore, "acquire", acquire)


def _released_early() -> Any:
    """A bucket's buffer is written by the next micro-batch's gradients before its shard was added."""

    def start_reduction(self: FlatStore, bucket: Any) -> None:
        real(self, bucket)
        if not self.last:
            self._finish(bucket)
            self.sum_buffers.shard(bucket).zero_()

    real = FlatStore.start_reduction
    return mock.patch.object(FlatStore, "start_reduction", start_reduction)


def _positions_shifted() -> Any:
    real = llama.Stage.rope
    return mock.patch.object(
        llama.Stage, "rope", lambda self, n: tuple(t[1:] for t in real(self, n + 1)))  # fmt: skip


def _positions_stretched(of: Callable[[int], bool] = lambda tp_rank: True) -> Any:
    """On all ranks, or on some."""

    def rope(self: llama.Stage, n: int) -> Any:
        return tuple(t[::2] for t in real(self, 2 * n)) if of(self.placement.tp_rank) else real(self, n)

    real = llama.Stage.rope
    return mock.patch.object(llama.Stage, "rope", rope)


def _share(change: Callable[[SequenceShare], SequenceShare]) -> Any:
    """What a context-parallel rank is told of its share."""
    real = batch.share
    return mock.patch.object(batch, "share", lambda *a, **k: change(real(*a, **k)))


def _boundary_one_off_in_a_share() -> Any:
    real = batch.share

    def shifted(ends: np.ndarray, *a: Any, **k: Any) -> SequenceShare:
        moved = ends.copy()
        moved[2:-1] = np.minimum(moved[2:-1] + 1, moved[3:] - 1)
        right = real(ends, *a, **k)
        return right if len(np.unique(moved)) < len(ends) else real(moved, *a, **k)

    return mock.patch.object(batch, "share", shifted)


def _without_first_key(share: SequenceShare) -> SequenceShare:
    """Of every stretch that has more keys than queries: of documents that are cut."""
    cut, firsts = share.key_lengths > share.lengths, np.cumsum(share.key_lengths) - share.key_lengths
    rows = np.delete(share.key_rows, firsts[cut])
    return dataclasses.replace(share, key_lengths=share.key_lengths - cut, key_rows=rows)


def _key_gradients_not_summed() -> Any:
    """Each rank keeps what its own queries say of its keys and values."""
    own = lambda x, group: (x.chunk(group.size)[group.rank], Done())  # noqa: E731
    return mock.patch.object(context_parallel, "reduce_scatter_rows_async", own)


def _log_added() -> Any:
    real = HeadAndLoss.__call__
    return mock.patch.object(HeadAndLoss, "__call__", lambda *a: real(*a) + np.log(2))


def _stages_swapped() -> Any:
    """The second and the third have each other's layers."""
    real = Config.placement
    return mock.patch.object(
        Config, "placement", lambda self, tp=0, stage=0: real(self, tp, {1: 2, 2: 1}.get(stage, stage)))  # fmt: skip


def _tied_gradients_summed(times: int) -> Any:
    def reduce(self: FlatStore) -> None:
        tied = self._shared["stages"]
        self._shared["stages"] = []
        real(self)
        self._shared["stages"] = tied
        for _ in range(times):
            store.sum_in_one_message(tied, self.ctx.ends)

    real = FlatStore.reduce
    return mock.patch.object(FlatStore, "reduce", reduce)


def _shards_orthogonalised_alone() -> Any:
    """Each rank takes what it has of a matrix for the matrix, as Megatron-LM did (Megatron-LM#7117)."""

    def alone(self: Muon, exchange: Exchange, received: torch.Tensor) -> torch.Tensor:
        return received

    def directions(self: Muon, places: Any, divisor: torch.Tensor, applied: torch.Tensor) -> torch.Tensor:
        message, at = real(self, places, divisor, applied), 0
        for piece in (piece for piece, _, _ in places if piece.owned):
            for box in piece.boxes:
                part = message[at + box.position : at + box.position + box.numel].view(box.shape)
                wide = part if part.shape[0] <= part.shape[1] else part.mT
                wide.copy_(orthogonalise(wide[None].clone())[0])
                part.mul_(update_scale(*piece.matrix.shape))
            at += piece.numel
        return message

    real = Muon._directions
    return mock.patch.multiple(Muon, _orthogonalised=alone, _directions=directions)


def _directions_of_another_rank() -> Any:
    """The owner puts each message at the place of the next rank's."""
    real = Muon._orthogonalised
    return mock.patch.object(
        Muon, "_orthogonalised", lambda self, exchange, received: real(self, exchange, received.roll(1))
    )


# ---- of sums and ranks ----------------------------------------------------------------------------------------------


def _overwritten_by_the_next_micro_batch() -> Any:
    real = FlatStore.begin
    return mock.patch.object(FlatStore, "begin", lambda self, first, last, watch=None: real(self, True, last, watch))


def _not_zeroed() -> Any:
    """The second step adds to the gradients of the first."""
    real, steps_begun = FlatStore.begin, [0]

    def begin(self: FlatStore, first: bool, last: bool, watch: Any = None) -> None:
        steps_begun[0] += first
        real(self, first and steps_begun[0] == 1, last, watch)

    return mock.patch.object(FlatStore, "begin", begin)


def _first_micro_batch_twice() -> Any:
    real = StoredGradient.add

    def add(self: StoredGradient, write: Any, last: bool = True) -> Any:
        if self.store.first:
            real(self, write, False)
        return real(self, write, last)

    return mock.patch.object(StoredGradient, "add", add)


def _replicas_not_summed() -> Any:
    def keep(shard: torch.Tensor, full: torch.Tensor, group: Group, room: Any = None) -> Any:
        shard.copy_(full.chunk(group.size)[group.rank].clone())
        return Done()

    return mock.patch.object(store, "reduce_scatter_into", keep)


def _one_replica_twice() -> Any:
    real = store.reduce_scatter_into

    def reduce(shard: torch.Tensor, full: torch.Tensor, group: Group, room: Any = None) -> Any:
        return real(shard, full.mul_(2) if group.rank == 1 else full, group, room)

    return mock.patch.object(store, "reduce_scatter_into", reduce)


def _in_product(direction: str, change: Callable[[torch.Tensor, Group], torch.Tensor | None]) -> Any:
    """In ``forward`` or ``backward`` of linear layers: what is summed over tensor-parallel ranks is another thing, or
    where ``change`` gives nothing, not summed at all."""
    real, passes = linear_layers.reduce_scatter_rows_async, linear_layers._Linear
    inside = [False]

    def marked(run: Any) -> Any:
        def marking(*a: Any) -> Any:
            inside[0] = True
            try:
                return run(*a)
            finally:
                inside[0] = False

        return staticmethod(marking)

    def reduce(full: torch.Tensor, group: Group) -> Any:
        changed = change(full, group) if inside[0] else full
        return (full.chunk(group.size)[group.rank].clone(), Done()) if changed is None else real(changed, group)

    both = mock.patch.multiple(linear_layers, reduce_scatter_rows_async=reduce)
    inner = mock.patch.object(passes, direction, marked(getattr(passes, direction)))
    return _together(both, inner)


def _together(*patches: Any) -> Any:
    stack = contextlib.ExitStack()

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with stack:
            for patch in patches:
                stack.enter_context(patch)
            yield

    return entered()


def _embedding_of_one_rank_missing() -> Any:
    real = layers._sum_parts
    return mock.patch.object(
        layers, "_sum_parts", lambda part, options: real(part * (options.tp.rank != 1), options))  # fmt: skip


def _of_last_micro_batch(change: Callable[[FlatStore, int], None]) -> Any:
    """Something happens to each complete gradient before it is reduced."""
    real = FlatStore.complete

    def complete(self: FlatStore, bucket: Any) -> None:
        for i in bucket.parameters if self.last else ():
            change(self, i)
        real(self, bucket)

    return mock.patch.object(FlatStore, "complete", complete)


def _half_of_first_layer(store: FlatStore, i: int) -> None:
    if store.table[i].name.startswith("layers.0."):
        store.gradients[i].main_grad.mul_(0.5)


def _gate_and_up_swapped(store: FlatStore, i: int) -> None:
    if "gate_up" in store.table[i].name:
        place = store.gradients[i].main_grad
        place.copy_(torch.cat(place.chunk(2)[::-1]))


def _rows_moved(store: FlatStore, i: int) -> None:
    if "down" in store.table[i].name:
        place = store.gradients[i].main_grad
        place.copy_(place.roll(3, 0))


# ---- of what ranks are told -----------------------------------------------------------------------------------------


def _labels_of_one_replica() -> Any:
    """Each token is its own label."""
    real = llama.Stage.forward

    def forward(self: llama.Stage, tokens: Any, labels: Any, *rest: Any, **named: Any) -> Any:
        return real(self, tokens, tokens if dist.get_rank() >= 2 else labels, *rest, **named)

    return mock.patch.object(llama.Stage, "forward", forward)


def _documents(change: Callable[[np.ndarray], np.ndarray]) -> Any:
    real = PackedSequences.from_cu_seqlens
    changed = lambda ends, device: real(change(ends).astype(np.int32), device)  # noqa: E731
    return mock.patch.object(PackedSequences, "from_cu_seqlens", changed)


def _whole_samples(ends: np.ndarray) -> np.ndarray:
    return np.arange(0, ends[-1] + 1, 32 if ends[-1] % 32 == 0 else ends[-1])


def _one_later(ends: np.ndarray) -> np.ndarray:
    return np.unique(np.r_[ends[:1], np.minimum(ends[1:-1] + 1, ends[2:] - 1), ends[-1:]])


def _one_earlier(ends: np.ndarray) -> np.ndarray:
    return np.unique(np.where(ends % 32 == 0, ends, ends - 1))


def _first_samples_twice() -> Any:
    """A rank computes its first micro-batch in place of its second, too."""
    real = steps.own_micro_batches
    return mock.patch.object(steps, "own_micro_batches", lambda *a: [real(*a)[0]] * len(real(*a)))


def _weighted(weight_of: Callable[[int], float]) -> Any:
    real = training_step.sum_of_weights
    return mock.patch.object(training_step, "sum_of_weights", lambda *a: real(*a) * weight_of(dist.get_rank()))


def _in_training(change: Callable[[FlatStore, torch.Tensor], None], recorded: bool) -> Any:
    """What layer 1 computes with in the second micro-batch of a step is changed, and in no forward alone.

    Args:
        recorded: in forward; else what is gathered for backward.
    """
    real, micro_batches = FlatStore.acquire, [0]
    begin = FlatStore.begin

    def begun(self: FlatStore, first: bool, last: bool, watch: Any = None) -> None:
        micro_batches[0] = 1 if first else micro_batches[0] + 1
        begin(self, first, last, watch)

    def acquire(self: FlatStore, part: str, then: Sequence[str] = ()) -> None:
        real(self, part, then)
        if part == "layers.1" and micro_batches[0] == 2 and torch.is_grad_enabled() is recorded:
            for bucket in self._buckets_of[part]:
                change(self, self.weight_buffers.full[bucket])

    return _together(mock.patch.object(FlatStore, "begin", begun), mock.patch.object(FlatStore, "acquire", acquire))


def _objective(change: Callable[[Any, float, float], tuple[float, float]]) -> Any:
    """Another share of the loss, or of the z-loss; change(batch, share, z_loss)."""
    real = schedules.objective_of
    return mock.patch.object(schedules, "objective_of", lambda batch, *a: real(batch, *change(batch, *a)))


# ---- of the update --------------------------------------------------------------------------------------------------


def _borders_of_shards_lost() -> Any:
    real = FlatStore.reduce

    def reduce(self: FlatStore) -> None:
        real(self)
        for bucket in self.buckets:
            self.sum_buffers.shard(bucket)[[0, -1]] = 0

    return mock.patch.object(FlatStore, "reduce", reduce)


def _divisor_of_before() -> Any:
    """The second update divides by what the first one divided by."""
    real, divisors = Optimizer.clip_grad_norm, []  # type: ignore[var-annotated]

    def clip(self: Optimizer, most: float) -> torch.Tensor:
        norm = real(self, most)
        divisors.append(self.divisor)
        self.divisor = divisors[0]
        return norm

    return mock.patch.object(Optimizer, "clip_grad_norm", clip)


def _update(change: Callable[[AdamW, Any, float], float | None]) -> Any:
    """AdamW with another learning rate, or no update at all."""
    real = AdamW._update

    def update(self: AdamW, lr: float, *rest: Any) -> None:
        changed = change(self, rest, lr)
        if changed is not None:
            real(self, changed, *rest)

    return mock.patch.object(AdamW, "_update", update)


def _one_rank_once() -> Any:
    """Rank 3 does not take its second update."""
    made = [0]

    def change(rule: AdamW, rest: Any, lr: float) -> float | None:
        made[0] += 1
        return None if made[0] == 2 and dist.get_rank() == 3 else lr

    return _update(change)


def _norms_not_updated() -> Any:
    def change(rule: AdamW, rest: Any, lr: float) -> float:
        rule.by_element = [state for state in rule.by_element if state.decay]
        return lr

    return _update(change)


def _updates_ahead() -> Any:
    real = AdamW.__init__

    def init(self: AdamW, *a: Any, **k: Any) -> None:
        real(self, *a, **k)
        self.updates += 1

    return mock.patch.object(AdamW, "__init__", init)


def _norm(square_sum: Callable[[FlatStore, Any], torch.Tensor]) -> Any:
    return mock.patch.object(FlatStore, "square_sum", square_sum)


def _over_tensor_parallel_ranks(self: FlatStore, add: Any) -> torch.Tensor:
    squares = self.local_square_sum(add)
    store.all_reduce(squares, self.ctx.tp)
    return squares


def _copies_counted() -> Any:
    def counted(self: FlatStore) -> list[torch.Tensor]:
        return [self.grads[self.sum_buffers.place(part.bucket, a, b)] for _, part, a, b in self.layout.slices()]

    return mock.patch.object(FlatStore, "counted", counted)


def _gathered(change: Callable[[list[Any]], list[Any]]) -> Any:
    """Of the buckets whose shards have changed, some are gathered."""
    real = FlatStore.gather

    def gather(self: FlatStore) -> None:
        whole = self.buckets
        self.buckets = change(whole)
        try:
            real(self)
        finally:
            self.buckets = whole

    return mock.patch.object(FlatStore, "gather", gather)


FAULTS: dict[str, Callable[[], Any]] = {
    "none": partial(mock.patch.object, steps, "STEPS", steps.STEPS),
    "norms": _norms_not_summed,
    "times DP": partial(_weighted, lambda rank: 0.5),
    "accumulated twice": partial(_weighted, lambda rank: 2.0),
    "padding": _padding_counts,
    "groups": _wrong_groups,
    "early": _gathered_early,
    "swapped": _shards_swapped,
    "overwritten": _overwritten_early,
    "released": _released_early,
    "boundary": partial(_documents, _one_later),
    "stretched": _positions_stretched,
    "shifted": _positions_shifted,
    "log CP": _log_added,
    "positions of a share": lambda: _share(
        lambda share: dataclasses.replace(share, positions=np.arange(len(share.rows)))
    ),
    "boundary of a share": _boundary_one_off_in_a_share,
    "first key of a share missing": lambda: _share(_without_first_key),
    "keys of a share": lambda: _share(lambda share: dataclasses.replace(share, key_rows=np.sort(share.key_rows))),
    "key gradients": _key_gradients_not_summed,
    "stages": _stages_swapped,
    "tied twice": partial(_tied_gradients_summed, 2),
    "tied never": partial(_tied_gradients_summed, 0),
    "shards alone": _shards_orthogonalised_alone,
    "owner": _directions_of_another_rank,
    "overwritten sums": _overwritten_by_the_next_micro_batch,
    "not zeroed": _not_zeroed,
    "micro-batch twice": _first_micro_batch_twice,
    "replicas": _replicas_not_summed,
    "replica twice": _one_replica_twice,
    "input gradients": lambda: _in_product("backward", lambda full, group: None),
    "a part of a sum": lambda: _in_product("forward", lambda full, group: full * (group.rank != 1)),
    "embedding of a rank": _embedding_of_one_rank_missing,
    "half a layer": partial(_of_last_micro_batch, _half_of_first_layer),
    "gate and up": partial(_of_last_micro_batch, _gate_and_up_swapped),
    "rows moved": partial(_of_last_micro_batch, _rows_moved),
    "RoPE of a rank": partial(_positions_stretched, lambda tp_rank: tp_rank == 1),
    "labels of a replica": _labels_of_one_replica,
    "documents ignored": partial(_documents, _whole_samples),
    "boundary earlier": partial(_documents, _one_earlier),
    "samples twice": _first_samples_twice,
    "weight of a replica": partial(_weighted, lambda rank: 0.5 if rank >= 2 else 1),
    "learning rate of a rank": lambda: _update(lambda rule, rest, lr: lr * 2 if dist.get_rank() == 1 else lr),
    "an update of a rank": _one_rank_once,
    "norms kept": _norms_not_updated,
    "updates ahead": _updates_ahead,
    "not clipped": lambda: mock.patch.object(
        Optimizer, "clip_grad_norm", lambda self, most, real=Optimizer.clip_grad_norm: real(self, 0.0)
    ),
    "not there in time": partial(_in_training, lambda store, full: full[len(full) // 2 :].zero_(), True),
    "rolled for backward": partial(_in_training, lambda store, full: full.copy_(full.roll(len(full) // 2)), False),
    "z-loss twice": partial(_objective, lambda batch, share, z_loss: (share, 2 * z_loss)),
    "borders of shards": _borders_of_shards_lost,
    "divisor of before": _divisor_of_before,
    "first losses reported": lambda: mock.patch.object(
        training_step,
        "sum_by_source",
        lambda batches, losses, *a, real=training_step.sum_by_source: real(batches, losses[:1] * len(losses), *a),
    ),
    "norms decay": lambda: mock.patch.object(parameters.Parameter, "decay", property(lambda self: True)),
    "own norm": lambda: _norm(lambda store, add: store.local_square_sum(add)),
    "norm of TP": partial(_norm, _over_tensor_parallel_ranks),
    "copies in the norm": _copies_counted,
    "never gathered": lambda: _gathered(lambda buckets: []),
    "first bucket never gathered": lambda: _gathered(lambda buckets: buckets[1:]),
}


def faulty_steps(rank: int, config: Config, fault: str, dtype: torch.dtype = torch.float64) -> Outcome:
    """This rank's steps with a fault in them."""
    world = torch.distributed.get_world_size()
    ctx = build_parallel_context(config.grid(world), torch.device("cpu"))
    with FAULTS[fault]():
        return take_steps(config, ctx, dtype)
