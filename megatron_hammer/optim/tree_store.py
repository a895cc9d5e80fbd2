"""A store whose sums have the same bits for any number of data-parallel ranks (``train.deterministic_reduction=tree``).

Gradients are added by the tree of ``parallel/sum_tree.py``. Each micro-batch writes its gradients over those of the one
before, which by then are added to a partial sum that waits, or wait themselves::

    accumulated 4, turns 0 2 1 3     grads       0      2         1           3
                                     waiting     0      0+2       0+2, 1      (1+3) + (0+2), bucket by bucket

A bucket goes to the ranks that share it in an all-to-all, as many bytes as a reduce-scatter, and each rank adds the
pieces of its shard in the order of the tree. Memory beside that of ``FlatStore``: a buffer of gradients for each
partial sum that waits, log2 of the micro-batches that a rank accumulates, and the pieces of the buckets on their way.

The norm is made of blocks of 4,096 elements of a parameter, each squared and added in a tree of its own. Parameters
start at blocks and shards are of whole blocks, so a block lies on one rank; their sums are brought together and
added in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from megatron_hammer.kernels.ranges import RangeOf, no_range
from megatron_hammer.optim.buckets import Bucket, Row
from megatron_hammer.optim.store import FlatStore, GradientWatch, sum_in_one_message
from megatron_hammer.parallel.collectives import all_reduce, start_exchange
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.sum_tree import fold, sum_over_copies, tree_sum, turns

BLOCKS_AT_ONCE = 1024  # of the norm: 16 MiB in fp32


class TreeStore(FlatStore):
    """``FlatStore`` with sums in a fixed order.

    Args:
        accumulated: micro-batches that this rank computes in a step, in the order of ``turns``.
    """

    block = 4096
    """Elements; a part of the order in which the norm is added, so never change it."""

    def __init__(
        self,
        table: Sequence[Row],
        dtype: torch.dtype,
        ctx: ParallelContext,
        bucket_bytes: int,
        accumulated: int,
        range_of: RangeOf = no_range,
        overlap_gather: bool = True,
        overlap_reduce: bool = True,
    ) -> None:
        super().__init__(table, dtype, ctx, bucket_bytes, range_of, overlap_gather, overlap_reduce=overlap_reduce)
        self.additions = [turn.additions for turn in turns(accumulated)]
        self.turn = 0
        self.waiting: list[Tensor] = []
        """Sums of nodes, the last one to be added to next."""
        self._free: list[Tensor] = []
        self._pieces: dict[int, Tensor] = {}
        """Of each bucket on its way, by its start: [dp, shard], what each rank has for this one's shard."""
        self._first_block: dict[str, int] = {}
        self._blocks = 0
        for row in self.table:
            self._first_block[row.name] = self._blocks
            self._blocks += -(-row.numel // self.block)

    @property
    def waiting_bytes(self) -> int:
        """Of the buffers of partial sums: as many as have been needed so far."""
        return sum(buffer.nbytes for buffer in (*self.waiting, *self._free))

    # ---- a step ----------------------------------------------------------------------------------------------------

    def order(self, count: int) -> list[int]:
        return [turn.leaf for turn in turns(count)]

    def total(self, values: Sequence[Tensor]) -> Tensor:
        return tree_sum(values, self.ctx.dp)

    def begin(self, first: bool, last: bool, watch: GradientWatch | None = None) -> None:
        if watch is not None and watch.alone:
            return super().begin(True, last, watch)  # no leaf of the tree
        if first:
            self.turn, self.waiting = 0, []
        else:
            self._put_aside()
            self.turn += 1
        assert last == (self.turn == len(self.additions) - 1), "as many micro-batches a step as the store was made for"
        super().begin(True, last, watch)  # each writes over what was there

    def _put_aside(self) -> None:
        """Add the gradients of the micro-batch that is over to what waits, or let them wait."""
        additions = self.additions[self.turn]
        if additions:
            self.waiting[-1] += self.grads
            for _ in range(additions - 1):
                done = self.waiting.pop()
                self.waiting[-1] += done
                self._free.append(done)
        else:
            buffer = self._free.pop() if self._free else torch.empty_like(self.grads)
            self.waiting.append(buffer.copy_(self.grads))

    def start_reduction(self, bucket: Bucket) -> None:
        """Finish the rank's own subtree in this bucket and send each rank what it adds up. Communicates over dp."""
        full = self.grads[bucket.start : bucket.stop]
        for node in reversed(self.waiting):
            full += node[bucket.start : bucket.stop]
        pieces = torch.empty_like(full) if self.ctx.dp.size > 1 else full
        self._pieces[bucket.start] = pieces.view(self.ctx.dp.size, -1)
        bucket.handle = start_exchange(pieces, full, self.ctx.dp)

    def reduce(self) -> None:
        """Wait for the buckets and add the ranks' subtrees, then what tensor-parallel ranks hold in common."""
        for bucket in self.buckets:
            assert bucket.handle is not None, f"no gradient for {[self.table[i].name for i in bucket.parameters]}"
            bucket.handle.wait()
            bucket.handle = None
            pieces = self._pieces.pop(bucket.start)
            if self.ctx.dp.size > 1:
                self.grads[self.layout.shard(bucket)].copy_(fold(pieces))
        self._free += self.waiting
        self.waiting = []
        for over, group in (("tp", self.ctx.tp), ("kv", self.ctx.kv)):
            sum_in_one_message(self._shared[over], group, sum_over_copies)  # its cut into shards does not matter

    # ---- the norm --------------------------------------------------------------------------------------------------

    def square_sum(self, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        """The sum of the squares of the whole model's gradient. Communicates over dp and tp."""
        sums = self.grads.new_zeros(self._blocks)
        for block, squares in self._squares():
            rows = squares.view(-1, self.block)
            while rows.shape[1] > 1:
                half = rows.shape[1] // 2
                rows = rows[:, :half] + rows[:, half:]
            sums[block : block + len(rows)] += rows[:, 0]
        all_reduce(sums, self.ctx.dp)  # a block has been counted on one rank: nothing is rounded
        return sum_over_copies(fold(sums), self.ctx.tp)

    def _squares(self) -> Iterator[tuple[int, Tensor]]:
        """Squares of what this rank counts, in whole blocks with zeros around it, and the number of the first block."""
        for s, part, first, last in self.layout.slices():
            start, stop = first - part.offset, last - part.offset  # in the parameter
            at = start // self.block * self.block
            while s.owned and at < stop:
                end = min(at + BLOCKS_AT_ONCE * self.block, -(-stop // self.block) * self.block)
                squares = self.grads[part.offset + at : part.offset + end].square()
                squares[: max(0, start - at)] = 0
                squares[max(0, stop - at) :] = 0
                yield self._first_block[part.parameter.name] + at // self.block, squares
                at = end
