"""OUT/starts.jsonl: one line for each start of a run: when, after which step, where it computes, its settings.

It only grows: a run that goes on, elsewhere or with other settings, adds its line. Reports read it (``report/``), no
training does. Needs no torch.
"""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.base.system import processor_name
from megatron_hammer.base.versions import installed_versions
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.metrics.metrics_file import append_line

STARTS = "starts.jsonl"
MAX_STARTS_BYTES = 64 * 2**20


def environment_of(device: str, ranks: int) -> dict[str, Any]:
    """Where a run computes: versions, machine, device."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "device": device,
        "processor": processor_name(),
        "ranks": ranks,
        "versions": installed_versions(),
    }


def read_starts(output: Path) -> list[dict[str, Any]]:
    """The starts of a run in their order, each with an environment; lines that cannot be read are left out.

    Raises:
        OSError: the file is there and cannot be read; ``UnfitFile`` where it is no regular file or too large.
    """
    try:
        content = read_regular(output / STARTS, MAX_STARTS_BYTES, follow=False)
    except FileNotFoundError:
        return []
    starts = []
    for line in content.split(b"\n"):
        try:
            start = parse_json(line)
        except ValueError:  # torn by a crash, and others may follow
            continue
        if isinstance(start, dict) and isinstance(start.get("environment"), dict):
            starts.append(start)
    return starts


def note_start(output: Path, step: int, environment: dict[str, Any], config: Config) -> None:
    """Add a line.

    Args:
        step: the last that is done.
        environment: as ``environment_of`` gives it.

    Raises:
        OSError: the disk refuses.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(output / STARTS, {"step": step, "time": time, "environment": environment,
                                  "config": config_to_tree(config)})  # fmt: skip
