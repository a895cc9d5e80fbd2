"""The loss curve of a run as a picture, from its metrics.jsonl alone: works while the run goes on.

Above: the training loss of every step (light), its moving average (dark), and the validation sets; where there are
several data sources, the moving average of each, dashed. Below: the learning rate. Skipped steps and values that are
not finite leave gaps. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.errors import DataError, os_remedy
from megatron_hammer.base.language import Language, Say
from megatron_hammer.base.paths import missing_remedy
from megatron_hammer.base.pictures import COLOURS, MARKERS, check_png, new_figure, picture_sayer, save_png, tidy
from megatron_hammer.base.progress import Progress
from megatron_hammer.base.reading import open_regular, parse_json
from megatron_hammer.metrics.metrics_file import MAX_LINE_BYTES, METRICS, split_key
from megatron_hammer.metrics.starts import read_starts

MAX_POINTS = 4000  # more than a picture of this size has columns: longer runs are thinned
WINDOW_SHARE = 50  # the moving average spans a fiftieth of the run: chosen by eye
MOST_SOURCES = 12  # in the picture, those of which most was read: their names fill the legend, two in each colour


@dataclass
class Curves:
    """What is drawn; lists of equal length."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    valid: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    """Name of a set -> the steps at which it was evaluated, and its losses."""
    sources: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)
    """Name of a data source -> the steps that it gave something to, and its losses."""
    tokens: int = 0
    """Trained on up to the last of the steps; 0 where it is not stated."""
    read: dict[str, int] = field(default_factory=dict)
    """Name of a data source -> tokens read of it up to the last of these steps."""


def read_curves(path: Path) -> Curves:
    """Read metrics.jsonl; a torn last line, as a running or killed run leaves it, is left out.

    Raises:
        DataError: no such file, no step in it, or a line that is not a step.
    """
    curves = Curves()
    try:
        with open_regular(path) as lines, Progress(f"reading {path.name}", path.stat().st_size) as progress:
            number = 1
            while line := lines.readline(MAX_LINE_BYTES + 1):
                progress.advance(len(line))
                if line.endswith(b"\n"):
                    _add_step(curves, line, f"{path}:{number}")
                elif len(line) > MAX_LINE_BYTES:
                    rule = f"is longer than {MAX_LINE_BYTES:,} bytes, so not a step of a run"
                    raise DataError(82, f"{path}:{number}", rule, "name the folder of a run")
                number += 1
    except OSError as error:
        remedy = os_remedy(error)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            remedy = run_near(path.parent)
        raise DataError(80, str(path), f"could not be read ({error.strerror})", remedy) from None
    if not curves.steps:
        raise DataError(81, str(path), "holds no finished step", "wait until the run has done a step")
    return curves


def run_near(folder: Path) -> str:
    """The remedy for a folder, or a file, that is no run: the run that it is in, or those in it."""
    runs = [run for run in folder.parents[:3] if (run / METRICS).is_file()]
    runs += sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
    named = ", ".join(map(str, runs[:3]))
    return f"did you mean {named}?" if runs else missing_remedy(folder, "name the folder of a run (train.output)")


def _add_step(curves: Curves, line: bytes, where: str) -> None:
    try:
        values = parse_json(line)
        curves.steps.append(int(values["step"]))
        curves.loss.append(_number(values["loss"]))
        curves.lr.append(_number(values["lr"]))
        curves.tokens = int(values.get("consumed_tokens", 0))
        for key, value in values.items():
            kind, name, figure = split_key(key)
            if kind in ("valid", "source") and figure == "loss":
                drawn = curves.valid if kind == "valid" else curves.sources
                steps, losses = drawn.setdefault(name, ([], []))
                steps.append(curves.steps[-1])
                losses.append(_number(value))
            elif kind == "source" and figure == "tokens":
                curves.read[name] = int(value)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise DataError(82, where, f"is not a step of a run ({error!r})", "name the folder of a run") from None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to ``window`` values around each one; NaN is left out of the mean.

    As many before as after, so that a steep start is not flattened; only at the end those after are fewer.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    reach = np.minimum(window // 2, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)


def plot_loss(run: Path, output: Path, language: Language = "en") -> Curves:
    """Draw ``run``/metrics.jsonl into ``output`` (PNG), which appears complete or not at all.

    Args:
        language: of the texts, where an installed font has it.
    """
    from matplotlib.ticker import MaxNLocator

    curves = read_curves(run / METRICS)
    check_png(output)
    say = picture_sayer(language)
    steps, loss, lr = np.array(curves.steps), np.array(curves.loss), np.array(curves.lr)
    smooth = moving_average(loss, max(1, len(loss) // WINDOW_SHARE))
    thin = slice(None, None, -(-len(steps) // MAX_POINTS))

    figure = new_figure(
        6.8,
        say("Loss of ", "损失：") + run.resolve().name,
        _source(run, curves, say),
    )
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.5, 1])
    above.plot(steps[thin], loss[thin], color="0.75", linewidth=0.8, label=say("training, each step", "训练，每一步"))
    above.plot(steps[thin], smooth[thin], color="black", linewidth=1.6,
               label=say("training, mean: ", "训练，滑动平均：") + _last(smooth, say))  # fmt: skip
    for i, (name, (at, losses)) in enumerate(curves.valid.items()):
        label = say("validation on ", "验证，") + f"{name}{say(': ', '：')}{_last(np.array(losses), say)}"
        above.plot(at, losses, color=COLOURS[i % len(COLOURS)], linewidth=1.2,
                   marker=MARKERS[i % len(MARKERS)], markersize=4, label=label)  # fmt: skip
    _plot_sources(above, curves, say)
    above.set_ylabel(say("loss (nats per token)", "损失（nats/token）"))
    for text in above.legend(frameon=False, title=say("last value", "末值"), alignment="left").get_texts():
        text.set_parse_math(False)  # a set may be named $x
    below.plot(steps[thin], lr[thin], color="black", linewidth=1.2)
    below.set_ylabel(say("learning rate", "学习率"))
    below.set_xlabel(say("step", "步"))
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(above)
    tidy(below)
    save_png(figure, output)
    return curves


def _source(run: Path, curves: Curves, say: Say) -> str:
    """What the picture was drawn from; when and where it last started, where the run says it."""
    step, tokens = f"{curves.steps[-1]:,}", f"{curves.tokens:,}" if curves.tokens else ""
    text = say(f"Source: metrics.jsonl of the run, to step {step}", f"来源：该运行的 metrics.jsonl，到第 {step} 步")
    if tokens:
        text += say(f" and token {tokens}", f"、第 {tokens} 个 token")
    return text + "".join(_last_start(run, say))


def _last_start(run: Path, say: Say) -> Iterator[str]:
    """What the newest line of its starts says; what that leaves out is left out."""
    try:
        starts = read_starts(run)
    except OSError:  # the picture needs none of it
        return
    if not starts:
        return
    where, day = starts[-1]["environment"], starts[-1].get("time")
    device = where.get("processor", "CPU") if where.get("device") == "cpu" else where.get("device")
    if isinstance(day, str):
        yield say(f"; last started on {day[:10]}", f"；最近一次启动于 {day[:10]}")
    if (ranks := where.get("ranks")) is not None:
        yield say(f", ranks: {ranks}", f"，rank 数 {ranks}")
    if device is not None:
        yield say(f", {device}", f"，{device}")


def _plot_sources(axes: Any, curves: Curves, say: Say) -> None:
    """Nothing where there is one source: its loss is the loss."""
    if len(curves.sources) < 2:
        return
    most = sorted(curves.sources, key=lambda name: -curves.read.get(name, 0))[:MOST_SOURCES]
    sets = list(curves.valid)  # a source that has a validation set of its name has its colour
    for i, name in enumerate(name for name in curves.sources if name in most):
        at, losses = (np.array(values) for values in curves.sources[name])
        smooth = moving_average(losses, max(1, len(losses) // WINDOW_SHARE))
        thin = slice(None, None, -(-len(at) // MAX_POINTS))
        style, number = ("--", ":")[i // len(COLOURS)], sets.index(name) if name in sets else -1 - i
        axes.plot(at[thin], smooth[thin], style, color=COLOURS[number % len(COLOURS)], linewidth=1.2,
                  label=say("training on ", "训练，") + f"{name}{say(': ', '：')}{_last(smooth, say)}")  # fmt: skip


def _last(values: np.ndarray, say: Say) -> str:
    known = values[np.isfinite(values)]
    return f"{known[-1]:.3f}" if len(known) else say("none", "无")
