"""The benchmark programs work; what they measure is no business of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_the_gpu_suite_runs_at_toy_size(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_suite.py", "--small", "--results", tmp_path],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    results = {r["part"]: r for r in (json.loads(p.read_text()) for p in tmp_path.glob("*.json"))}
    assert set(results) == {"tests", "step"}
    assert results["tests"]["exit_code"] in (0, 5)
    assert results["step"]["steps"][0]["tokens_per_second"] > 0


def test_document_masks_are_measured_at_toy_size() -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "document_mask.py", "--seq-lengths", "48", "--steps", "1"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert line["causal_ms"] > 0 and line["documents_of_100"]["ms"] > 0
