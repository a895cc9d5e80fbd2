"""What a tracker's client gets: a description of the run before its first step, then a line a step. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Line = Mapping[str, float | bool | str | None]
"""A step as metrics.jsonl has it, without its number."""


@dataclass(frozen=True)
class TrackedRun:
    """The run, as a client gets it before its first step."""

    folder: str
    """Where the client keeps its files: OUT/trackers."""
    project: str
    name: str
    offline: bool
    """Write files only. Otherwise the client's own environment variables decide (WANDB_MODE and so on)."""
    resumed: bool
    """Goes on from a checkpoint; otherwise an id that an earlier run left is not taken up."""
    config: dict[str, Any]
    environment: dict[str, Any]
    """Versions, device, ranks: at the present start."""

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
