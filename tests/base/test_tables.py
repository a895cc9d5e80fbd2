"""Text tables: alignment, and cells that wrap."""

from __future__ import annotations

from megatron_hammer.base.tables import align, align_wrapped


def test_first_column_left_others_right() -> None:
    rows = [["source", "tokens", "share"], ["zh", "1,234", "5 %"], ["中文维基", "7", "1 %"], ["a long name", "7", ""]]
    assert align(rows, indent="> ") == [
        "> source       tokens  share",
        "> zh            1,234    5 %",
        "> 中文维基          7    1 %",
        "> a long name       7",
    ]


def test_cells_wrap_in_their_columns() -> None:
    assert list(align_wrapped(["norm", "two words here", "x"], (5, 9, 3))) == ["  norm  two words x", "        here"]
