"""Tables as text: columns as wide as their widest cell on a terminal, where a Chinese character takes two columns, of
given widths with cells that wrap, or Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from textwrap import wrap

from megatron_hammer.base.terminal import width_of


def align(rows: Sequence[Sequence[str]], indent: str = "") -> list[str]:
    """One line a row, the header being one: columns two spaces apart, the first to the left, others to the right."""
    widths = [max(map(width_of, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        blanks = [" " * (width - width_of(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [row[0] + blanks[0], *(blank + cell for cell, blank in zip(row[1:], blanks[1:], strict=True))]
        lines.append(indent + "  ".join(cells).rstrip())
    return lines


def align_wrapped(row: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    """The lines of one row whose cells wrap within columns of these widths, all to the left."""
    cells = (wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True))
    for parts in zip_longest(*cells, fillvalue=""):
        yield " " + "".join(f" {part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; what a cell holds cannot end it."""
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in (head, ["---"] * len(head), *rows))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
