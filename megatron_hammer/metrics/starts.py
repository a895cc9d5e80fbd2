"""OUT/starts.jsonl: one line for each start of a run: when, after which step, where it computes, its settings.

It only grows: a run that goes on, elsewhere or with other settings, adds its line. Reports read it (``report/``), no
training does. Needs no torch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.metrics.metrics_file import append_line

STARTS = "starts.jsonl"
MAX_STARTS_BYTES = 64 * 2**20


def last_start(output: Path) -> dict[str, Any] | None:
    """The newest line of a run; None where there is none that can be read."""
    try:
        lines = read_regular(output / STARTS, MAX_STARTS_BYTES, follow=False).splitlines()
        start = parse_json(lines[-1])
    except (OSError, ValueError, IndexError):
        return None
    return start if isinstance(start, dict) and isinstance(start.get("environment"), dict) else None


def note_start(output: Path, step: int, environment: dict[str, Any], config: Config) -> None:
    """Add a line.

    Args:
        step: the last that is done.
        environment: see ``trackers.environment_of``.

    Raises:
        OSError: the disk refuses.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(output / STARTS, {"step": step, "time": time, "environment": environment,
                                  "config": config_to_tree(config)})  # fmt: skip
