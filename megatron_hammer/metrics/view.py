"""The rows that the terminal view of a run shows, made from a step's line of metrics. Needs no torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from megatron_hammer.base.language import sayer, span
from megatron_hammer.base.terminal import Item
from megatron_hammer.metrics.metrics_file import split_key

SMOOTHED_STEPS = 20  # of the time of a step, for what is left: evaluations and saves count in it
ENGLISH = sayer("en")  # as all that programs print
BAR_CELLS = 16  # so that a window of 20 columns has it whole


class RunView:
    """What the terminal view of a run knows between two steps.

    Args:
        num_steps: of the run.
        first_step: the last that is done at the start.
        left: of a line, how many steps like those of now the rest of the run has the tokens of; None: its steps.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int,
        clock: Callable[[], float] = time.monotonic,
        left: Callable[[Mapping[str, Any]], float] | None = None,
    ) -> None:
        self._num_steps, self._clock = num_steps, clock
        self._left = left or (lambda line: num_steps - line["step"])
        self._seconds: float | None = None
        """Of a step, smoothed."""
        self._before = clock()
        self._saved: tuple[int, float] | None = (first_step, self._before) if first_step else None
        self._line: Mapping[str, Any] | None = None
        self._sources: dict[str, str] = {}
        self._valid: dict[str, str] = {}

    def saved(self, step: int) -> None:
        """A checkpoint has been committed."""
        self._saved = step, self._clock()

    def take(self, line: Mapping[str, Any]) -> None:
        """A step is done."""
        now = self._clock()
        taken, self._before = now - self._before, now
        share = 1 / SMOOTHED_STEPS
        self._seconds = taken if self._seconds is None else self._seconds + share * (taken - self._seconds)
        self._line = line
        for key, value in line.items():
            kind, name, figure = split_key(key)
            if figure == "loss" and kind in ("source", "valid"):
                (self._sources if kind == "source" else self._valid)[name] = _number(value, ".4f")

    def rows(self) -> list[list[Item]]:
        """What is known now; nothing before the first step."""
        line, now = self._line, self._clock()
        if line is None or self._seconds is None:
            return []
        step = line["step"]
        done = step / self._num_steps
        cells = round(done * BAR_CELLS)
        progress: list[Item] = [
            ("step", f"{step:,} / {self._num_steps:,}"), ("", f"{done:.1%}"),
            ("", "#" * cells + "." * (BAR_CELLS - cells)),
            ("left", span(self._left(line) * self._seconds, ENGLISH)) if step < self._num_steps else ("", "done"),
        ]  # fmt: skip
        figures: list[Item] = [
            ("loss", _number(line["loss"], ".4f")), ("lr", _number(line["lr"], ".3e")),
            ("grad norm", _number(line["grad_norm"], ".3f")),
            ("tokens/s", _number(line["tokens_per_second"], ",.0f")),
        ]  # fmt: skip
        if line.get("mfu") is not None:
            figures.append(("MFU", f"{line['mfu']:.1%}"))
        if line.get("memory_bytes"):
            figures.append(("memory", f"{line['memory_bytes'] / 2**30:.2f} GiB"))
        if line.get("skipped"):
            figures.append(("", "skipped"))
        rows = [progress, figures]
        if len(self._sources) > 1:  # that of a single one is the loss
            rows.append(list(self._sources.items()))
        if self._valid:
            rows.append([("valid", ""), *self._valid.items()])
        if self._saved is not None:
            rows.append(
                [("checkpoint", f"step {self._saved[0]:,}"), ("", f"{span(now - self._saved[1], ENGLISH)} ago")]
            )
        return rows


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None or not math.isfinite(value) else format(value, form)
