"""The recompute benchmark works; what it measures is no business of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "recompute.py"


def test_recompute_prints_a_row_for_each_variant() -> None:
    arguments = ["--sizes", "quick", "--rounds", "1", "--steps", "1", "--precisions", "fp32"]
    arguments += ["--variants", "none", "selective", "full"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| quick")]
    assert [row[3].strip() for row in rows] == ["none", "selective", "full"]
    kept = [int(row[4]) for row in rows]
    assert kept == sorted(kept, reverse=True) and kept[0] > 1.5 * kept[1] > 10 * kept[2] > 0
