"""The profile of a step as a picture: the whole step beside its limit, each part beside its own, memory by kind.

Drawn from the dictionary that ``profile.json`` holds, so that a picture can be made again from the file alone.
Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.language import Language, Say
from megatron_hammer.base.pictures import (
    SMALL_POINTS,
    SOURCE_COLUMNS,
    TITLE_COLUMNS,
    WIDTH_INCHES,
    bare_figure,
    picture_sayer,
    save_png,
    wrap,
)
from megatron_hammer.base.terminal import width_of
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
CHINESE = {
    budget.LAYER_PRODUCTS: "各层的矩阵乘",
    budget.HEAD_PRODUCTS: "输出层的矩阵乘",
    budget.ATTENTION: "注意力",
    budget.NORM: "归一化、残差",
    budget.ROPE: "RoPE",
    budget.SWIGLU: "SwiGLU",
    budget.ELEMENTWISE: "归一化、RoPE、SwiGLU",
    budget.EMBEDDING: "嵌入",
    budget.LOSS: "损失",
    budget.CASTS: "fp8 转换",
    budget.GRADIENTS: "梯度累加",
    budget.OPTIMIZER: "优化器、裁剪",
    budget.COMMUNICATION: "通信",
    budget.DATA: "数据",
    budget.OTHER: "其他运算",
    budget.GAPS: "空隙",
    "weights": "权重",
    "gradients": "梯度",
    "optimizer state": "优化器状态",
    "activations": "激活",
    "temporary": "临时",
    "program, libraries": "程序、库",
    "the rest": "其余",
    "resident, without the profiler": "常驻内存，不含剖析器",
    "torch's allocator": "torch 的分配器",
    "random tokens": "随机 token",
}
"""Of what ``profile.json`` names."""
LABELLED_SHARE = 0.06  # of the width: a segment below it has no room for its name
LABEL_CHARACTERS = 62  # of the labels' size in the axes' width
LEFT_INCHES, AXES_INCHES = 1.68, 4.1
ROW_INCHES, BETWEEN_INCHES, ABOVE_INCHES, BELOW_INCHES = 0.27, 0.5, 0.12, 0.62
COLUMNS = (
    (1.13, "ms", "毫秒"),
    (1.28, "share", "占比"),
    (1.48, "limit, ms", "上限，毫秒"),
    (1.755, "of limit", "达到上限的比例"),
)
"""Of the table beside the bars: right edge of each column in widths of the axes, and its heading."""


def title_of(profile: Mapping[str, Any], say: Say) -> str:
    """What was profiled, in a line."""
    parameters, device = f"{profile['parameters']:,}", profile["device"]
    threads = re.fullmatch(r"CPU, (\d+) threads?", device)
    device_in_chinese = f"CPU，{threads[1]} 个线程" if threads else device
    return say(
        f"One training step, {parameters} parameters, {profile['precision']}, {device}",
        f"一个训练步：{parameters} 个参数，{profile['precision']}，{device_in_chinese}",
    )


def source_of(profile: Mapping[str, Any], say: Say) -> str:
    """The line that says with what, when and where a profile was measured."""
    where = f"{profile['processor']}, torch {profile['torch']}, {profile['date']}"
    return say(f"Source: tools/profile_step.py; {where}", f"来源：tools/profile_step.py；{where}")


def subtitle_of(profile: Mapping[str, Any], say: Say) -> list[str]:
    """Size and speed of the step, and what it is held against."""
    size, count, length = profile["micro_batch_size"], profile["micro_batches"], profile["seq_length"]
    rates, without, speed = profile["rates"], profile["step_ms_without_profiler"], profile["tokens_per_second"]
    kernels = ", ".join(f"{k} {v}" for k, v in profile["kernels"].items())
    tokens, taken = f"{size * count * length:,}", f"{without:,.{digits(without)}f}"
    data = say(profile["data"], CHINESE.get(profile["data"], profile["data"]))
    step = say(
        f"{count} x micro-batch {size} x {length} = {tokens} tokens ({data}); without the profiler {taken} ms = "
        f"{speed:,.0f} tokens/s{' of all ranks' * (profile['ranks'] > 1)}",
        f"{count} 个微批 × {size} × {length} = {tokens} 个 token（{data}）；不用剖析器时 {taken} 毫秒 = "
        f"{'所有 rank 共 ' * (profile['ranks'] > 1)}{speed:,.0f} token/s",
    )
    if rates is None:
        time, beside = (sum(c[key] for c in profile["communication"]) for key in ("ms", "beside_ms"))
        under_way, hidden = f"{time:,.{digits(time)}f}", f"{beside:,.{digits(time)}f}"
        lines = [
            say(f"rank 0 of {profile['ranks']}: {step}", f"{profile['ranks']} 个 rank 中的 rank 0：{step}"),
            say(
                f"communication: {under_way} ms under way, {hidden} of it beside other work",
                f"通信：在途 {under_way} 毫秒，其中 {hidden} 与其他工作同时进行",
            ),
        ]
    else:
        source = say(
            *(("given", "给定"), ("in part given", "部分给定"), ("measured here", "在此测得"))[len(rates["measured"])]
        )
        products, bandwidth = flops_text(rates["tflops"]), f"{rates['gb_per_second']:,.1f} GB/s"
        reached = f"{profile['limit_ms'] / without:.0%}"
        lines = [
            step + say(f", {reached} of the limit", f"，达到上限的 {reached}"),
            say(
                f"limit: matrix products at {products}, bytes at {bandwidth} ({source})",
                f"上限：矩阵乘 {products}，读写字节 {bandwidth}（{source}）",
            ),
        ]
    recompute = profile["recompute"]
    return [*lines, say(f"kernels: {kernels}; recompute {recompute}", f"kernel：{kernels}；重计算 {recompute}")]


def draw_profile(profile: Mapping[str, Any], output: Path, language: Language = "en") -> None:
    """Draw a profile into ``output`` (PNG), which appears complete or not at all."""
    say = picture_sayer(language)
    rows, kinds = profile["parts"], profile["memory"]["kinds"]
    title = wrap(title_of(profile, say), TITLE_COLUMNS)
    subtitle = [row for line in subtitle_of(profile, say) for row in wrap(line, SOURCE_COLUMNS)]
    heights = [
        0.25 * len(title) + 0.165 * len(subtitle),
        1.05 if profile["limit_ms"] is not None else 0.55,
        ROW_INCHES * (len(rows) + 1),
        ROW_INCHES * (len(kinds) + 1),
    ]  # inches, from above
    height = ABOVE_INCHES + sum(heights) + 3 * BETWEEN_INCHES + BELOW_INCHES
    figure = bare_figure(height, source_of(profile, say))
    panels, top = [], height - ABOVE_INCHES
    for size in heights:
        place = (LEFT_INCHES / WIDTH_INCHES, (top - size) / height, AXES_INCHES / WIDTH_INCHES, size / height)
        panels.append(figure.add_axes(place))
        top -= size + BETWEEN_INCHES
    _draw_heading(panels[0], title, subtitle)
    _draw_step(panels[1], profile, say)
    _draw_parts(panels[2], rows, say)
    _draw_memory(panels[3], profile["memory"], say)
    save_png(figure, output)


def _draw_heading(axes: Any, title: Sequence[str], subtitle: Sequence[str]) -> None:
    axes.set_axis_off()
    left, size = 0.008 * WIDTH_INCHES - LEFT_INCHES, axes.get_position().height * axes.figure.get_figheight()
    place = {"transform": axes.transAxes, "va": "top"}
    axes.text(left / AXES_INCHES, 1.0, "\n".join(title), fontsize=13, weight="bold", **place)
    below = 1 - 0.25 * len(title) / size
    axes.text(
        left / AXES_INCHES, below, "\n".join(subtitle), fontsize=SMALL_POINTS, color="0.25", linespacing=1.3, **place
    )


def _draw_step(axes: Any, profile: Mapping[str, Any], say: Say) -> None:
    """Two stacked bars on one scale: the step as measured, and the sum of the parts' limits."""
    bars = ("ms",) if profile["limit_ms"] is None else ("ms", "limit_ms")
    width = max(profile["step_ms"], profile["limit_ms"] or 0.0)
    for y, key in enumerate(bars):
        left = 0.0
        for part in profile["parts"]:
            name, size = part["name"], part[key] or 0.0
            axes.barh(y, size, left=left, color=COLOURS[name], edgecolor="white", linewidth=0.6, height=0.72)
            if size >= LABELLED_SHARE * width:
                _label(axes, left + size / 2, y, COLOURS[name], say(name, CHINESE[name]), size / width)
            left += size
        shown = f"{left:,.{digits(left)}f} {say('ms', '毫秒')}"
        axes.text(left + width * 0.012, y, shown, va="center", fontsize=SMALL_POINTS)
    named = (say("measured", "测得"), say("at the limit", "按上限"))
    axes.set_yticks([0, 1][: len(bars)], named[: len(bars)], fontsize=9.5)
    axes.set_xlim(0, width)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _label(axes: Any, x: float, y: float, colour: str, name: str, share: float) -> None:
    """A part's name inside its segment, over two lines where it is narrow, left out where it has no room at all."""
    room = int(share * LABEL_CHARACTERS)
    words = name.replace(", ", ",\n").replace("、", "、\n") if width_of(name) > room else name
    if _width(words) > room:
        words = words.replace(" ", "\n").replace("的", "的\n")
    if _width(words) <= room:
        dark = sum(int(colour[i : i + 2], 16) for i in (1, 3, 5)) < 3 * 150
        text = "white" if dark else "black"
        axes.text(x, y, words, ha="center", va="center", fontsize=SMALL_POINTS, color=text, linespacing=0.95)


def _width(text: str) -> int:
    return max(map(width_of, text.split("\n")))


def _draw_parts(axes: Any, parts: Sequence[Mapping[str, Any]], say: Say) -> None:
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
        _cells(axes, y, columns, cells)
    mark = say("; the mark is the part's limit", "；标记是该部分的上限") if has_limits else ""
    _heading(axes, say("time by part, ms a step", "各部分的时间，每步毫秒数") + mark, columns, say)
    _style_rows(axes, [say(p["name"], CHINESE[p["name"]]) for p in parts], width)


def _draw_memory(axes: Any, memory: Mapping[str, Any], say: Say) -> None:
    kinds = memory["kinds"]
    width = max([k["mib"] for k in kinds] + [1e-3]) * 1.02
    for y, (kind, colour) in enumerate(zip(kinds, MEMORY_COLOURS, strict=False)):
        axes.barh(y, kind["mib"], color=colour, height=0.66)
        _cells(axes, y, COLUMNS, (f"{kind['mib']:,.{digits(width)}f}", f"{kind['share']:.1%}"))
    peak, source = f"{memory['peak_mib']:,.0f} MiB", memory["source"]
    said = say(f"memory at its peak: {peak} ({source})", f"峰值内存：{peak}（{CHINESE.get(source, source)}）")
    _heading(axes, said, [(COLUMNS[0][0], "MiB", "MiB"), COLUMNS[1]], say)
    _style_rows(axes, [say(k["name"], CHINESE[k["name"]]) for k in kinds], width)


def _cells(axes: Any, y: float, columns: Sequence[tuple[float, str, str]], cells: Sequence[str]) -> None:
    for (x, *_), cell in zip(columns, cells, strict=False):
        axes.text(x, y, cell, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=SMALL_POINTS)


def _heading(axes: Any, text: str, columns: Sequence[tuple[float, str, str]], say: Say) -> None:
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": SMALL_POINTS, "color": "0.35"}
    axes.text(0, -0.95, text, **place)
    for x, *heading in columns:
        axes.text(x, -0.95, say(*heading), ha="right", **place)


def _style_rows(axes: Any, names: Sequence[str], width: float) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9.5)
    axes.set_xlim(0, width)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=SMALL_POINTS, colors="0.35", length=2)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("0.8")


def flops_text(tflops: float) -> str:
    """A rate with a unit that suits it."""
    return f"{tflops:,.1f} TFLOP/s" if tflops >= 1 else f"{1e3 * tflops:,.1f} GFLOP/s"


def digits(largest: float) -> int:
    """Decimals that leave three or four significant digits of the largest of some numbers."""
    return 0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 1 else 3
