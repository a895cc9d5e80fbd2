"""What a rank reports of its steps, in memory and in files.

Every tensor is kept in *pieces*, rectangles of logical tensors (``model/parameters.py``), so that ranks of any layout
can be held against whole tensors. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.reading import open_regular, parse_json, read_regular
from megatron_hammer.parallel.placement import Range

INITIAL = "initial "
"""Before a kind of piece: before the first step."""
FIRST = "step-1 "
"""Before a kind of piece: after the first step."""


@dataclass(frozen=True)
class TensorPiece:
    """Part of a logical tensor as one rank has it."""

    kind: str
    tensor: str
    """Name of the logical tensor."""
    rows: Range
    cols: Range | None
    """None for a vector."""
    values: np.ndarray

    @property
    def place(self) -> tuple[slice, ...]:
        """Where the piece lies in the logical tensor."""
        return tuple(slice(*r) for r in (self.rows, self.cols) if r is not None)


@dataclass(frozen=True)
class Forward:
    """What came out of the forward of a step."""

    tokens: np.ndarray
    """These four as in ``Outcome``, there of a forward alone before the first step."""
    token_losses: np.ndarray
    point_tokens: np.ndarray
    points: dict[str, np.ndarray]

    @property
    def is_whole(self) -> bool:
        """Whether each token went through each part once, as far as numbers tell."""
        same = (len(found) == len(self.point_tokens) for found in self.points.values())
        return len(self.tokens) == len(self.token_losses) and all(same)


@dataclass(frozen=True)
class Outcome:
    """What one rank reports of its two steps in one precision."""

    losses: list[float]
    norms: list[float]
    pieces: list[TensorPiece]
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Which tokens of the first step's global batch, [samples s] one sample after the other, this rank computes."""
    token_losses: np.ndarray = field(default_factory=lambda: np.empty(0))
    """Their losses before the step, one for each of ``tokens``."""
    source_losses: list[list[float]] = field(default_factory=list)
    """Of each step, the mean loss of the samples of each source."""
    points: dict[str, np.ndarray] = field(default_factory=dict)
    """After each part of the model that this rank has, two numbers for each of ``point_tokens`` (``points.py``)."""
    point_tokens: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """Which tokens this rank has between the parts, counted as ``tokens``."""
    refused: str = ""
    """Why no checkpoint could be written."""
    in_steps: list[Forward] = field(default_factory=list)
    """Of each step, in fp64 alone."""

    def of_step(self, step: int) -> Outcome:
        """The same with the forward of a step in the place of that before the first one."""
        return replace(self, **vars(self.in_steps[step - 1]))


ARRAYS, NUMBERS = ("tokens", "token_losses", "point_tokens"), ("losses", "norms", "source_losses", "refused")


def write_outcome(prefix: Path, outcome: Outcome) -> None:
    """Write an outcome as a JSON file and one of arrays."""
    names = [[p.kind, p.tensor, p.rows, p.cols] for p in outcome.pieces]
    values = [p.values for p in outcome.pieces]
    in_steps = [f"step {step} " for step in range(1, len(outcome.in_steps) + 1)]
    arrays: dict[str, Any] = {}
    forwards: list[Outcome | Forward] = [outcome, *outcome.in_steps]
    for of, forward in zip(("", *in_steps), forwards, strict=True):
        arrays |= {of + name: getattr(forward, name) for name in ARRAYS}
        arrays |= {f"{of}point {name}": found for name, found in forward.points.items()}
    np.savez(f"{prefix}.npz", *values, **arrays)
    text = json.dumps({name: getattr(outcome, name) for name in NUMBERS} | {"pieces": names, "in_steps": in_steps})
    Path(f"{prefix}.json").write_text(text, encoding="utf-8")


def read_outcome(prefix: Path) -> Outcome:
    """Read what ``write_outcome`` has written."""
    head = parse_json(read_regular(f"{prefix}.json"))
    with open_regular(f"{prefix}.npz") as file, np.load(file, allow_pickle=False) as arrays:
        values = [arrays[f"arr_{i}"] for i in range(len(head["pieces"]))]
        before, *of_steps = (_forward(arrays, prefix) for prefix in ("", *head["in_steps"]))
    pieces = [
        TensorPiece(kind, tensor, (rows[0], rows[1]), None if cols is None else (cols[0], cols[1]), array)
        for (kind, tensor, rows, cols), array in zip(head["pieces"], values, strict=True)
    ]
    return Outcome(pieces=pieces, in_steps=of_steps, **vars(before), **{name: head[name] for name in NUMBERS})


def _forward(arrays: Mapping[str, np.ndarray], prefix: str) -> Forward:
    begin = f"{prefix}point "
    points = {name.removeprefix(begin): arrays[name] for name in arrays if name.startswith(begin)}
    return Forward(points=points, **{name: arrays[prefix + name] for name in ARRAYS})
