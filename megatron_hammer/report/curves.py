"""Reads metrics.jsonl once and thins it to curves that fit on a page, however long the run is.

::

    metrics.jsonl --MetricsReader--> one array a figure --thinned--> stretches: step, mean, lowest, highest

A line that cannot be read (half written, damaged, longer than a run writes) is left out and counted; so is one whose
step is out of order, by the rule by which a resumed run reads the file (``metrics/metrics_file.py``). A reader
continues where it stopped, so that the page of a run in progress is renewed without reading a long file again. The
lowest and the highest value of each stretch of steps are kept: a spike of one step shows in a run of a million. Needs
no torch.
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.reading import open_regular, parse_json
from megatron_hammer.metrics.metrics_file import MAX_LINE_BYTES, longest_rising, split_key

SINGLE = ("loss", "grad_norm", "lr", "tokens_per_second", "mfu", "mfu_causal", "memory_bytes", "consumed_tokens",
          "consumed_samples")  # fmt: skip
MOST_NAMES = 48
"""Sources, validation sets and evaluations, of each: more cannot be told apart on a page."""
MOST_POINTS = 24_000
"""On the page, for each run: some 600 KB. They are divided among its curves."""
LEAST_POINTS, MOST_OF_A_CURVE = 200, 1_500  # chosen by eye: a chart is some 1,400 pixels wide
_KINDS = ("valid", "source", "evaluation")


@dataclass
class RunCurve:
    """One figure of a run over its lines: those that have it."""

    lines: array[int] = field(default_factory=lambda: array("q"))
    """Their places among the lines."""
    values: array[float] = field(default_factory=lambda: array("f"))


@dataclass(frozen=True)
class Thinned:
    """A curve in stretches of steps; of a single step, lowest and highest are the mean."""

    steps: list[int]
    """The last step of each stretch that has a value."""
    mean: list[float]
    low: list[float]
    high: list[float]

    @property
    def is_whole(self) -> bool:
        """Whether every stretch is one step."""
        return self.low == self.high


class MetricsReader:
    """The lines of a run, as far as they have been written; ``read`` may be called again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.steps = array("q")
        """Of each line that could be read."""
        self.curves: dict[str, RunCurve] = {}
        self.last: dict[str, Any] = {}
        """The last value of everything that the lines have; sources keep what they had in an earlier one."""
        self.skipped: list[int] = []
        """Steps whose update was held back."""
        self.damaged = 0
        """Lines that could not be read."""
        self.left_out: set[str] = set()
        """Names beyond ``MOST_NAMES``."""
        self._names: dict[str, set[str]] = {kind: set() for kind in _KINDS}
        self._at, self._file = 0, (0, 0)
        self._good: np.ndarray | None = None

    def read(self, advance: Callable[[int], None] = lambda count: None) -> None:
        """Read what has come since; all of it where the file has been replaced.

        Args:
            advance: called with the number of bytes that were read.

        Raises:
            OSError: it cannot be read.
        """
        with open_regular(self.path, follow=False) as file:
            found = os.fstat(file.fileno())
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._at:
                self._begin()
                self._file = found.st_dev, found.st_ino
            file.seek(self._at)
            too_long = False
            while line := file.readline(MAX_LINE_BYTES):
                whole = line.endswith(b"\n")
                if not whole and len(line) < MAX_LINE_BYTES:
                    break  # half written: it is whole when the file is read again
                if whole and not too_long:
                    self._take(line)
                elif whole:
                    self.damaged += 1
                too_long = not whole
                self._at += len(line)
                advance(len(line))
        self._good = None

    def _take(self, line: bytes) -> None:
        try:
            values = parse_json(line)
        except ValueError:
            self.damaged += 1
            return
        step = values.get("step") if isinstance(values, dict) else None
        if type(step) is not int or not 0 < step < 2**53:
            self.damaged += 1
            return
        place = len(self.steps)
        self.steps.append(step)
        if values.get("skipped") is True:
            self.skipped.append(step)
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and self._is_drawn(key):
                try:
                    number = float(value)
                except OverflowError:
                    continue
                curve = self.curves.setdefault(key, RunCurve())
                curve.lines.append(place)
                curve.values.append(number)
                self.last[key] = value
            elif value is None and key in SINGLE:
                self.last[key] = None

    def _is_drawn(self, key: str) -> bool:
        if key in SINGLE or key in self.curves:
            return True
        kind, name, figure = split_key(key)
        if kind not in self._names or not figure:
            return False
        if kind == "evaluation":  # where a figure of a user's own program has any name
            name = key.removeprefix("evaluation/")
        known = self._names[kind]
        if name not in known and len(known) >= MOST_NAMES:
            self.left_out.add(f"{kind}/{name}")
            return False
        known.add(name)
        return True

    def _rising(self) -> np.ndarray:
        """Whether each line stands in order."""
        if self._good is None:
            steps = np.frombuffer(self.steps, np.int64) if self.steps else np.zeros(0, np.int64)
            self._good = np.ones(len(steps), bool)
            if len(steps) and not bool((np.diff(steps) > 0).all()):
                self._good[:] = False
                self._good[sorted(longest_rising(steps.tolist()))] = True
        return self._good

    @property
    def bytes_read(self) -> int:
        """Bytes of the file that have been read so far."""
        return self._at

    @property
    def out_of_order(self) -> int:
        """Lines whose step was not in order."""
        return int((~self._rising()).sum())

    @property
    def last_step(self) -> int:
        """The last step of the lines in order; 0 without any."""
        good = np.flatnonzero(self._rising())
        return int(self.steps[good[-1]]) if len(good) else 0

    def values(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one figure, of the lines in order."""
        curve = self.curves.get(key)
        if curve is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        places = np.array(curve.lines, np.int64)
        good = self._rising()[places]
        return np.array(self.steps, np.int64)[places[good]], np.array(curve.values, np.float32)[good]

    def points_of_a_curve(self) -> int:
        """How many points each curve may have."""
        return min(MOST_OF_A_CURVE, max(LEAST_POINTS, MOST_POINTS // max(1, len(self.curves))))


def thin(steps: np.ndarray, values: np.ndarray, most: int) -> Thinned:
    """A curve in at most so many stretches of equally many steps; what is not finite is left out."""
    known = np.isfinite(values)
    steps, values = steps[known], values[known].astype(np.float64)
    if len(steps) == 0:
        return Thinned([], [], [], [])
    if len(steps) <= most:
        numbers = [_short(value) for value in values.tolist()]
        return Thinned(steps.tolist(), numbers, numbers, numbers)
    width = -(-int(steps[-1] - steps[0] + 1) // most)
    stretch = (steps - steps[0]) // width
    starts = np.flatnonzero(np.diff(stretch, prepend=-1))
    counts = np.diff(starts, append=len(steps))
    parts = (np.add.reduceat(values, starts) / counts, np.minimum.reduceat(values, starts),
             np.maximum.reduceat(values, starts))  # fmt: skip
    mean, low, high = ([_short(value) for value in part.tolist()] for part in parts)
    return Thinned(steps[starts + counts - 1].tolist(), mean, low, high)


def _short(value: float) -> float:
    """Six digits: what a picture can show."""
    return 0.0 if value == 0 or not math.isfinite(value) else float(f"{value:.6g}")
