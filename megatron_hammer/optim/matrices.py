"""For Muon: which rank updates which whole matrix, and the messages that bring it the matrix's pieces from the shards.

Shards are cut with no regard for rows, and tensor parallelism cuts rows and columns; an update that needs a whole
matrix (``muon.py``) must not depend on either. So each matrix of the layers has one owner among the ranks that hold its
pieces (``ctx.whole``). It is sent all of them, computes, and sends to each rank the piece that this updates::

    pieces of rank 0   q [0:3, :], q [3, :5] ----.                          .---> rank 0
    pieces of rank 1   q [3, 5:], q [4:8, :] -----+--> owner: q, whole --> q'-+--> rank 1
    (copies, beyond the number of query groups, are not sent, and get theirs)

A matrix is a logical tensor, so q, k, v, gate and up are one each, however they lie in memory; or q, k and v are cut
into their heads. Owners have equal costs as nearly as whole matrices allow: the most costly matrix is given away first,
each to the owner that has least so far. All ranks work this out for themselves, from the tables of all tensor-parallel
ranks. Pure arithmetic.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from megatron_hammer.optim.buckets import BufferLayout, Row
from megatron_hammer.parallel.placement import Range
from megatron_hammer.parallel.sharding import Rectangle, intersect, rectangles

ELEMENTS_OF_A_ROUND = 2**25
"""Of the matrices of one owner, or one matrix: 64 MiB in bf16. Of messages up to five are there at once, of the
products' operands two, and the squares; and while directions are made, two of it in the type of the sums."""

Tables = Sequence[Sequence[Sequence[Row]]]
"""Of each stage of this rank, the parameter table of each tensor-parallel rank."""


@dataclass(frozen=True)
class Matrix:
    """What is orthogonalised as one: rows of a logical tensor, in their full width."""

    tensor: str
    rows: Range
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows[1] - self.rows[0], self.cols


@dataclass(frozen=True)
class MatrixPiece:
    """What the shards of one rank have of one matrix, contiguous in them."""

    matrix: Matrix
    row: Row
    """The parameter that it is a part of, on that rank."""
    start: int
    stop: int
    """Range in the flattened parameter."""
    boxes: tuple[Rectangle, ...]
    """Its rectangles of the matrix, with their positions in the piece."""
    owned: bool
    """False where a lower tensor-parallel rank holds the same."""

    @property
    def numel(self) -> int:
        """Elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class Exchange:
    """The matrices of the ranks that have everything between them, as one of these sees it."""

    matrices: tuple[Matrix, ...]
    owner: dict[Matrix, int]
    """Rank in the group."""
    mine: tuple[Matrix, ...]
    """Those that this rank owns."""
    sent: tuple[tuple[MatrixPiece, ...], ...]
    """For each rank, this rank's pieces of the matrices that it owns, copies included; each in the order of shards."""
    received: tuple[tuple[MatrixPiece, ...], ...]
    """For each rank, its pieces of the matrices that this rank owns."""

    def sizes(self, pieces: Sequence[Sequence[MatrixPiece]], copies: bool) -> list[int]:
        """Elements of the message to or from each rank: copies of pieces are not sent, and get the result."""
        return [sum(piece.numel for piece in of_rank if piece.owned or copies) for of_rank in pieces]

    def rounds(self, most: int) -> tuple[Exchange, ...]:
        """The same in turns, equally many on all ranks, of at most ``most`` elements of whole matrices for an owner, or
        one matrix; equal shapes follow each other."""
        held: dict[int, tuple[int, int]] = {}  # of each owner: the turn that it is at, and elements in that so far
        turn: dict[Matrix, int] = {}
        for matrix in sorted(self.matrices, key=lambda matrix: sorted(matrix.shape)):
            rows, cols = matrix.shape
            at, full = held.get(self.owner[matrix], (0, 0))
            at, full = (at + 1, 0) if full > 0 and full + rows * cols > most else (at, full)
            turn[matrix], held[self.owner[matrix]] = at, (at, full + rows * cols)
        return tuple(
            self._only({m for m, at in turn.items() if at == k}) for k in range(max(turn.values(), default=0) + 1)
        )

    def _only(self, chosen: Set[Matrix]) -> Exchange:
        """Without the other matrices."""
        sent, received = (
            tuple(tuple(piece for piece in of_rank if piece.matrix in chosen) for of_rank in side)
            for side in (self.sent, self.received)
        )
        matrices, mine = (tuple(m for m in found if m in chosen) for found in (self.matrices, self.mine))
        return Exchange(matrices, {m: self.owner[m] for m in matrices}, mine, sent, received)


def plan_exchange(
    layouts: Sequence[BufferLayout], tables: Tables, rank: int, cost: Callable[[int, int], int], per_head: bool
) -> Exchange:
    """Owners of all matrices, and the messages of ``rank``, counted among the ranks that have everything between them.

    Args:
        layouts: of the stages of this rank; where weights lie is the same on all tensor-parallel ranks.
        cost: of a matrix of so many rows and columns.
    """
    of_tensor = {name: found for of_stage in tables for name, found in _matrices(of_stage, per_head).items()}
    matrices = [matrix for found in of_tensor.values() for matrix in found]
    ranks = layouts[0].ranks * len(tables[0])
    owner = _share(matrices, ranks, cost)
    sent: list[list[MatrixPiece]] = [[] for _ in range(ranks)]
    received: list[list[MatrixPiece]] = [[] for _ in range(ranks)]
    for holder, piece in _pieces(layouts, tables, of_tensor):
        target = owner[piece.matrix]
        if holder == rank:
            sent[target].append(piece)
        if target == rank:
            received[holder].append(piece)
    mine = tuple(matrix for matrix in matrices if owner[matrix] == rank)
    return Exchange(tuple(matrices), owner, mine, tuple(map(tuple, sent)), tuple(map(tuple, received)))


def _matrices(tables: Sequence[Sequence[Row]], per_head: bool) -> dict[str, list[Matrix]]:
    """Those of a stage by logical tensor, in the order of the model; those of a tensor are equally high."""
    rows: dict[str, int] = {}
    cols: dict[str, int] = {}
    heights: dict[str, int | None] = {}
    for row in (row for table in tables for row in table if row.is_hidden_matrix):
        for s in row.slices:
            assert s.cols is not None, f"{s.tensor} is a vector"
            rows[s.tensor] = max(rows.get(s.tensor, 0), s.rows[1])
            cols[s.tensor] = max(cols.get(s.tensor, 0), s.cols[1])
            heights[s.tensor] = row.head_rows if per_head else None
    found = {}
    for tensor, count in rows.items():
        height = heights[tensor] or count
        found[tensor] = [Matrix(tensor, (top, top + height), cols[tensor]) for top in range(0, count, height)]
    return found


def _share(matrices: Sequence[Matrix], ranks: int, cost: Callable[[int, int], int]) -> dict[Matrix, int]:
    """An owner for each."""
    loads, owner = [(0, rank) for rank in range(ranks)], {}
    for matrix in sorted(matrices, key=lambda m: -cost(*m.shape)):  # stable: the same on all ranks
        load, rank = heapq.heappop(loads)
        owner[matrix] = rank
        heapq.heappush(loads, (load + cost(*matrix.shape), rank))
    return owner


def _pieces(
    layouts: Sequence[BufferLayout], tables: Tables, of_tensor: Mapping[str, Sequence[Matrix]]
) -> Iterator[tuple[int, MatrixPiece]]:
    """The pieces of all ranks, each rank's in the order of its shards, and whose they are."""
    for layout, of_stage in zip(layouts, tables, strict=True):
        for bucket in layout.buckets:
            for i in (i for i in bucket.parameters if layout.table[i].is_hidden_matrix):
                for shard, start, stop in layout.holders(bucket, i):
                    for tp_rank, table in enumerate(of_stage):
                        for piece in _pieces_of(table[i], start, stop, of_tensor):
                            yield shard * len(of_stage) + tp_rank, piece


def _pieces_of(row: Row, start: int, stop: int, of_tensor: Mapping[str, Sequence[Matrix]]) -> Iterator[MatrixPiece]:
    """What [start, stop) of a flattened parameter has of each matrix."""
    for s in row.slices:
        for matrix in of_tensor[s.tensor]:
            if (rows := intersect(s.rows, matrix.rows)) is None:
                continue
            lies = [(s.local_row + end - s.rows[0]) * s.num_cols for end in rows]  # in the flattened parameter
            first, last = max(start, lies[0]), min(stop, lies[1])
            if first < last:
                top, found = matrix.rows[0], rectangles(s, first, last)
                boxes = tuple(replace(box, rows=(box.rows[0] - top, box.rows[1] - top)) for box in found)
                yield MatrixPiece(matrix, row, first, last, boxes, s.owned)
