"""What a run writes down about a step."""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.incident_file import write_down


def test_it_names_files_of_any_bytes_and_says_why_it_is_not_there(tmp_path: Path) -> None:
    path, ctx = tmp_path / "incidents" / "step-00000001.json", ParallelContext.single()
    assert write_down(path, {"file": os.fsdecode(b"a\xff"), "other": "字"}, ctx) == str(path)
    assert orjson.loads(path.read_bytes()) == {"file": "a\\udcff", "other": "字"}
    below = path / "below"
    assert write_down(below, {}, ctx) == f"{below}, which could not be written (File exists)"
