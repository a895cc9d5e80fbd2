"""Whether a run is alive: by its lock on its own machine, by its last line on another."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from megatron_hammer.report.gather import FRESH_SECONDS, gather_runs, open_metrics


def test_a_lock_of_another_machine_does_not_show_here(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 7, "loss": 2.0}\n')
    (tmp_path / ".lock").write_text("")
    found = []
    for host in (platform.node(), "another"):
        for age in (0.0, 2 * FRESH_SECONDS):
            start = {"step": 0, "environment": {"host": host}}
            (tmp_path / "starts.jsonl").write_text(json.dumps(start) + "\n")
            os.utime(metrics, (os.stat(metrics).st_atime, os.stat(tmp_path).st_mtime - age))
            found.append(gather_runs(tmp_path, open_metrics(tmp_path)).is_alive)
    assert found == [False, False, None, False]
