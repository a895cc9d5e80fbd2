"""The profile of a step as a picture: the whole step beside its limit, each part beside its own, memory by kind.

Drawn from the dictionary that ``profile.json`` holds, so that a picture can be made again from the file alone.
Needs no torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.pictures import save_png
from megatron_hammer.costs import budget

# Families of parts by colour: products blue, attention purple, elementwise orange, vocabulary red, update green, the
# rest brown and grey. Neighbours differ in lightness, for readers who see few colours and for print.
COLOURS = {
    budget.LAYER_PRODUCTS: "#1f4e8c",
    budget.HEAD_PRODUCTS: "#5b93d3",
    budget.ATTENTION: "#7b5aa6",
    budget.NORM: "#d9730d",
    budget.ROPE: "#f2a65a",
    budget.SWIGLU: "#b8560f",
    budget.ELEMENTWISE: "#d9730d",
    budget.EMBEDDING: "#e79aa0",
    budget.LOSS: "#b5323f",
    budget.CASTS: "#8fb8a8",
    budget.GRADIENTS: "#9bc26b",
    budget.OPTIMIZER: "#3f7d3a",
    budget.COMMUNICATION: "#7a5230",
    budget.DATA: "#c2a27a",
    budget.OTHER: "#8c8c8c",
    budget.GAPS: "#cfcfcf",
}
MEMORY_COLOURS = ("#1f4e8c", "#9bc26b", "#3f7d3a", "#d9730d", "#f2a65a", "#8c8c8c", "#cfcfcf")
LABELLED_SHARE = 0.06  # of the width: a segment below it has no room for its name
WIDTH_INCHES, ROW_INCHES, BETWEEN_INCHES, ABOVE_INCHES, BELOW_INCHES = 10.5, 0.27, 0.5, 0.15, 0.35
SUBTITLE_CHARACTERS = 155  # of its size in the figure's width
COLUMNS = ((1.10, "ms"), (1.22, "share"), (1.38, "limit, ms"), (1.52, "of limit"))
"""Of the table beside the bars: right edge of each column in widths of the axes, and its heading."""


def draw_profile(profile: Mapping[str, Any], output: Path) -> None:
    """Draw a profile into ``output`` (PNG), which appears complete or not at all."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    rows, kinds = profile["parts"], profile["memory"]["kinds"]
    subtitle = [row for line in profile["subtitle"] for row in textwrap.wrap(line, SUBTITLE_CHARACTERS)]
    heights = [
        0.32 + 0.155 * len(subtitle),
        1.05 if profile["limit_ms"] is not None else 0.55,
        ROW_INCHES * (len(rows) + 1),
        ROW_INCHES * (len(kinds) + 1),
    ]  # inches, from above
    height = ABOVE_INCHES + sum(heights) + 3 * BETWEEN_INCHES + BELOW_INCHES
    figure = Figure(figsize=(WIDTH_INCHES, height), dpi=120)
    panels, top = [], height - ABOVE_INCHES
    for size in heights:
        panels.append(figure.add_axes((0.185, (top - size) / height, 0.475, size / height)))
        top -= size + BETWEEN_INCHES
    _draw_heading(panels[0], profile["title"], subtitle)
    _draw_step(panels[1], profile)
    _draw_parts(panels[2], rows)
    _draw_memory(panels[3], profile["memory"])
    save_png(figure, output)


def _draw_heading(axes: Any, title: str, subtitle: Sequence[str]) -> None:
    axes.set_axis_off()
    left, place = -0.36, {"transform": axes.transAxes, "va": "top"}  # of the axes: the figure's edge
    axes.text(left, 1.0, title, fontsize=13, weight="bold", **place)
    axes.text(left, 0.6, "\n".join(subtitle), fontsize=9, color="0.25", linespacing=1.25, **place)


def _draw_step(axes: Any, profile: Mapping[str, Any]) -> None:
    """Two stacked bars on one scale: the step as measured, and the sum of the parts' limits."""
    bars = ("ms",) if profile["limit_ms"] is None else ("ms", "limit_ms")
    width = max(profile["step_ms"], profile["limit_ms"] or 0.0)
    for y, key in enumerate(bars):
        left = 0.0
        for part in profile["parts"]:
            name, size = part["name"], part[key] or 0.0
            axes.barh(y, size, left=left, color=COLOURS[name], edgecolor="white", linewidth=0.6, height=0.72)
            if size >= LABELLED_SHARE * width:
                _label(axes, left + size / 2, y, name, size / width)
            left += size
        axes.text(left + width * 0.012, y, f"{left:,.{digits(left)}f} ms", va="center", fontsize=9)
    axes.set_yticks([0, 1][: len(bars)], ["measured", "at the limit"][: len(bars)], fontsize=9.5)
    axes.set_xlim(0, width)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _label(axes: Any, x: float, y: float, name: str, share: float) -> None:
    """A part's name inside its segment, over two lines where it is narrow, left out where it has no room at all."""
    room = int(share * 75)  # characters of this size in the axes' width, by eye
    words = name.replace(", ", ",\n") if len(name) > room else name
    if _width(words) > room:
        words = words.replace(" ", "\n")
    if _width(words) <= room:
        dark = sum(int(COLOURS[name][i : i + 2], 16) for i in (1, 3, 5)) < 3 * 150
        colour = "white" if dark else "black"
        axes.text(x, y, words, ha="center", va="center", fontsize=8, color=colour, linespacing=0.95)


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def _draw_parts(axes: Any, parts: Sequence[Mapping[str, Any]]) -> None:
    """One bar a part with its limit as a mark, and the numbers beside it."""
    width = max(max(p["ms"], p["limit_ms"] or 0.0) for p in parts) * 1.02
    decimals, has_limits = digits(width), any(p["limit_ms"] for p in parts)
    columns = COLUMNS if has_limits else COLUMNS[:2]
    for y, part in enumerate(parts):
        axes.barh(y, part["ms"], color=COLOURS[part["name"]], height=0.66)
        limit = part["limit_ms"]
        if limit is not None:
            axes.plot([limit, limit], [y - 0.42, y + 0.42], color="black", linewidth=1.8, solid_capstyle="butt")
            axes.plot([limit, limit], [y - 0.38, y + 0.38], color="white", linewidth=0.6, solid_capstyle="butt")
        cells = (
            f"{part['ms']:,.{decimals}f}",
            f"{part['share']:.1%}",
            "-" if limit is None else f"{limit:,.{decimals}f}",
            "-" if part["of_limit"] is None else f"{part['of_limit']:.0%}",
        )
        for (x, _), cell in zip(columns, cells, strict=False):
            axes.text(x, y, cell, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)
    mark = "; the mark is the part's limit" if has_limits else ""
    _heading(axes, f"time by part, ms a step{mark}", columns)
    _style_rows(axes, [p["name"] for p in parts], width)


def _draw_memory(axes: Any, memory: Mapping[str, Any]) -> None:
    kinds = memory["kinds"]
    width = max([k["mib"] for k in kinds] + [1e-3]) * 1.02
    for y, (kind, colour) in enumerate(zip(kinds, MEMORY_COLOURS, strict=False)):
        axes.barh(y, kind["mib"], color=colour, height=0.66)
        for (x, _), cell in zip(COLUMNS, (f"{kind['mib']:,.{digits(width)}f}", f"{kind['share']:.1%}"), strict=False):
            axes.text(x, y, cell, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)
    _heading(
        axes,
        f"memory at its peak by kind: {memory['peak_mib']:,.0f} MiB ({memory['source']})",
        [(COLUMNS[0][0], "MiB"), COLUMNS[1]],
    )
    _style_rows(axes, [k["name"] for k in kinds], width)


def _heading(axes: Any, text: str, columns: Sequence[tuple[float, str]]) -> None:
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5, "color": "0.35"}
    axes.text(0, -0.95, text, **place)
    for x, heading in columns:
        axes.text(x, -0.95, heading, ha="right", **place)


def _style_rows(axes: Any, names: Sequence[str], width: float) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9.5)
    axes.set_xlim(0, width)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8, colors="0.35", length=2)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("0.8")


def digits(largest: float) -> int:
    """Decimals that leave three or four significant digits of the largest of some numbers."""
    return 0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 1 else 3
