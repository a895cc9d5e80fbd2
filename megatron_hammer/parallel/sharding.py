"""Maps a rank's shard of the optimizer state, a range of a flat buffer, to rectangles of logical tensors.

The distributed optimizer cuts flat buffers with no regard for rows, so a rank's share ``[start, stop)`` of a local
parameter cuts a slice of a logical tensor into at most three rectangles, each contiguous in the share::

                     columns of the slice
    row r              . . . [start # # #     partial first row
    rows r+1 .. s-1    # # # # # # # # # #    whole rows
    row s              # # # stop) . . . .    partial last row

Pure arithmetic: nothing here communicates, copies or knows a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_hammer.parallel.placement import Range


class SliceLike(Protocol):
    """What the geometry needs of ``model.parameters.Slice``."""

    @property
    def tensor(self) -> str: ...
    @property
    def rows(self) -> Range: ...
    @property
    def cols(self) -> Range | None: ...
    @property
    def local_row(self) -> int: ...
    @property
    def owned(self) -> bool: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def num_cols(self) -> int: ...


class ParameterLike(Protocol):
    """What the geometry needs of ``model.parameters.Parameter``."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def slices(self) -> Sequence[SliceLike]: ...
    @property
    def numel(self) -> int: ...


@dataclass
class Shard:
    """One rank's share of one local parameter: weight (fp32 master), exp_avg and exp_avg_sq."""

    parameter: ParameterLike
    start: int
    stop: int
    """Range in the flattened local parameter."""
    tensors: dict[str, Tensor]
    """Kind -> flat [stop - start] view into the optimizer, so that loading writes in place."""
    is_copy: bool = False
    """Another rank has the same share, and saves it."""


@dataclass(frozen=True)
class Rectangle:
    """Rows and columns of a logical tensor, and where they lie in a flat share."""

    rows: Range
    cols: Range | None
    """None for a vector."""
    position: int
    """Of the first element, counted from the start of the share; the rest follows row by row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns; rows alone for a vector."""
        rows = self.rows[1] - self.rows[0]
        return (rows,) if self.cols is None else (rows, self.cols[1] - self.cols[0])

    @property
    def numel(self) -> int:
        """Number of elements."""
        rows, *cols = self.shape
        return rows * (cols[0] if cols else 1)


def rectangles(piece: SliceLike, start: int, stop: int) -> Iterator[Rectangle]:
    """The up to three rectangles of ``piece`` that lie in [start, stop) of its flattened local parameter."""
    width = piece.num_cols  # a slice spans the columns of its local tensor in full
    origin = piece.local_row * width
    first, last = max(start, origin) - origin, min(stop, origin + piece.num_rows * width) - origin
    if first >= last:
        return
    shift = origin - start  # from the slice's flat index to the share's
    top = piece.rows[0]
    if piece.cols is None:
        yield Rectangle((top + first, top + last), None, first + shift)
        return
    left, right = piece.cols
    row, column = divmod(first, width)
    end_row, end_column = divmod(last, width)
    if column and row < end_row:  # partial first row, up to its end
        yield Rectangle((top + row, top + row + 1), (left + column, right), first + shift)
        row, column = row + 1, 0
    if row < end_row:
        yield Rectangle((top + row, top + end_row), (left, right), row * width + shift)
        row = end_row
    if column < end_column:  # partial last row; the only one when the share lies within a row
        yield Rectangle((top + row, top + row + 1), (left + column, left + end_column), row * width + column + shift)


def intersect(a: Range, b: Range) -> Range | None:
    """What two ranges have in common, or None."""
    start, stop = max(a[0], b[0]), min(a[1], b[1])
    return (start, stop) if start < stop else None
