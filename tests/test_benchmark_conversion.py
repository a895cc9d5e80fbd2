"""The conversion benchmark works; what it measures is no business of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_table_is_there_at_toy_size(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "conversion.py"), "--small", "--rounds", "1", "--proof"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=400, env=environment
    )
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    conversions = [row for row in rows if row[1:2] in (["page cache"], ["disk"])]
    assert len(conversions) == 6 and all("%" in row[4] and float(row[2].split()[0]) >= 0 for row in conversions)
    assert all("**" in row[9] for row in conversions[:4]), "each beside its peer"
    assert "bit-equal to the first folder, on both sides: yes" in done.stdout and "With its proof" in done.stdout
    starts = {row[0]: row[2] for row in rows if row[0].split()[0].endswith(".py")}
    assert {f"{tool.name} --help" for tool in (ROOT / "tools").glob("*.py")} < set(starts)
    assert "preprocess_data.py" in starts
    heavy = {
        command: modules for command, modules in starts.items() if {"torch", "transformers"} & set(modules.split())
    }
    assert not heavy, "none of these has use for torch"
    assert not list(tmp_path.iterdir()), "the scratch folder is gone"
