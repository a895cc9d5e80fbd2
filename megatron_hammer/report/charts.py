"""The charts of a report: which figures each one shows; the page's script draws them, and they are saved as PNGs.

With two runs each chart has both: the second one's curves are dashed. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.html_page import visible
from megatron_hammer.base.language import Say
from megatron_hammer.metrics.metrics_file import split_key
from megatron_hammer.report.curves import MetricsReader, Thinned, thin
from megatron_hammer.report.gather import RunFacts

NUM_COLOURS = 6  # of report.css and of base/pictures.py
DASHES = ("", "7 4", "2 3", "9 3 2 3")
"""Of the first and the second run; of a chart's curves beyond the colours, the same again."""
SINGLE_COLOURS = (0, 1)  # of the two runs where a chart has one curve of each
TOKEN_POINTS = 500  # of the curve that turns steps into tokens


@dataclass(frozen=True)
class ChartCurve:
    """One curve of a chart, of one run."""

    run: int
    name: str
    curve: Thinned
    colour: int
    dash: str


@dataclass(frozen=True)
class Chart:
    """One chart."""

    id: str
    title: str
    curves: tuple[ChartCurve, ...]
    is_signed: bool = False
    """Whether a logarithmic axis makes no sense."""

    def to_tree(self) -> dict[str, Any]:
        """The chart as the page's script takes it."""
        curves = []
        for drawn in self.curves:
            tree: dict[str, Any] = {"run": drawn.run, "name": visible(drawn.name), "colour": drawn.colour}
            tree |= {"dash": drawn.dash, "x": drawn.curve.steps, "y": drawn.curve.mean}
            if not drawn.curve.is_whole:
                tree |= {"lo": drawn.curve.low, "hi": drawn.curve.high}
            curves.append(tree)
        return {"id": self.id, "title": self.title, "signed": self.is_signed, "curves": curves}


def charts_of(runs: Sequence[RunFacts], names: Sequence[str], say: Say) -> list[Chart]:
    """The charts of one run or of two; a chart without a curve is left out.

    Args:
        names: of the runs, for people.
    """
    metrics = [run.metrics for run in runs]
    evaluations = [run.evaluations for run in runs]
    bits = say("bits per byte", "每字节比特")
    loss = say("loss (nats per token)", "损失（nats/token）")
    single = {
        "loss": say("Training loss (nats per token)", "训练损失（nats/token）"),
        "lr": say("Learning rate", "学习率"),
        "grad_norm": say("Gradient norm", "梯度范数"),
        "tokens_per_second": say("Throughput (tokens/s)", "吞吐（tokens/s）"),
        "mfu": say("MFU (6N + 12LHs)", "MFU（6N + 12LHs）"),
        "memory_bytes": say("Peak memory of rank 0 (GiB)", "rank 0 内存峰值（GiB）"),
    }
    found = {key: _single(key, title, metrics, names) for key, title in single.items()}
    ordered = [
        found["loss"],
        _several("sources", say("Training by source: ", "各数据源训练") + loss, metrics, names, "source", "loss"),
        _several("valid", say("Validation: ", "验证") + loss, metrics, names, "valid", "loss"),
        _several("valid_bits", say("Validation: ", "验证：") + bits, metrics, names, "valid", "bits_per_byte"),
        _several("source_bits", say("Training by source: ", "各数据源训练：") + bits, metrics, names, "source",
                 "bits_per_byte"),
        _several("evaluations", say("Evaluations of checkpoints", "检查点评估"), evaluations, names, "evaluation", ""),
        *(found[key] for key in single if key != "loss"),
    ]  # fmt: skip
    return [chart for chart in ordered if chart.curves]


def _single(key: str, title: str, metrics: Sequence[MetricsReader], names: Sequence[str]) -> Chart:
    curves = []
    for run, reader in enumerate(metrics):
        steps, values = reader.values(key)
        thinned = thin(steps, values / 2**30 if key == "memory_bytes" else values, reader.points_of_a_curve())
        if thinned.steps:
            curves.append(ChartCurve(run, names[run], thinned, SINGLE_COLOURS[run], DASHES[run]))
    return Chart(key, title, tuple(curves))


def _several(
    id: str, title: str, readers: Sequence[MetricsReader | None], names: Sequence[str], kind: str, figure: str
) -> Chart:
    """A curve for each source, set or evaluation; the same one has the same colour in both runs."""
    found: list[tuple[int, str, str, MetricsReader]] = []
    for run, reader in enumerate(readers):
        for key in reader.curves if reader is not None else ():
            group, name, last = split_key(key)
            if not figure:
                name, last = key.removeprefix(f"{group}/"), ""
            if group == kind and last == figure and reader is not None:
                found.append((run, name, key, reader))
    places = {name: i for i, name in enumerate(dict.fromkeys(name for _, name, _, _ in found))}
    curves = []
    for run, name, key, reader in found:
        thinned = thin(*reader.values(key), reader.points_of_a_curve())
        if thinned.steps:
            shown = name if len(readers) == 1 else f"{name} · {names[run]}"
            dash = DASHES[(run + 2 * (places[name] // NUM_COLOURS)) % len(DASHES)]
            curves.append(ChartCurve(run, shown, thinned, places[name] % NUM_COLOURS, dash))
    return Chart(id, title, tuple(curves), is_signed=kind == "evaluation")


def tokens_of(reader: MetricsReader) -> dict[str, Any]:
    """How many tokens were consumed at which step, as few points."""
    steps, tokens = reader.values("consumed_tokens")
    if len(steps) > TOKEN_POINTS:
        kept = np.linspace(0, len(steps) - 1, TOKEN_POINTS).astype(np.int64)
        steps, tokens = steps[kept], tokens[kept]
    return {"x": steps.tolist(), "y": [float(f"{value:.7g}") for value in tokens.tolist()]}


def draw(charts: Sequence[Chart], folder: Path, source: str, say: Say) -> list[Path]:
    """Each chart as a PNG of its name.

    Args:
        source: what they were drawn from, in small letters below.
    """
    from matplotlib.ticker import MaxNLocator

    from megatron_hammer.base.pictures import COLOURS, SMALL_POINTS, new_figure, save_png, tidy

    paths = []
    for chart in charts:
        figure = new_figure(4.5, chart.title, source)
        axes = figure.subplots()
        for drawn in chart.curves:
            curve, colour = drawn.curve, COLOURS[drawn.colour]
            style = "-" if not drawn.dash else (0, tuple(float(n) / 2 for n in drawn.dash.split()))
            marker = "o" if len(curve.steps) <= 60 else None
            axes.plot(curve.steps, curve.mean, color=colour, linewidth=1.3, linestyle=style, label=drawn.name,
                      marker=marker, markersize=3)  # fmt: skip
            if not curve.is_whole:
                axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel(say("step", "步"))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        if len(chart.curves) > 1:
            for text in axes.legend(
                frameon=False, fontsize=SMALL_POINTS, ncols=1 + len(chart.curves) // 12
            ).get_texts():
                text.set_parse_math(False)
        tidy(axes)
        paths.append(folder / f"{chart.id}.png")
        save_png(figure, paths[-1])
    return paths
