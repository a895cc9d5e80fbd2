"""A plan as a table of at most 100 columns and as a picture; ``planner.py`` makes it. Needs no GPU."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.language import Language, Say
from megatron_hammer.base.pictures import SMALL_POINTS, bare_figure, picture_sayer, save_png
from megatron_hammer.base.tables import align
from megatron_hammer.costs.layouts import PlannedLayout, precision_of, shard_of
from megatron_hammer.costs.planner import LayoutPlan
from megatron_hammer.costs.rank_costs import GIB
from megatron_hammer.costs.rank_peak import PARTS as MEMORY_PARTS
from megatron_hammer.costs.rank_speed import PARTS as TIME_PARTS
from megatron_hammer.model.parameters import count_parameters

WIDTH = 100  # characters of a line
DAY = 86400.0
MIB = 2**20
SEEN_SHARE = 0.05  # of the memory that may be used: shorter bars have an axis of their own
EXAMPLES = 3  # of rejected layouts of one kind
# Colours that differ in lightness too, for readers who see few of them and for print.
MEMORY_COLOURS = ("#1f4e8c", "#5b93d3", "#0b2545", "#9bc26b", "#d9730d", "#f2c46d", "#8c8c8c")
TIME_COLOURS = ("#1f4e8c", "#5b93d3", "#d9730d", "#f2a65a", "#b5323f", "#7a5230", "#3f7d3a", "#cfcfcf")


def plan_table(plan: LayoutPlan, shown: int) -> list[str]:
    """The plan for people, in lines of at most ``WIDTH`` characters."""
    layouts = plan.found.ranked[:shown]
    return [
        *_heading(plan),
        "",
        *_ranking(plan, layouts),
        "",
        "memory of the rank that needs most, GiB",
        *_parts([layout.memory for layout in layouts], MEMORY_PARTS, GIB),
        "",
        "seconds of a step on the busiest rank",
        *_parts([layout.time.seconds for layout in layouts], TIME_PARTS, 1.0),
        "",
        *_rejected(plan),
        "",
        *assumptions(plan),
    ]


def _heading(plan: LayoutPlan) -> list[str]:
    model, config = plan.config.model, plan.config
    lines = _wrapped(
        f"{count_parameters(model):,} parameters on {plan.world_size} x {plan.cluster.name} ({plan.memory_gib:g} GiB, "
        f"of which a rank may need {plan.found.limit / GIB:.1f}); a step of {config.train.global_batch_size:,} samples "
        f"x {config.data.seq_length:,} tokens; {plan.tokens:,} tokens in all"
    )
    if plan.is_vocabulary_assumed:
        said = f"a vocabulary of {model.vocab_size:,} is assumed: tokenizer.path or model.vocab_size says yours"
        lines += _wrapped(said)
    return lines


def _ranking(plan: LayoutPlan, layouts: Sequence[PlannedLayout]) -> list[str]:
    costs = "cost" if plan.price is not None else "GPU hours"
    titles = ["#", "TP", "PP", "CP", "DP", "shard", "batch", "recompute", "type", "GiB", "tokens/s", "MFU", "days"]
    rows: list[Sequence[str]] = [[*titles, costs]]
    for number, layout in enumerate(layouts, start=1):
        train, hours = layout.config.train, plan.gpu_hours(layout)
        rows.append(
            (
                str(number), *_sizes(layout), shard_of(layout.config), str(train.micro_batch_size),
                train.recompute, precision_of(layout.config), f"{layout.bytes / GIB:.1f}",
                f"{layout.time.tokens_per_second:,.0f}", f"{layout.time.mfu:.0%}",
                _short(plan.tokens / layout.time.tokens_per_second / DAY),
                f"{hours * (1.0 if plan.price is None else plan.price):,.0f}",
            )
        )  # fmt: skip
    interleaved = "PP 4x2: 4 pipeline ranks of 2 interleaved stages each (parallel.virtual_pipeline_stages)"
    within = "weights/8: among 8 ranks that are near each other, with copies beside them (parallel.shard_size)"
    lines = align(rows) + [interleaved] * any(layout.stages > 1 for layout in layouts)
    return lines + [within] * any(layout.config.parallel.shard_size is not None for layout in layouts)


def _sizes(layout: PlannedLayout) -> list[str]:
    """TP, PP with the stages of a rank where there are several, CP, DP."""
    tp, pp, cp, dp = map(str, layout.sizes)
    return [tp, f"{pp}x{layout.stages}" if layout.stages > 1 else pp, cp, dp]


def _parts(each: Sequence[dict[str, Any]], names: Sequence[str], unit: float) -> list[str]:
    """One line a layout; parts that are nothing in all of them are left out."""
    used = [name for name in names if any(of[name] for of in each)]
    rows = [("#", *used, "sum")]
    for number, of in enumerate(each, start=1):
        cells = [_short(of[name] / unit) for name in used]
        rows.append((str(number), *cells, _short(sum(of.values()) / unit)))
    return align(rows)


def _rejected(plan: LayoutPlan) -> list[str]:
    """How many of each kind, and some of each; all are in the JSON."""
    kinds = Counter(rejected.kind for rejected in plan.found.rejected)
    lines = [f"{len(plan.found.fitting):,} layouts fit, {len(plan.found.rejected):,} do not"]
    titles = {"memory": "too large (larger micro-batches were not tried)", "batch": "the batch cannot be divided so",
              "settings": "refused by the settings"}  # fmt: skip
    for kind, title in titles.items():
        if not kinds[kind]:
            continue
        alike = [rejected for rejected in plan.found.rejected if rejected.kind == kind]
        alike.sort(key=lambda rejected: rejected.missing)
        lines.append(f"  {title}: {kinds[kind]:,}")
        for rejected in alike[:EXAMPLES]:
            lines += _wrapped(f"{rejected.layout}: {rejected.reason}", "    ")
    return lines


def assumptions(plan: LayoutPlan) -> list[str]:
    """What the figures rest on."""
    cluster, rates = plan.cluster, plan.cluster.efficiency
    used = dict.fromkeys("fp32" if layout.config.train.precision == "fp32" else "bf16" for layout in plan.found.fitting)
    peaks = " and ".join(f"{cluster.gpu.peak(precision):g} in {precision}" for precision in used)
    return [
        "assumed",
        *_wrapped(
            f"{cluster.name}: dense TFLOP/s {peaks}, {cluster.gpu.bandwidth:g} TB/s; reached: "
            f"{rates.products:.0%} in products, {rates.attention:.0%} in attention, {rates.memory:.0%} of the memory's "
            f"bandwidth, {rates.links:.0%} of the links'; {rates.gaps:.0%} of a step are gaps",
            "  ",
        ),
        *_wrapped(
            f"links of a GPU, one direction: {cluster.gpu.link:g} GB/s among {cluster.gpus_per_node} of a node, "
            f"{cluster.network:g} GB/s between nodes (--node-link, --gpus-per-node, --network)",
            "  ",
        ),
        *_wrapped(
            f"{plan.headroom:.0%} of the memory are left to CUDA, NCCL and holes between allocations (--headroom); "
            "MFU counts 6 N + 12 L h s FLOPs a token; full samples, no restarts, evaluations or saves",
            "  ",
        ),
        *_wrapped(
            "nothing was measured: `python tools/verify_parallel.py` proves a layout, and a run prints its own figures "
            "beside these",
            "  ",
        ),
    ]


# ---- the picture -----------------------------------------------------------------------------------------------------


CHINESE = dict(zip((*MEMORY_PARTS, *TIME_PARTS), (
    "权重", "梯度", "优化器", "收集的权重", "激活", "输出层、反向", "消息",
    "计算", "重计算", "TP", "CP", "PP", "DP", "优化器", "空隙",
), strict=True))  # fmt: skip


def draw_plan(plan: LayoutPlan, output: Path, shown: int, language: Language = "en") -> None:
    """Memory and time of the first layouts as stacked bars; in ``language`` where an installed font has it."""
    say, layouts = picture_sayer(language), plan.found.ranked[:shown]
    height = 3.1 + 0.58 * len(layouts)
    figure = bare_figure(height, _source(plan, say))
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.272, right=0.985, wspace=0.12, top=1 - 0.9 / height, bottom=1.6 / height)
    names, comma = [], say(", ", "，")
    for number, layout in enumerate(layouts, start=1):
        tp, pp, cp, dp = _sizes(layout)
        train = layout.config.train
        names.append(
            f"{number}  TP {tp} PP {pp} CP {cp} DP {dp}{comma}{precision_of(layout.config)}\n"
            f"{say('shard', '切分')} {shard_of(layout.config)}{comma}"
            f"{say('micro-batch', '微批')} {train.micro_batch_size}\n"
            f"{say('recompute', '重计算')} {train.recompute}"
        )
    most = max(layout.bytes for layout in layouts)
    memory, named = (GIB, "GiB") if most >= 0.1 * GIB else (MIB, "MiB")
    _stack(left, [layout.memory for layout in layouts], MEMORY_PARTS, MEMORY_COLOURS, memory, say)
    if most >= SEEN_SHARE * plan.found.limit:
        left.axvline(plan.found.limit / memory, color="black", linewidth=1.3, linestyle="--")
        left.axvline(plan.memory_gib * GIB / memory, color="black", linewidth=1.3)
        left.set_xlim(0, plan.memory_gib * GIB / memory * 1.02)
        limit = say("; dashed: may be used", "；虚线：可用")
    else:  # bars too short to be seen beside the limit
        left.set_xlim(0, most / memory * 1.1)
        usable = f"{plan.found.limit / GIB:.1f} GiB"
        limit = say(f"; {usable} may be used", f"；可用 {usable}")
    left.locator_params(axis="x", nbins=6)
    _headed(left, say(f"{named} of a rank", f"一个 rank 的 {named}") + limit)
    longest = max(layout.time.total for layout in layouts)
    unit, counted = (1.0, say("seconds", "秒数")) if longest >= 0.1 else (1e-3, say("milliseconds", "毫秒数"))
    _stack(right, [layout.time.seconds for layout in layouts], TIME_PARTS, TIME_COLOURS, unit, say)
    for y, layout in enumerate(layouts):
        speed = f" {layout.time.tokens_per_second:,.0f} token{say('s', '')}/s, {layout.time.mfu:.0%}"
        right.text(layout.time.total / unit, y, speed, va="center", fontsize=SMALL_POINTS)
    right.set_xlim(0, longest / unit * 2.0)
    _headed(right, say(f"{counted} of a step; tokens/s and MFU", f"一步的{counted}；token/s 与 MFU"))
    left.set_yticks(range(len(layouts)), names, fontsize=SMALL_POINTS)
    left.invert_yaxis()
    size = f"{count_parameters(plan.config.model):,}"
    title = (
        say(f"Predicted: {size} parameters on ", f"预测：{size} 个参数，") + f"{plan.world_size} x {plan.cluster.name}"
    )
    figure.suptitle(title, x=0.008, y=1 - 0.1 / height, ha="left", va="top", fontsize=13, fontweight="bold")
    save_png(figure, output)


def _source(plan: LayoutPlan, say: Say) -> str:
    """What the picture was drawn from: no measurement, but these assumptions."""
    rates, cluster = plan.cluster.efficiency, plan.cluster
    shares = f"{rates.products:.0%}", f"{rates.attention:.0%}", f"{rates.memory:.0%}"
    links = f"{cluster.gpu.link:g} GB/s", f"{cluster.network:g} GB/s"
    return say(
        f"Source: tools/plan.py; nothing was measured. Memory of the rank that needs most. Assumed: "
        f"{shares[0]} of the peak in products, {shares[1]} in attention, {shares[2]} of memory bandwidth; "
        f"{links[0]} in a node, {links[1]} between nodes.",
        f"来源：tools/plan.py；未经测量。内存取用得最多的 rank。假设：矩阵乘达到峰值的 {shares[0]}，"
        f"注意力 {shares[1]}，显存带宽 {shares[2]}；节点内 {links[0]}，节点间 {links[1]}。",
    )


def _headed(axes: Any, text: str) -> None:
    axes.set_title(text, fontsize=9.5, loc="left")


def _stack(
    axes: Any, each: Sequence[dict[str, Any]], parts: Sequence[str], colours: Sequence[str], unit: float, say: Say
) -> None:
    for part, colour in zip(parts, colours, strict=True):
        if not any(of[part] for of in each):
            continue
        starts = [sum(of[before] for before in parts[: parts.index(part)]) / unit for of in each]
        sizes = [of[part] / unit for of in each]
        name = say(part, CHINESE[part])
        axes.barh(range(len(each)), sizes, left=starts, color=colour, edgecolor="white", linewidth=0.6, label=name)
    axes.legend(
        ncols=3, fontsize=SMALL_POINTS, frameon=False, loc="upper center", columnspacing=1.0, handlelength=1.3,
        bbox_to_anchor=(0.5, -0.3 / (axes.get_position().height * axes.figure.get_figheight())),
    )  # fmt: skip
    axes.tick_params(axis="x", labelsize=SMALL_POINTS)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(number: float) -> str:
    if number >= 100 or number == 0:
        return f"{number:,.0f}"
    return f"{number:.1f}" if number >= 10 else f"{number:.2f}" if number >= 0.1 else f"{number:.2g}"


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  " if indent else "")
