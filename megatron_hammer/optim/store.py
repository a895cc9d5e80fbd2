"""The flat store: the weights of a rank, and the sums of their gradients, in buckets (ZeRO, arXiv 1910.02054).

``buckets.py`` says where each parameter lies, ``buffers.py`` has the memory. Ranks that hold the same weights share a
bucket in equal shards, and a rank updates its shard of each. What it keeps of the rest is ``shard``::

                            weights         sums of gradients    bytes of a parameter in bf16 on n ranks
    optimizer  (ZeRO 1)     all of them     all of them          2 + 4 + 12/n
    gradients  (ZeRO 2)     all of them     its shards           2 + (4 + 12)/n
    weights    (ZeRO 3)     its shards      its shards           (2 + 4 + 12)/n

The store is made from the parameter table, before the model, which takes its weights from it (``weight``). In a step::

    begin       before each micro-batch
    acquire     before a part of the model computes: its weights are there on return. Those that an update has changed
                may still be on their way; those of which the rank keeps its shard only are gathered, and the gather of
                the part that comes next begins. A rank that shares its weights with nobody needs none of it
    release     when it has computed: what is gathered for it alone is given up. Backward does both again
    add         the layers' backward: each gradient into its place; a bucket whose last gradient has arrived starts its
                reduce-scatter, while backward still runs. Of whole sums that is once a step, in the last micro-batch;
                else in each micro-batch, whose shard is then added in fp32 and the bucket's buffer given up
    reduce      waits for the buckets, and sums what other ranks hold in common
    stretches   what an optimizer updates: this rank's shards of weights and gradients
    gather      starts to bring every rank's updated shards together, the bucket that forward needs first before the
                others; nothing where weights are gathered for each use
    wait        before anybody else reads or writes weights: waits for all

States may be divided over some of the ranks only (``parallel.shard_size``): ``ctx.shard`` are those, and ``ctx.copies``
the ranks that hold the same shards as this one, over which gradients are summed afterwards.

On one rank it is the same code with groups of size 1. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from megatron_hammer.base.pages import Spare
from megatron_hammer.config import Sharded
from megatron_hammer.kernels.ranges import GRADIENT, RangeOf, no_range, within
from megatron_hammer.optim.buckets import Bucket, BufferLayout, ParameterShard, Row, Stretch
from megatron_hammer.optim.buffers import Buffers
from megatron_hammer.parallel.collectives import all_gather_into, all_reduce, reduce_scatter_into
from megatron_hammer.parallel.context import Group, ParallelContext

Result = TypeVar("Result")


class GradientWatch(Protocol):
    """An observer that is shown the gradients of a micro-batch before they are reduced (``train/corruption.py``)."""

    @property
    def alone(self) -> bool:
        """Whether nothing is reduced at all: the next micro-batch writes over these gradients."""
        ...

    def gradients(self, store: FlatStore, bucket: Bucket) -> None:
        """All gradients of a bucket are there."""
        ...


class StoredGradient:
    """The gradient of one weight (``Gradient`` in ``kernels/linear.py``)."""

    def __init__(self, store: FlatStore, index: int, bucket: Bucket, main_grad: Tensor) -> None:
        self.store, self.index, self.bucket, self.main_grad = store, index, bucket, main_grad
        self.written = False  # in the running micro-batch

    @property
    def begun(self) -> Tensor:
        return self.store.begun

    @property
    def version(self) -> int | None:
        return self.store.version if self.store.weights_stay else None

    def add(self, write: Callable[[Tensor, bool], Result], last: bool = True) -> Result:
        store = self.store
        begun, self.written = self.written or not (store.first or store.sums_are_new), True
        if store.sums_are_new:
            store.open_sum(self.bucket)
        result = write(self.main_grad, begun)
        missing = self.bucket.missing
        assert self.index in missing, f"{store.table[self.index].name} got a gradient after its last one"
        if last:
            missing.remove(self.index)
            if not missing:
                store.complete(self.bucket)
        return result

    def ready(self) -> None:
        if self.index in self.bucket.missing:  # else the layer was not compiled after all, and has added by itself
            self.add(lambda main_grad, begun: None)  # it has been written


class RangedGradient(StoredGradient):
    """The same for a profiler: what is written is in its range."""

    def add(self, write: Callable[[Tensor, bool], Result], last: bool = True) -> Result:
        return super().add(within(self.store.range_of, GRADIENT, write), last)


class FlatStore:
    """Weights and gradients of one rank (``GradientStore`` in ``kernels/linear.py``).

    Args:
        table: the parameter table of this rank.
        dtype: of the weights.
        bucket_bytes: size of a bucket's gradients, at least; with many ranks more (``bucket_elements``).
        range_of: entered around each addition to a gradient, for a profiler.
        overlap_gather: leave the gather of weights under way until somebody needs them; false: wait at once.
        overlap_reduce: leave the reduction of a bucket under way while backward runs; false: wait at once.
        shard: what is divided over the ranks.
        reshard_after_forward: give up gathered weights after forward and gather them again in backward; false: keep
            them until backward has used them.
    """

    block = 1
    """Elements: a parameter starts at, and a shard is of, a multiple of so many."""

    def __init__(
        self,
        table: Sequence[Row],
        dtype: torch.dtype,
        ctx: ParallelContext,
        bucket_bytes: int,
        range_of: RangeOf = no_range,
        overlap_gather: bool = True,
        shard: Sharded = "optimizer",
        reshard_after_forward: bool = True,
        overlap_reduce: bool = True,
    ) -> None:
        self.range_of, self.overlap_gather, self.reshard = range_of, overlap_gather, reshard_after_forward
        self.table, self.ctx = tuple(table), ctx
        self.of_stages = [self]
        """The stores of this rank's stages (``stage_stores.py``): it has one."""
        self.group = ctx.sharing
        self.needs_acquire = self.group.size > 1
        """Whether weights may be on their way or given up; a rank alone has all of them at any time."""
        self.overlap_reduce = overlap_reduce or self.group.size == 1  # one rank has nothing to wait for
        by_part = shard == "weights"
        self.layout = BufferLayout(self.table, bucket_bytes, self.group.size, self.group.rank, by_part, self.block)
        self.offsets, self.buckets = self.layout.offsets, self.layout.buckets
        spare, sum_dtype = Spare(), torch.promote_types(dtype, torch.float32)
        self.weight_buffers = Buffers(self.layout, dtype, ctx.device, shard != "weights", spare)
        self.sum_buffers = Buffers(self.layout, sum_dtype, ctx.device, shard == "optimizer", spare)
        self.params, self.grads = self.weight_buffers.kept, self.sum_buffers.kept
        self.weights_stay = self.weight_buffers.whole
        """Whether this rank keeps all its weights; else a part of the model has them from acquire to release."""
        self.sums_are_new = not self.sum_buffers.whole
        """Whether each micro-batch writes its gradients over what was there, because sums are kept in shards."""
        bucket_of = {i: bucket for bucket in self.buckets for i in bucket.parameters}
        self.weights = [nn.Parameter(self.weight_buffers.views[i]) for i in range(len(self.table))]
        kind = StoredGradient if range_of is no_range else RangedGradient
        self.gradients = [kind(self, i, bucket_of[i], self.sum_buffers.views[i]) for i in range(len(self.table))]
        self._buckets_of: dict[str, list[Bucket]] = {}
        for bucket in reversed(self.buckets):  # as they are gathered
            for part in {self.table[i].part for i in bucket.parameters}:
                self._buckets_of.setdefault(part, []).append(bucket)
        self._untaken = iter(range(len(self.table)))
        # One bucket's reduction at a time where its buffer is given up after it, and on a CPU, where what arrives needs
        # room: with all buckets under way that would be a second buffer of gradients.
        self._one_by_one = self.sums_are_new or ctx.device.type == "cpu"
        self._arriving: Tensor | None = None
        self._reducing: Bucket | None = None
        self.version = 0
        self.first = self.last = False
        self.watch: GradientWatch | None = None
        self.begun = torch.tensor(False)
        self._counted = self.counted()
        self._shared = {over: list(self._slices_summed_over(over)) for over in ("tp", "kv", "stages")}

    @property
    def sum_dtype(self) -> torch.dtype:
        """Of the sums of gradients."""
        return self.grads.dtype

    @property
    def waiting_bytes(self) -> int:
        """Of partial sums beside ``grads`` (``tree_store.py``): there are none."""
        return 0

    # ---- for the layers --------------------------------------------------------------------------------------------

    def weight(self, *shape: int) -> tuple[nn.Parameter, StoredGradient]:
        """The next weight of the table, zero at first, and its gradient."""
        index = next(self._untaken, None)
        assert index is not None, f"the model has more weights than the {len(self.table)} of the parameter table"
        row = self.table[index]
        assert shape == tuple(row.shape), f"{row.name} is {shape} in the model, {tuple(row.shape)} in the table"
        return self.weights[index], self.gradients[index]

    def acquire(self, part: str, then: Sequence[str] = ()) -> None:
        """Have the weights of a part of the model; start to gather those of the parts that come next."""
        for bucket in self._buckets_of[part]:
            if not self.weights_stay:
                self._start_gather(bucket)
            if bucket.gathering is not None:
                _wait_for(bucket)
        if self.overlap_gather and not self.weights_stay:
            for following in then:
                for bucket in self._buckets_of[following]:
                    self._start_gather(bucket)

    def release(self, part: str, last: bool = True) -> None:
        """Say that a part has computed; last: its weights are not needed again before they are acquired again."""
        if not self.weights_stay and (last or self.reshard):
            for bucket in self._buckets_of[part]:
                self._close(bucket)

    def open_sums(self, part: str) -> None:
        """Make room for the gradients of a part whose backward writes them by itself, without ``add``."""
        for bucket in self._buckets_of[part]:
            self.open_sum(bucket)

    @contextmanager
    def writing(self, part: str) -> Iterator[None]:
        """Have the weights of a part, and keep what is written to them."""
        self.acquire(part)
        yield
        if not self.weights_stay:
            for bucket in self._buckets_of[part]:
                self.weight_buffers.shard(bucket).copy_(self.weight_buffers.own[bucket])
        self.release(part)

    def check(self, model: nn.Module) -> None:
        """That a model has taken its weights from here, each under its name in the table."""
        found = {name: id(weight) for name, weight in model.named_parameters()}
        expected = {row.name: id(weight) for row, weight in zip(self.table, self.weights, strict=True)}
        assert found == expected, "the parameter table and the model must name the same tensors"

    # ---- a step ----------------------------------------------------------------------------------------------------

    def order(self, count: int) -> list[int]:
        """In which order this rank's micro-batches are to be computed."""
        return list(range(count))

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """The sum over the global batch of a scalar that each micro-batch of this rank has. Communicates over dp."""
        total = torch.zeros((), device=self.ctx.device)
        for value in values:
            total += value
        all_reduce(total, self.ctx.dp)
        return total

    def begin(self, first: bool, last: bool, watch: GradientWatch | None = None) -> None:
        """Say which micro-batch of the step comes; after the last one's backward the reduction is under way.

        Args:
            watch: is shown this micro-batch's gradients.
        """
        self.first, self.last, self.watch = first, last, watch
        self.begun = torch.tensor(not (first or self.sums_are_new))
        for gradient in self.gradients:
            gradient.written = False
        for bucket in self.buckets:
            bucket.missing.update(bucket.parameters)

    def open_sum(self, bucket: Bucket) -> None:
        """Make room for the gradients of a bucket, whose last ones may still be on their way to the shards."""
        if bucket is self._reducing:
            self._finish(bucket)
        self.sum_buffers.open(bucket)

    def complete(self, bucket: Bucket) -> None:
        """A bucket has all gradients of this micro-batch."""
        if self.watch is not None:
            self.watch.gradients(self, bucket)
        if self.watch is not None and self.watch.alone:
            self.sum_buffers.close(bucket)
        elif self.last or self.sums_are_new:
            self.start_reduction(bucket)
            if not self.overlap_reduce:
                bucket.handle.wait()

    def start_reduction(self, bucket: Bucket) -> None:
        """Sum a bucket's gradients over the ranks that share it, into each rank's shard. Communicates over dp."""
        if self._reducing is not None:
            self._finish(self._reducing)  # its buffer goes before the next one comes: two at a time, this one included
        bucket.first, bucket.reduced = self.first, self.last
        if self.group.size == 1:
            return  # what one rank has summed is the whole
        buffers = self.sum_buffers
        bucket.handle = reduce_scatter_into(
            buffers.own[bucket], buffers.full[bucket], self.group, self._room_for_arrivals()
        )
        if self._one_by_one:
            self._reducing = bucket

    def reduce(self) -> None:
        """Wait for the buckets, then sum what copies of shards, tensor-parallel ranks and end stages have in common."""
        for bucket in self.buckets:
            assert bucket.reduced, f"no gradient for {[self.table[i].name for i in bucket.parameters]}"
            self._finish(bucket)
            bucket.reduced = False
        if self.ctx.copies.size > 1:
            shards = [self.sum_buffers.shard(bucket) for bucket in self.buckets]
            for handle in [all_reduce(shard, self.ctx.copies, async_op=True) for shard in shards]:
                handle.wait()
        for over, group in (("tp", self.ctx.tp), ("kv", self.ctx.kv), ("stages", self.ctx.ends)):
            sum_in_one_message(self._shared[over], group)

    def gather(self) -> None:
        """Say that the shards of the weights have changed. Communicates over dp where weights stay."""
        self.wait()
        self.version += 1
        if not self.weights_stay:
            for bucket in self.buckets:
                self._close(bucket)  # a forward without a backward may have left old weights there
            return
        for bucket in reversed(self.buckets):  # the order of forward
            buffers = self.weight_buffers
            bucket.gathering = all_gather_into(buffers.full[bucket], buffers.shard(bucket), self.group)
        if not self.overlap_gather:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is on its way to the weights: before anybody but the model reads or writes them."""
        for bucket in self.buckets:
            _wait_for(bucket)

    # ---- for the optimizer -----------------------------------------------------------------------------------------

    def stretches(self) -> list[Stretch]:
        """This rank's shards, neighbours that are updated in the same way together."""
        groups: list[list[ParameterShard]] = []
        for part in self.layout.parts():
            last = groups[-1][-1] if groups else None
            if last and _way(last) == _way(part) and self._are_neighbours(last, part):
                groups[-1].append(part)
            else:
                groups.append([part])
        stretches = []
        for parts in groups:
            param, grad = (
                buffers.kept[self._place(buffers, parts[0]).start : self._place(buffers, parts[-1]).stop]
                for buffers in (self.weight_buffers, self.sum_buffers)
            )
            stretches.append(Stretch(tuple(parts), parts[0].parameter.decay, param, grad))
        return stretches

    def counted(self) -> list[Tensor]:
        """The gradients that this rank counts in the norm of the whole model, flat: each logical element once.

        Copies of what other ranks hold are left out; neighbours are joined to keep the list short.
        """
        if self.ctx.copies.rank > 0:
            return []
        ranges: list[list[int]] = []
        for s, part, start, stop in self.layout.slices():
            place = self.sum_buffers.place(part.bucket, start, stop)
            if s.owned and ranges and ranges[-1][1] == place.start:
                ranges[-1][1] = place.stop
            elif s.owned:
                ranges.append([place.start, place.stop])
        return [self.grads[start:stop] for start, stop in ranges]

    def square_sum(self, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        """The sum of the squares of the whole model's gradient, each logical element once. Communicates over the world.

        Args:
            add: (part, out) adds the squares of a flat part to a scalar.
        """
        squares = self.local_square_sum(add)
        all_reduce(squares, self.ctx.world)
        return squares

    def local_square_sum(self, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        """What this rank counts of it."""
        squares = torch.zeros((), dtype=self.sum_dtype, device=self.ctx.device)
        for part in self._counted:
            add(part, squares)
        return squares

    def _slices_summed_over(self, group: str) -> Iterator[Tensor]:
        for s, part, start, stop in self.layout.slices():
            if s.sum_over == group:
                yield self.grads[self.sum_buffers.place(part.bucket, start, stop)]

    def _are_neighbours(self, one: ParameterShard, other: ParameterShard) -> bool:
        return all(
            self._place(buffers, one).stop == self._place(buffers, other).start
            for buffers in (self.weight_buffers, self.sum_buffers)
        )

    @staticmethod
    def _place(buffers: Buffers, part: ParameterShard) -> slice:
        return buffers.place(part.bucket, *part.range)

    # ---- buckets ---------------------------------------------------------------------------------------------------

    def _start_gather(self, bucket: Bucket) -> None:
        """Gather a bucket of weights of which only the shard is there."""
        buffers = self.weight_buffers
        if not buffers.is_open(bucket):
            buffers.open(bucket)
            bucket.gathering = all_gather_into(buffers.full[bucket], buffers.shard(bucket), self.group)

    def _room_for_arrivals(self) -> Tensor | None:
        """On a CPU: memory for the other ranks' sums of the largest shard. It stays, so that no heap has to fit it."""
        if self._arriving is None and self.ctx.device.type == "cpu":
            self._arriving = torch.empty(self.layout.arriving, dtype=self.sum_dtype)
        return self._arriving

    def _close(self, bucket: Bucket) -> None:
        _wait_for(bucket)  # nothing may arrive where no room is
        self.weight_buffers.close(bucket)

    def _finish(self, bucket: Bucket) -> None:
        """Wait for a reduction; where only shards are kept, add it to this rank's."""
        if bucket.handle is None:
            return
        bucket.handle.wait()
        bucket.handle = None
        if self.sums_are_new:
            buffers = self.sum_buffers
            shard, arrived = buffers.shard(bucket), buffers.own[bucket]
            shard.copy_(arrived) if bucket.first else shard.add_(arrived)
            buffers.close(bucket)
        if bucket is self._reducing:
            self._reducing = None


def _way(part: ParameterShard) -> tuple[bool, bool]:
    """What the update of a parameter may depend on."""
    return part.parameter.decay, part.parameter.is_hidden_matrix


def _wait_for(bucket: Bucket) -> None:
    """Wait for the gather of a bucket's weights, if one is under way."""
    if bucket.gathering is not None:
        bucket.gathering.wait()
        bucket.gathering = None


def _sum(message: Tensor, group: Group) -> Tensor:
    all_reduce(message, group)
    return message


def sum_in_one_message(views: list[Tensor], group: Group, summed: Callable[[Tensor, Group], Tensor] = _sum) -> None:
    """Sum views in place over a group, all of them at once; one alone, such as a tied embedding's, without a copy.

    Args:
        summed: the sum of a flat tensor over the group; it may use the tensor's memory.
    """
    if not views or group.size == 1:
        return
    message = views[0] if len(views) == 1 else torch.cat(views)
    total = summed(message, group)
    if total is views[0]:
        return
    for view, part in zip(views, total.split([v.numel() for v in views]), strict=True):
        view.copy_(part)
