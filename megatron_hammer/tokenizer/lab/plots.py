"""Pictures of what ``analyze`` and ``price`` measure: characters, compression, vocabularies, the best size.

Each ``draw_`` function returns one PNG, whose texts are in ``language`` where an installed font has it. matplotlib
without pyplot: no window system, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_hammer.base.language import Language, Say
from megatron_hammer.base.pictures import (
    COLOURS,
    MARKERS,
    SMALL_POINTS,
    legend_above,
    new_figure,
    picture_sayer,
    png_of,
    tidy,
)
from megatron_hammer.base.progress import size_of
from megatron_hammer.config import Config
from megatron_hammer.tokenizer.lab.analyze import OVERALL, Coverage, Vocabulary
from megatron_hammer.tokenizer.lab.cost import token_flops
from megatron_hammer.tokenizer.lab.price import Price
from megatron_hammer.tokenizer.scripts import SCRIPTS

COLUMNS = 200  # cells of a row: whole hundreds can be counted at a glance
# One piece is what one looks for: blue, which nobody takes for a red. The more tokens, the redder and darker.
STATES = (
    ("one piece", "一个词", "#0072B2"),
    ("2 tokens", "2 个 token", "#FDD49E"),
    ("3 tokens", "3 个 token", "#FC8D59"),
    ("4 or more", "4 个或更多", "#B30000"),
    ("unknown", "未知", "#222222"),
)
BACKGROUND = len(STATES)
SCRIPTS_IN_CHINESE = dict(zip(SCRIPTS, (
    "汉字", "拉丁", "假名", "谚文", "西里尔", "希腊", "阿拉伯", "其他文字", "多种文字", "数字",
    "符号", "标点", "空白", "字节", "控制",
), strict=True))  # fmt: skip
LEVELS_IN_CHINESE = {1: "一级字", 2: "二级字", 3: "三级字"}
EDGES_IN_CHINESE = {"": "", "or more": "或更大", "or fewer": "或更小"}
MOST_BYTES = 24  # of a piece in a picture: longer ones are rare, runs of spaces and user-defined symbols
MOST_NUMBERS = 24  # above bars: more would overlap


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


def draw_coverage(coverages: Mapping[str, Coverage], language: Language = "en") -> bytes:
    """The table of characters, one cell a character in the table's order, one panel a tokenizer."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    say = picture_sayer(language)
    characters = sum(share.characters for share in next(iter(coverages.values())).levels.values())
    figure = new_figure(
        2.25 * len(coverages) + 1.1,
        say("Standard characters that are one piece", "规范汉字中自成一个词的"),
        say(
            f"Source: the {characters:,} characters of the official table, a cell a character, in the table's order",
            f"来源：《通用规范汉字表》的 {characters:,} 个字，一格一字，按表中顺序",
        ),
    )
    panels = figure.subplots(len(coverages), 1, squeeze=False).flatten()
    colours = ListedColormap([*(colour for *_, colour in STATES), "white"])
    for axes, (name, coverage) in zip(panels, coverages.items()):
        grid = character_grid(coverage)
        # A white line round each cell: they can be told apart and counted.
        axes.pcolormesh(grid, cmap=colours, vmin=-0.5, vmax=len(STATES) + 0.5, edgecolors="white", linewidth=0.3)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_xticks([])
        starts, row = [], 0
        for share in coverage.levels.values():
            rows = -(-share.characters // COLUMNS)
            starts.append(row + rows / 2)
            row += rows + 1
        names = [say(f"level {level}", LEVELS_IN_CHINESE.get(level, f"{level} 级字")) for level in coverage.levels]
        labels = [f"{called}\n{share.percent:.2f}%" for called, share in zip(names, coverage.levels.values())]
        axes.set_yticks(starts, labels)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(name, loc="left", fontsize=11, parse_math=False)
    panels[-1].legend(
        handles=[Patch(color=colour, label=say(*names)) for *names, colour in STATES],
        loc="upper left", bbox_to_anchor=(0, 0), ncols=len(STATES), frameon=False,
    )  # fmt: skip
    return png_of(figure)


def draw_compression(described: Mapping[str, dict[str, Any]], reference: str, language: Language = "en") -> bytes:
    """Bytes per token and compared compression, a group of bars for each domain, a bar for each tokenizer."""
    say = picture_sayer(language)
    counted = next(iter(described.values()))["domains"]
    domains, sizes = list(counted), {domain: of["bytes"] for domain, of in counted.items()}
    figure = new_figure(7.2, say("How much text a token holds", "一个 token 装多少文本"),
                        say("Source: the texts ", "来源：文本 ") + _with_sizes(sizes, say))  # fmt: skip
    above, below = figure.subplots(2, 1, sharex=True)
    compared = say(f"tokens / those of {reference}\n(fewer is better)", f"token 数 / {reference} 的\n（越少越好）")
    for axes, key, label in (
        (above, "bytes_per_token", say("bytes per token\n(more is better)", "每 token 字节数\n（越多越好）")),
        (below, "compared_compression", compared),
    ):
        shown = [say(OVERALL, "合计") if domain == OVERALL else domain for domain in domains]
        _bars(axes, shown, {n: [f["domains"][d][key] for d in domains] for n, f in described.items()})
        axes.set_ylabel(label)
        tidy(axes, "y")
    legend_above(above, 4)
    return png_of(figure)


def _with_sizes(texts: Mapping[str, int], say: Say) -> str:
    """Names of texts with their sizes, those of all together left out."""
    return say(", ", "，").join(f"{name} {size_of(size)}" for name, size in texts.items() if name != OVERALL)


def _bars(axes: Any, groups: Sequence[str], values: Mapping[str, Sequence[float]]) -> None:
    width = 0.84 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        at = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        bars = axes.bar(at, heights, width * 0.92, color=COLOURS[i % len(COLOURS)], label=name)
        if len(values) * len(groups) <= MOST_NUMBERS:
            axes.bar_label(bars, fmt="%.2f", fontsize=SMALL_POINTS, padding=1)
    axes.margins(y=0.1)  # room for these numbers
    axes.set_xticks(np.arange(len(groups)), groups)


def draw_vocabulary(vocabularies: Mapping[str, Vocabulary], language: Language = "en") -> bytes:
    """Pieces by length (left) and by script (right): those of the first tokenizer less those of each other one.

    Vocabularies of one family are nearly alike, and so would their curves be: what is seen is in what they differ. One
    that stands alone is drawn as it is.
    """
    say = picture_sayer(language)
    (first, of), *others = vocabularies.items()
    pairs = [(f"{first} {say('minus', '减')} {name}", *_difference(of, other)) for name, other in others]
    pairs = pairs or [(first, of.lengths, of.scripts)]
    scripts = [script for script in SCRIPTS if any(found[script] for _, _, found in pairs)]
    sizes = say(", ", "，").join(
        f"{name} {sum(vocabulary.scripts.values()):,}" for name, vocabulary in vocabularies.items()
    )
    last = min(max([1, *(n for _, lengths, _ in pairs for n in lengths)]), MOST_BYTES)
    figure = new_figure(
        (0.8 + 0.22 * max(len(scripts), 10)) * len(pairs) + 0.9,
        say(f"In what vocabularies differ from {first}'s", f"各词表与 {first} 的差别")
        if others
        else say("A vocabulary by length and script", "词表：按长度与文字"),
        say(
            f"Source: all pieces, {sizes}; lengths are those of text pieces, up to {last} bytes",
            f"来源：全部词，{sizes}；长度只计文本词，至多 {last} 字节",
        ),
    )
    for (left, right), (title, lengths, by_script) in zip(figure.subplots(len(pairs), 2, squeeze=False), pairs):
        total = sum(by_script.values())
        count = f"{total:+,}" if others else f"{total:,}"
        left.set_title(say(f"{title}: {count} pieces", f"{title}：{count} 个词"), loc="left", fontsize=11,
                       parse_math=False)  # fmt: skip
        counts = [lengths.get(n, 0) for n in range(1, last + 1)]
        left.bar(range(1, last + 1), counts, color=[COLOURS[count < 0] for count in counts])
        left.set_xlabel(say("bytes of a piece", "词的字节数"))
        left.set_ylabel(say("pieces", "词数"))
        left.yaxis.set_major_formatter("{x:,.0f}")
        values = [by_script[script] for script in scripts]
        names = [say(script, SCRIPTS_IN_CHINESE[script]) for script in scripts]
        bars = right.barh(names, values, color=[COLOURS[value < 0] for value in values])
        right.bar_label(bars, [f"{value:+,}" if others else f"{value:,}" for value in values],
                        fontsize=SMALL_POINTS, padding=2)  # fmt: skip
        right.margins(x=0.25)  # room for these numbers
        right.invert_yaxis()
        right.tick_params(labelsize=SMALL_POINTS)
        right.xaxis.set_major_formatter("{x:,.0f}")
        right.locator_params(axis="x", nbins=4)
        for axes, grid in ((left, "y"), (right, "x")):
            tidy(axes, grid)
            (axes.axhline if axes is left else axes.axvline)(0, color="black", linewidth=0.8)
    return png_of(figure)


def _difference(one: Vocabulary, other: Vocabulary) -> tuple[dict[int, int], dict[str, int]]:
    """Pieces that one has more than the other, by length and by script."""
    lengths = {n: one.lengths.get(n, 0) - other.lengths.get(n, 0) for n in {*one.lengths, *other.lengths}}
    return lengths, {script: one.scripts[script] - other.scripts[script] for script in SCRIPTS}


def draw_price(
    prices: Mapping[str, Price], config: Config, encoded: Mapping[str, int], language: Language = "en"
) -> bytes:
    """Against vocabulary size: tokens a byte, FLOPs a token, bytes a second against the full vocabulary; the best size.

    Dots are measured, the line goes through them, a star is the best size; a square is a tokenizer without a curve.

    Args:
        encoded: name of a text -> bytes of it that were encoded.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator

    say = picture_sayer(language)
    layers, hidden, texts = config.model.num_layers, config.model.hidden_size, _with_sizes(encoded, say)
    figure = new_figure(
        9.5, say("What the size of a vocabulary costs", "词表大小的代价"),
        say(f"Source: FLOPs of a model of {layers} layers, width {hidden:,}, sequences of {config.data.seq_length:,}; "
            f"tokens of the texts {texts}, measured at the marks",
            f"来源：FLOPs 按 {layers} 层、宽度 {hidden:,}、序列长 {config.data.seq_length:,} 的模型计算；"
            f"token 数在标记处测得，文本为 {texts}"),
    )  # fmt: skip
    tokens, flops, speed = panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1.6, 3])
    everything = [price.cost.vocab_size for price in prices.values()]
    for i, (name, price) in enumerate(prices.items()):
        colour = COLOURS[i % len(COLOURS)]
        full = price.cost.vocab_size
        named = f"{name}{say(': ', '：')}{full:,}"
        if isinstance(price.curve, str) or price.best is None:
            at_full = price.tokens_per_byte[OVERALL], price.cost.flops / 1e9, 100.0
            for axes, y in zip(panels, at_full):
                axes.plot(full, y, "s", color=colour, label=named)
            continue
        best, sizes = price.best[OVERALL], np.array(price.curve.sizes)
        everything.append(sizes[0])
        line = np.geomspace(sizes[0], sizes[-1], 600)
        edge = say(best.edge, EDGES_IN_CHINESE[best.edge])
        label = f"{named}{say(', ', '，')}{say('best', '最佳')} {best.size:,} {edge}".strip()
        for at, style in (
            (line, {"linewidth": 1.4}),
            (sizes, {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5, "linestyle": ""}),
            (np.array([best.size]), {"marker": "*", "markersize": 13, "markeredgecolor": "white", "label": label}),
        ):
            tokens_there, flops_there = price.curve.at(at), token_flops(config, at)
            tokens.plot(at, tokens_there, color=colour, **style)
            flops.plot(at, flops_there / 1e9, color=colour, **style)
            full_rate = 100 * price.flops_per_byte[OVERALL]
            speed.plot(at, full_rate / (tokens_there * flops_there), color=colour, **style)
        for axes in panels:
            axes.axvline(best.size, color=colour, linewidth=0.8, linestyle=":")
    tokens.set_ylabel(say("tokens a byte\n(fewer is better)", "每字节 token 数\n（越少越好）"))
    flops.set_ylabel(say("GFLOP a token", "每 token GFLOP"))
    flops.set_ylim(bottom=0)
    speed.set_ylabel(say("bytes a second, % of those\nof the full vocabulary", "每秒字节，占完整\n词表时的 %"))
    speed.set_xlabel(say("pieces of the vocabulary", "词表的词数"))
    speed.set_xscale("log")
    speed.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    speed.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
    speed.xaxis.set_minor_formatter(FuncFormatter(lambda size, _: ""))
    speed.set_xlim(min(everything) / 1.1, max(everything) * 1.1)
    for axes in panels:
        tidy(axes, "y")
    legend_above(tokens, 2)
    return png_of(figure)
