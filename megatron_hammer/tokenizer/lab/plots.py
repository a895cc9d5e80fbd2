"""Pictures of what ``analyze`` and ``price`` measure: characters, compression, vocabularies, the best size.

Each ``draw_`` function returns one PNG. matplotlib without pyplot: no window system, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_hammer.base.pictures import png_of
from megatron_hammer.config import Config
from megatron_hammer.tokenizer.lab.analyze import OVERALL, Coverage, Vocabulary
from megatron_hammer.tokenizer.lab.cost import token_flops
from megatron_hammer.tokenizer.lab.price import Price
from megatron_hammer.tokenizer.scripts import SCRIPTS

COLUMNS = 100  # cells of a row: whole hundreds can be counted at a glance
# One piece is what one looks for: dark green. The more tokens, the redder; told apart by lightness too.
STATES = (("one piece", "#00695C"), ("2 tokens", "#FDD49E"), ("3 tokens", "#FC8D59"), ("4 or more", "#B30000"),
          ("unknown", "#222222"))  # fmt: skip
BACKGROUND = len(STATES)

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SCRIPT_COLOURS = dict(zip(SCRIPTS, ("#D55E00", "#0072B2", "#CC79A7", "#E69F00", "#56B4E9", "#117733", "#999933",
                                    "#AA4499", "#882255", "#009E73", "#F0E442", "#666666", "#CCCCCC", "#333333",
                                    "#000000")))  # fmt: skip


def character_grid(coverage: Coverage) -> np.ndarray:
    """``[rows, COLUMNS] int``: index into STATES of each character, levels one below the other, a blank row between.

    A level begins on a row of its own; BACKGROUND where there is no character.
    """
    counts, is_whole = coverage.tokens
    states = np.where(is_whole, 0, np.where(counts == 0, 4, np.clip(counts - 1, 1, 3)))
    parts = []
    start = 0
    for share in coverage.levels.values():
        level = states[start : start + share.characters]
        start += share.characters
        rows = -(-len(level) // COLUMNS)
        cells = np.full((rows + 1) * COLUMNS, BACKGROUND)
        cells[: len(level)] = level
        parts.append(cells.reshape(rows + 1, COLUMNS))
    return np.concatenate(parts)[:-1]


def draw_coverage(coverages: Mapping[str, Coverage]) -> bytes:
    """The table of characters, one cell a character in the table's order, one panel a tokenizer."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    across = min(3, len(coverages))
    down = -(-len(coverages) // across)
    figure = Figure(figsize=(6.2 * across, 5.1 * down + 0.4), dpi=130, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    colours = ListedColormap([*(colour for _, colour in STATES), "white"])
    for axes, (name, coverage) in zip(panels, coverages.items()):
        grid = character_grid(coverage)
        # A white line round each cell: they can be told apart and counted.
        axes.pcolormesh(grid, cmap=colours, vmin=-0.5, vmax=len(STATES) + 0.5, edgecolors="white", linewidth=0.35)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_xticks([])
        starts, row = [], 0
        for share in coverage.levels.values():
            rows = -(-share.characters // COLUMNS)
            starts.append(row + rows / 2)
            row += rows + 1
        labels = [f"level {level}\n{share.percent:.2f}%" for level, share in coverage.levels.items()]
        axes.set_yticks(starts, labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(name, loc="left", fontsize=11)
    for axes in panels[len(coverages) :]:
        axes.set_visible(False)
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in STATES],
        loc="outside lower center", ncols=len(STATES) if across > 1 else 3, frameon=False,
    )  # fmt: skip
    return png_of(figure)


def draw_compression(described: Mapping[str, dict[str, Any]], reference: str) -> bytes:
    """Bytes per token and compared compression, a group of bars for each domain, a bar for each tokenizer."""
    from matplotlib.figure import Figure

    domains = list(next(iter(described.values()))["domains"])
    width = max(7.0, 1.2 + 0.32 * len(domains) * (len(described) + 1))
    figure = Figure(figsize=(width, 6.5), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    compared = f"tokens / those of {reference}\n(fewer is better)"
    for axes, key, label in (
        (above, "bytes_per_token", "bytes per token\n(more is better)"),
        (below, "compared_compression", compared),
    ):
        _bars(axes, domains, {n: [f["domains"][d][key] for d in domains] for n, f in described.items()})
        axes.set_ylabel(label)
        _tidy(axes)
    figure.legend(*above.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return png_of(figure)


def _bars(axes: Any, groups: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
    width = 0.84 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        at = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        bars = axes.bar(at, heights, width * 0.92, color=COLOURS[i % len(COLOURS)], label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    axes.set_xticks(np.arange(len(groups)), groups)


def draw_vocabulary(vocabularies: Mapping[str, Vocabulary]) -> bytes:
    """Above: number of text pieces by length. Below: shares of the scripts, a bar a tokenizer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2 + 0.42 * len(vocabularies)), dpi=130, layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[3.2, 0.7 + 0.42 * len(vocabularies)])
    longest = max([1, *(n for of in vocabularies.values() for n in of.lengths)])
    last = min(longest, 24)  # what is longer is rare: runs of spaces and user-defined symbols
    for i, (name, of) in enumerate(vocabularies.items()):
        counts = [of.lengths.get(n, 0) for n in range(1, last + 1)]
        above.plot(range(1, last + 1), counts, color=COLOURS[i % len(COLOURS)], marker="o", markersize=3.5,
                   linewidth=1.4, label=f"{name}: mean {of.mean_bytes:.1f}")  # fmt: skip
    above.set_xlabel("bytes of a piece" + (f" (longer ones, up to {longest}, are not drawn)" if longest > last else ""))
    above.set_xticks(range(1, last + 1))
    above.set_ylabel("pieces")
    above.set_ylim(bottom=0)
    above.legend(frameon=False)
    _tidy(above)
    names = list(vocabularies)
    left = np.zeros(len(names))
    totals = np.array([sum(of.scripts.values()) for of in vocabularies.values()])
    for script in SCRIPTS:
        shares = 100 * np.array([of.scripts[script] for of in vocabularies.values()]) / totals
        if shares.any():
            below.barh(names, shares, left=left, height=0.7, color=SCRIPT_COLOURS[script], label=script)
            left += shares
    below.invert_yaxis()
    below.set_xlim(0, 100)
    below.set_xlabel("% of the vocabulary")
    below.spines[["top", "right"]].set_visible(False)
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8)
    return png_of(figure)


def draw_price(prices: Mapping[str, Price], config: Config) -> bytes:
    """Against vocabulary size: tokens a byte, FLOPs a token, bytes a second against the full vocabulary; the best size.

    Dots are measured, the line goes through them, a star is the best size; a square is a tokenizer without a curve.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure = Figure(figsize=(9, 9.5), dpi=130, layout="constrained")
    tokens, flops, speed = panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.6, 3])
    everything = [price.cost.vocab_size for price in prices.values()]
    for i, (name, price) in enumerate(prices.items()):
        colour = COLOURS[i % len(COLOURS)]
        full = price.cost.vocab_size
        if isinstance(price.curve, str) or price.best is None:
            at_full = price.tokens_per_byte[OVERALL], price.cost.flops / 1e9, 100.0
            for axes, y in zip(panels, at_full):
                axes.plot(full, y, "s", color=colour, label=f"{name}: {full:,}")
            continue
        best, sizes = price.best[OVERALL], np.array(price.curve.sizes)
        everything.append(sizes[0])
        line = np.geomspace(sizes[0], sizes[-1], 600)
        label = f"{name}: {full:,}, best {best.size:,} {best.edge}".strip()
        for at, style in (
            (line, {"linewidth": 1.4}),
            (sizes, {"marker": "o", "markersize": 3, "linestyle": ""}),
            (np.array([best.size]), {"marker": "*", "markersize": 13, "markeredgecolor": "white", "label": label}),
        ):
            tokens_there, flops_there = price.curve.at(at), token_flops(config, at)
            tokens.plot(at, tokens_there, color=colour, **style)
            flops.plot(at, flops_there / 1e9, color=colour, **style)
            full_rate = 100 * price.flops_per_byte[OVERALL]
            speed.plot(at, full_rate / (tokens_there * flops_there), color=colour, **style)
        for axes in panels:
            axes.axvline(best.size, color=colour, linewidth=0.8, linestyle=":")
    tokens.set_ylabel("tokens a byte\n(fewer is better)")
    flops.set_ylabel("GFLOP a token")
    flops.set_ylim(bottom=0)
    speed.set_ylabel("bytes a second, % of those\nof the full vocabulary")
    speed.set_xlabel("pieces of the vocabulary")
    speed.set_xscale("log")
    speed.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    speed.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    speed.xaxis.set_minor_formatter(FuncFormatter(lambda size, _: ""))
    speed.set_xlim(min(everything) / 1.1, max(everything) * 1.1)
    for axes in panels:
        _tidy(axes)
    figure.legend(*tokens.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return png_of(figure)


def _tidy(axes: Any) -> None:
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
