"""The rectangles of a flat range against brute force: every element exactly once, where it belongs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hammer.model.parameters import Slice
from megatron_hammer.parallel.sharding import intersect, rectangles


@st.composite
def cases(draw):
    """A local tensor with several slices and gaps between them, and a range of its flat elements."""
    vector = draw(st.booleans())
    width = 1 if vector else draw(st.integers(1, 7))
    slices, row = [], 0
    for i in range(draw(st.integers(1, 3))):
        row += draw(st.integers(0, 2))  # rows of padding
        rows, top = draw(st.integers(1, 6)), draw(st.integers(0, 9))
        cols = None if vector else (left := draw(st.integers(0, 5)), left + width)
        slices.append(Slice(f"t{i}", (top, top + rows), cols, row))
        row += rows
    total = (row + draw(st.integers(0, 2))) * width
    start = draw(st.integers(0, total))
    return slices, width, start, draw(st.integers(start, total))


@settings(max_examples=400, deadline=None)
@given(cases())
def test_rectangles_cover_a_range_exactly(case):
    slices, width, start, stop = case
    for piece in slices:
        left = 0 if piece.cols is None else piece.cols[0]
        expected = {}  # flat position -> (logical row, logical column)
        for flat in range(start, stop):
            row, column = divmod(flat, width)
            if piece.local_row <= row < piece.local_row + piece.num_rows:
                expected[flat - start] = (piece.rows[0] + row - piece.local_row, left + column)
        found = {}
        boxes = list(rectangles(piece, start, stop))
        assert len(boxes) <= (1 if piece.cols is None else 3)
        for box in boxes:
            assert box.numel == np.prod(box.shape) > 0
            cols = box.cols or (left, left + 1)
            elements = [(r, c) for r in range(*box.rows) for c in range(*cols)]
            assert len(elements) == box.numel
            for i, element in enumerate(elements):
                assert box.position + i not in found
                found[box.position + i] = element
        assert found == expected


@given(*[st.tuples(st.integers(0, 9), st.integers(0, 9))] * 2)
def test_intersect_is_set_intersection(a, b):
    common = sorted(set(range(*a)) & set(range(*b)))
    assert intersect(a, b) == ((common[0], common[-1] + 1) if common else None)
