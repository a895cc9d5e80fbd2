"""The grid of ranks: how the processes of a run are numbered along the axes of parallelism.

Every rank has one place on each of four axes, and the ranks are counted with the last axis fastest::

    axis    ranks along it ...                                     and they exchange
    pp      hold different layers (pipeline stages)                the hidden states between two layers
    dp      hold the same weights and see different samples        gradients and weights, once a step
    cp      hold different parts of the same samples' positions    keys and values of attention
    tp      hold different parts of each matrix                    activations, several times a layer

    world 8 = PP 1 x DP 2 x CP 1 x TP 4        tp groups {0 1 2 3} {4 5 6 7}     dp groups {0 4} {1 5} {2 6} {3 7}

                 tp ->
           dp    0   1   2   3
           |     4   5   6   7

Ranks of the axis that communicates most, tp, are neighbours, on the fastest links; those of the one that communicates
least, the pipeline, are farthest apart. An axis of size 1 never communicates.

Further groups are not axes of their own. ``replicas`` are the axes dp and cp together: the ranks that hold the same
weights, over which gradients and the counts of a loss are summed and the optimizer's state is divided. With more
tensor-parallel ranks than query groups, each query group's key and value heads are held by ``kv`` neighbouring
tensor-parallel ranks, which are a group of their own: with TP 4 and 2 query groups, {0 1} {2 3} {4 5} {6 7} above. And
``ends`` are the first and the last rank along pp, which both hold an embedding that is the head too.

Replicas may divide what they hold among some of them only (``parallel.shard_size``): ``shard`` are neighbours among the
replicas, who have one shard each, and ``copies`` are the replicas that have the same shard. ``whole`` are the ranks of
shard and tp together: those that have between them all states of their layers once, so that they can put whole matrices
together.

Pure arithmetic: nothing here communicates; ``context.py`` makes the groups. Needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Axis = Literal["pp", "dp", "cp", "tp", "kv", "replicas", "ends", "shard", "copies", "whole"]
AXES: tuple[Axis, ...] = ("pp", "dp", "cp", "tp")
"""Slowest first: the rank changes by one along the last."""


@dataclass(frozen=True)
class Grid:
    """The size of each axis."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    kv: int = 1
    """Tensor-parallel ranks that hold the same key and value heads; divides tp."""
    copies: int = 1
    """Replicas that hold the same shard of optimizer state, gradients or weights; divides the replicas."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.size(axis) for axis in AXES)

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights."""
        return self.dp * self.cp

    @property
    def shard(self) -> int:
        """Replicas that divide one copy of optimizer state, gradients or weights."""
        return self.replicas // self.copies

    @property
    def whole(self) -> int:
        """Ranks that have all states of their layers between them, once."""
        return self.shard * self.tp

    @property
    def whole_axis(self) -> Axis:
        """The axis that has the same ranks as ``whole`` where there is one: no group of its own is needed then."""
        if self.shard == 1:
            return "tp"
        if self.tp > 1:
            return "whole"
        return "shard" if self.copies > 1 else "replicas"

    def size(self, axis: Axis) -> int:
        """Number of ranks along an axis."""
        return min(2, self.pp) if axis == "ends" else int(getattr(self, axis))

    def groups(self, axis: Axis) -> list[list[int]]:
        """The world cut into groups of ranks that differ in their place on this axis only."""
        if axis == "kv":
            starts = range(0, self.tp, self.kv)
            return [row[start : start + self.kv] for row in self.groups("tp") for start in starts]
        if axis == "ends":
            rows = self.groups("pp")
            return [part for row in rows for part in ([row[0], *row[1:][-1:]], *([rank] for rank in row[1:-1]))]
        if axis == "shard":
            starts = range(0, self.replicas, self.shard)
            return [row[start : start + self.shard] for row in self.groups("replicas") for start in starts]
        if axis == "copies":
            return [row[place :: self.shard] for row in self.groups("replicas") for place in range(self.shard)]
        if axis == "whole":
            return [list(range(start, start + self.whole)) for start in range(0, self.world_size, self.whole)]
        last: Axis = "cp" if axis == "replicas" else axis
        size, stride = self.size(axis), math.prod(self.size(a) for a in AXES[AXES.index(last) + 1 :])
        firsts = [rank for rank in range(self.world_size) if rank // stride % size == 0]
        return [list(range(first, first + size * stride, stride)) for first in firsts]


def build_grid(
    world_size: int,
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    query_groups: int | None = None,
    shard_size: int | None = None,
) -> Grid:
    """The grid of ``world_size`` ranks; what the other axes leave is data-parallel.

    Args:
        tp, cp, pp: sizes of these axes; their product divides the world.
        query_groups: of the model; None: at least as many as ``tp``.
        shard_size: replicas that divide one copy of the states; None: all of them.
    """
    dp, left = divmod(world_size, tp * cp * pp)
    assert left == 0, f"world size {world_size} must be a multiple of TP {tp} x CP {cp} x PP {pp}"
    copies, left = divmod(dp * cp, shard_size or dp * cp)
    assert left == 0, f"shard_size {shard_size} must divide the {dp * cp} replicas"
    return Grid(pp, dp, cp, tp, kv_copies(tp, query_groups or tp), copies)


def kv_copies(tp: int, query_groups: int) -> int:
    """How many tensor-parallel ranks hold the same key and value heads."""
    return max(1, tp // query_groups)
