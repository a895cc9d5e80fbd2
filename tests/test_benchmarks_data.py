"""The programs that measure the data engine work; what they measure is no business of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "data.py"


@pytest.mark.parametrize(
    ("arguments", "figures"),
    [
        ("index --prefix d --documents 2000", {"sha1", "open_seconds", "own_order_seconds"}),
        ("blend --samples 70000", {"own_rule_prefix_error", "first_far_sample_kept_seconds"}),
        ("read --prefix d --documents 2000 --samples 64", {"independent_batches_a_second"}),
        ("write --documents 5000 --folder .", {"sha1", "sync_seconds"}),
        ("merge --documents 5000 --folder .", {"sha1", "sync_seconds"}),
    ],
)  # fmt: skip
def test_every_part_runs_at_toy_size(tmp_path: Path, arguments: str, figures: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments.split(), "--rounds", "2", "--without-peer", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["part"] == arguments.split()[0] and result["machine"]["cores"] >= 1
    assert figures | {"seconds", "runs"} <= set(result["ours"]) and len(result["ours"]["runs"]) == 2
