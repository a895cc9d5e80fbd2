"""The distributed optimizer: ZeRO stage 1 (arXiv 1910.02054) over contiguous buffers.

All local parameters lie in one buffer in the model's dtype, their gradients in one fp32 buffer of the same layout, in
the order in which backward finishes them. The buffers are cut into buckets, each bucket into dp equal shards::

                 bucket 0                        bucket 1
    params  [ head | norm | layer n ...  |pad] [ ... | layer 0 | embedding |pad]     model dtype
    grads   [ rank 0 | rank 1 | ... dp shards] [ rank 0 | rank 1 | ...         ]     fp32
              ^ this rank's shard                ^ and here: fp32 master, exp_avg, exp_avg_sq

One step in three phases:

1. during the last micro-batch's backward, each bucket whose last gradient has arrived starts its reduce-scatter;
2. gradients of tensors that tensor-parallel ranks hold in common are summed, the global norm is taken, AdamW updates
   the shard (or not at all, on every rank, when the norm is not finite);
3. the shards, which the update has rounded to the model's dtype, are gathered.

On one rank it is the same code with groups of size 1. In fp32 the masters are the parameters themselves. Nothing here
waits for the device: loss scale, norm and the skip are device scalars.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.adamw import AdamWState, OptimizerKernels
from megatron_hammer.parallel.collectives import all_gather_into, all_reduce, reduce_scatter_into
from megatron_hammer.parallel.context import Group, ParallelContext
from megatron_hammer.parallel.sharding import Shard

ALIGNMENT = 64  # elements: every shard starts at a multiple of 256 bytes, what vector units and NCCL like


@dataclass
class Bucket:
    """One stretch of the buffers that is reduced and gathered as a whole."""

    start: int
    stop: int
    parameters: list[int]
    """Positions in the table."""
    missing: set[int] = field(default_factory=set)
    """Those of which the gradient of the running micro-batch has not arrived yet."""
    handle: Any = None
    """Of the reduce-scatter under way."""


class DistributedOptimizer:
    """Owns parameters, gradients, masters and moments of one rank.

    Args:
        model: its parameters are moved into the buffer (their values are kept).
        table: the parameter table of this rank; names and shapes as in the model.
        loss_scaling: fp16: multiply the loss by ``loss_scale`` and adapt that.
    """

    def __init__(
        self,
        model: nn.Module,
        table: Sequence[Any],
        config: OptimizerConfig,
        ctx: ParallelContext,
        bucket_bytes: int,
        loss_scaling: bool = False,
        kernels: OptimizerKernels | None = None,
    ) -> None:
        self.kernels, self.weights_version = kernels or OptimizerKernels(), 0
        self.table, self.config, self.ctx, self.loss_scaling = tuple(table), config, ctx, loss_scaling
        weights = dict(model.named_parameters())
        assert {p.name for p in table} == set(weights), "the parameter table and the model must name the same tensors"
        self.weights: list[Any] = [weights[p.name] for p in self.table]  # they carry some attributes more, see below
        self.offsets, self.buckets = lay_out([p.numel for p in self.table], bucket_bytes // 4, ctx.dp.size)
        total, dtype, device = self.buckets[-1].stop, self.weights[0].dtype, self.weights[0].device

        def zeros(size: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(size, dtype=of, device=device)

        self.params, self.grads = zeros(total, dtype), zeros(total)
        for weight, start in zip(self.weights, self.offsets, strict=True):
            place = self.params[start : start + weight.numel()].view_as(weight)
            place.copy_(weight.detach())
            weight.data = place
        shard_size = total // ctx.dp.size
        self.masters = self.params if self._masters_are_params() else zeros(shard_size)
        self.exp_avg, self.exp_avg_sq = zeros(shard_size), zeros(shard_size)
        self.updates, one = zeros(1).squeeze(), torch.ones((), device=device)
        self.loss_scale = one * config.initial_loss_scale if loss_scaling else one
        self.good_steps = zeros(1).squeeze()
        self.grad_divisor, self.applied = one, one.bool()
        self._pieces = list(self._own_pieces())
        self._states = [
            AdamWState(
                self._master(p),
                self.grads[p.start : p.stop],
                self.exp_avg[p.own],
                self.exp_avg_sq[p.own],
                p.decay,
                None if self._masters_are_params() else self.params[p.start : p.stop],
            )
            for p in _merged(self._pieces)
        ]
        self._shared = {over: list(self._slices_summed_over(over)) for over in ("tp", "kv")}
        self._counted = list(self._slices_counted())
        self.last_micro_batch = self.fresh = False
        self.begun = torch.tensor(False)  # on the host, for ``place_in_graph``
        self._index_of, self._placed = {id(w): i for i, w in enumerate(self.weights)}, set[int]()
        for index, weight in enumerate(self.weights):
            weight.gradients = self  # for our own products (``WeightGradients``)
            # Transformer Engine's, and for graphs: with a version counter of its own (``place_in_graph``).
            weight.main_grad, weight.grad_added_to_main_grad = self._gradient(index).data, False
            weight.register_post_accumulate_grad_hook(lambda w, i=index: self._take_gradient(i, w))
        self._bucket_of = {i: b for b in self.buckets for i in b.parameters}
        self.copy_masters_from_params()

    # ---- gradients: from backward into the buffer, and over the data-parallel ranks -----------------------------

    def start_micro_batch(self, first: bool, last: bool) -> None:
        """Say which micro-batch of the step comes; after the last one's backward the reduction is under way."""
        self.fresh, self.last_micro_batch, self.begun = first, last, torch.tensor(not first)
        for weight in self.weights:
            weight.overwrite_main_grad = first
        self._placed.clear()
        for bucket in self.buckets:
            bucket.missing.update(bucket.parameters)

    def _take_gradient(self, index: int, weight: Any) -> None:
        """Called by autograd when a weight's gradient is complete: add it in fp32, launch its bucket when that is.

        A layer of Transformer Engine has done the adding inside its matrix product, by the library's own protocol: it
        writes to ``weight.main_grad``, over what is there if ``weight.overwrite_main_grad``, sets
        ``weight.grad_added_to_main_grad``, and returns a gradient whose values mean nothing.
        """
        if weight.grad is None:  # an operation has added it by itself; one in a graph cannot call ``arrived``
            self._arrived(index)
            return
        if weight.grad_added_to_main_grad:
            weight.grad_added_to_main_grad = False
        else:
            place, add = self.place(weight)
            if add:
                place.add_(weight.grad)
            else:
                place.copy_(weight.grad)
        weight.grad = None
        self._arrived(index)

    def place(self, weight: Tensor) -> tuple[Tensor, bool]:
        """Where this step's gradient of a weight is summed, and whether the sum has begun (``WeightGradients``)."""
        index = self._index_of[id(weight)]
        begun = not self.fresh or index in self._placed
        self._placed.add(index)
        return self._gradient(index), begun

    def arrived(self, weight: Tensor) -> None:
        """An operation has added the whole gradient of a weight by itself (``WeightGradients``)."""
        self._arrived(self._index_of[id(weight)])

    def place_in_graph(self, weight: Any) -> tuple[Tensor, Tensor]:
        """The place and whether the sum has begun, as inputs of a compiled layer's graph (``WeightGradients``)."""
        return weight.main_grad, self.begun

    def _gradient(self, index: int) -> Tensor:
        """The gradient of a weight in the buffer, in the weight's shape."""
        start, parameter = self.offsets[index], self.table[index]
        return self.grads[start : start + parameter.numel].view(parameter.shape)

    def _arrived(self, index: int) -> None:
        bucket = self._bucket_of[index]
        if index in bucket.missing:
            bucket.missing.remove(index)
            if self.last_micro_batch and not bucket.missing:
                self._start_reduction(bucket)

    def _start_reduction(self, bucket: Bucket) -> None:
        shard = self.grads[self._shard_range(bucket)]
        bucket.handle = reduce_scatter_into(shard, self.grads[bucket.start : bucket.stop], self.ctx.dp)

    def finish_reduction(self) -> None:
        """Wait for the buckets, then sum what tensor-parallel ranks hold in common."""
        for bucket in self.buckets:
            assert bucket.handle is not None, f"no gradient for {[self.table[i].name for i in bucket.parameters]}"
            bucket.handle.wait()
            bucket.handle = None
        for group, views in ((self.ctx.tp, self._shared["tp"]), (self.ctx.kv, self._shared["kv"])):
            _sum_in_one_message(views, group)

    # ---- the update ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Norm of the whole model's gradient before clipping (fp32 device scalar); the update will divide accordingly.

        Each logical element counts once: copies on other tensor-parallel ranks do not. Communicates over the world.
        """
        self.finish_reduction()
        squares = torch.zeros_like(self.updates)
        for part in self._counted:
            self.kernels.add_square_sum(part, squares)
        all_reduce(squares, self.ctx.world)
        norm = squares.sqrt() / self.loss_scale
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
        self.applied = norm.isfinite()
        self.grad_divisor = self.loss_scale / factor
        return norm

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        """Update the shard, gather the new parameters; returns a device bool, equal on all ranks: was it applied?"""
        skip = (~self.applied).float()
        self.kernels.update(self._states, self.updates, lr, self.config, self.grad_divisor, skip)
        if self.loss_scaling:
            self._adapt_loss_scale()
        self._gather_params()
        return self.applied

    def _adapt_loss_scale(self) -> None:
        """Halve after an overflow, double after ``loss_scale_window`` good steps in a row (arXiv 1710.03740)."""
        good = torch.where(self.applied, self.good_steps + 1, 0)
        full = good >= self.config.loss_scale_window
        grown = torch.where(full, self.loss_scale * 2, self.loss_scale)
        self.loss_scale = torch.where(self.applied, grown, (self.loss_scale / 2).clamp(min=1.0))
        self.good_steps = torch.where(full, 0, good)

    @torch.no_grad()
    def copy_params_from_masters(self) -> None:
        """Round this rank's masters to the model's dtype and gather everybody's. Communicates over dp."""
        if not self._masters_are_params():
            for bucket, own in self._bucket_shards():
                self.params[self._shard_range(bucket)].copy_(self.masters[own])
        self._gather_params()

    def _gather_params(self) -> None:
        self.weights_version += 1
        handles = [
            all_gather_into(self.params[b.start : b.stop], self.params[self._shard_range(b)], self.ctx.dp)
            for b in self.buckets
        ]
        for handle in handles:
            handle.wait()

    @torch.no_grad()
    def copy_masters_from_params(self) -> None:
        """Start from the model's present (initial) weights."""
        if not self._masters_are_params():
            for bucket, own in self._bucket_shards():
                self.masters[own].copy_(self.params[self._shard_range(bucket)])

    # ---- state for checkpoints -------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """This rank's part of the logical state: views, so that loading writes straight into the optimizer."""
        return [
            Shard(
                self.table[p.index],
                p.start - self.offsets[p.index],
                p.stop - self.offsets[p.index],
                {"weight": self._master(p), "exp_avg": self.exp_avg[p.own], "exp_avg_sq": self.exp_avg_sq[p.own]},
            )
            for p in self._pieces
        ]

    def scalar_state(self) -> dict[str, float]:
        """The few numbers beside the tensors; waits for the device."""
        return {k: float(getattr(self, k)) for k in ("updates", "loss_scale", "good_steps")}

    def load_scalar_state(self, state: dict[str, float]) -> None:
        """The inverse of ``scalar_state``."""
        for name in ("updates", "loss_scale", "good_steps"):
            setattr(self, name, torch.full_like(self.updates, state[name]))

    # ---- layout ----------------------------------------------------------------------------------------------------

    def _masters_are_params(self) -> bool:
        return self.params.dtype == torch.float32

    def _shard_range(self, bucket: Bucket) -> slice:
        size = (bucket.stop - bucket.start) // self.ctx.dp.size
        return slice(bucket.start + size * self.ctx.dp.rank, bucket.start + size * (self.ctx.dp.rank + 1))

    def _bucket_shards(self) -> Iterator[tuple[Bucket, slice]]:
        """Each bucket with the place of its shard in the shard-sized tensors (masters, moments)."""
        at = 0
        for bucket in self.buckets:
            size = (bucket.stop - bucket.start) // self.ctx.dp.size
            yield bucket, slice(at, at + size)
            at += size

    def _own_pieces(self) -> Iterator[Piece]:
        """What of each parameter falls into this rank's shards."""
        for bucket, own in self._bucket_shards():
            shard = self._shard_range(bucket)
            for i in bucket.parameters:
                start = max(shard.start, self.offsets[i])
                stop = min(shard.stop, self.offsets[i] + self.table[i].numel)
                if start < stop:
                    first = own.start + start - shard.start
                    yield Piece(i, start, stop, slice(first, first + stop - start), self.table[i].decay)

    def _master(self, piece: Piece) -> Tensor:
        return self.params[piece.start : piece.stop] if self._masters_are_params() else self.masters[piece.own]

    def _slice_ranges(self) -> Iterator[tuple[Any, int, int]]:
        """Each slice of the table that this rank's shards touch, with its range in the buffers."""
        for piece in self._pieces:
            parameter, offset = self.table[piece.index], self.offsets[piece.index]
            cols = parameter.shape[1] if len(parameter.shape) > 1 else 1
            for s in parameter.slices:
                start = max(piece.start, offset + s.local_row * cols)
                stop = min(piece.stop, offset + (s.local_row + s.num_rows) * cols)
                if start < stop:
                    yield s, start, stop

    def _slices_summed_over(self, group: str) -> Iterator[Tensor]:
        return (self.grads[start:stop] for s, start, stop in self._slice_ranges() if s.sum_over == group)

    def _slices_counted(self) -> Iterator[Tensor]:
        """Gradients that this rank counts in the global norm; neighbours joined to keep the list short."""
        ranges: list[list[int]] = []
        for s, start, stop in self._slice_ranges():
            if s.owned and ranges and ranges[-1][1] == start:
                ranges[-1][1] = stop
            elif s.owned:
                ranges.append([start, stop])
        return (self.grads[start:stop] for start, stop in ranges)


@dataclass(frozen=True)
class Piece:
    """The part of one parameter (position in the table) that a rank's shard holds."""

    index: int
    start: int
    stop: int
    """Range in the parameter and gradient buffers."""
    own: slice
    """Range in the shard-sized tensors."""
    decay: bool


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring pieces with the same decay as one, so that AdamW runs over few long tensors."""
    merged: list[Piece] = []
    for p in pieces:
        last = merged[-1] if merged else None
        if last and last.stop == p.start and last.own.stop == p.own.start and last.decay == p.decay:
            merged[-1] = Piece(last.index, last.start, p.stop, slice(last.own.start, p.own.stop), p.decay)
        else:
            merged.append(p)
    return merged


def lay_out(sizes: Sequence[int], bucket_elements: int, dp_size: int) -> tuple[list[int], list[Bucket]]:
    """Place parameters, last first, and close a bucket once it has ``bucket_elements``.

    Returns:
        the offset of each parameter (in the order given) and the buckets, each a multiple of 64 x dp elements long.
    """
    offsets, buckets, at = [0] * len(sizes), [Bucket(0, 0, [])], 0
    for i in reversed(range(len(sizes))):
        offsets[i] = at
        buckets[-1].parameters.append(i)
        at += sizes[i]
        if at - buckets[-1].start >= bucket_elements or i == 0:
            at = -(-at // (ALIGNMENT * dp_size)) * ALIGNMENT * dp_size
            buckets[-1].stop = at
            if i:
                buckets.append(Bucket(at, at, []))
    return offsets, buckets


def _sum_in_one_message(views: list[Tensor], group: Group) -> None:
    if not views or group.size == 1:
        return
    message = torch.cat(views)
    all_reduce(message, group)
    for view, part in zip(views, message.split([v.numel() for v in views]), strict=True):
        view.copy_(part)
