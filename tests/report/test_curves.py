"""metrics.jsonl as curves: damage costs lines, a long run costs no room, extremes stay."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_hammer.metrics.metrics_file import MAX_LINE_BYTES
from megatron_hammer.report.curves import MOST_NAMES, MOST_OF_A_CURVE, MetricsReader, thin
from tests.report.conftest import STEPS, lines_of


def read(path: Path) -> MetricsReader:
    reader = MetricsReader(path)
    reader.read()
    return reader


def test_damaged_lines_cost_themselves(run: Path) -> None:
    reader = read(run / "metrics.jsonl")
    assert (reader.damaged, reader.out_of_order, reader.last_step) == (4, 1, STEPS)
    steps, values = reader.values("loss")
    assert steps.tolist() == list(range(1, STEPS + 1))
    assert np.allclose(values, [line["loss"] for line in lines_of(STEPS)])
    assert reader.skipped == [61] and reader.last["source/zh/tokens"] == 200 * STEPS
    assert reader.values("valid/金融/loss")[0].tolist() == [50, 100, 150, 200]
    assert reader.values("nothing")[0].tolist() == []


def test_any_bytes_are_read(tmp_path: Path) -> None:
    path, rng = tmp_path / "metrics.jsonl", np.random.default_rng(0)
    good = b"".join(json.dumps(line).encode() + b"\n" for line in lines_of(12))
    for _ in range(60):
        content = bytearray(good)
        for _ in range(rng.integers(1, 8)):
            at = int(rng.integers(len(content)))
            content[at : at + int(rng.integers(0, 40))] = rng.bytes(int(rng.integers(0, 30)))
        path.write_bytes(content)
        reader = read(path)
        for key in reader.curves:
            steps, values = reader.values(key)
            assert (np.diff(steps) > 0).all()
            thinned = thin(steps, values, 7)
            assert len(thinned.steps) <= 7 and json.dumps(vars(thinned), allow_nan=False)
    path.write_bytes(b'{"step": 1, "loss": 1}\n' + b"x" * (2 * MAX_LINE_BYTES) + b'\n{"step": 2, "loss": 1e999}\n')
    reader = read(path)
    assert (reader.damaged, reader.last_step) == (1, 2) and thin(*reader.values("loss"), 5).steps == [1]


def test_what_comes_later_is_read_alone_and_a_new_file_from_its_start(tmp_path: Path) -> None:
    path, lines = tmp_path / "metrics.jsonl", [json.dumps(line) for line in lines_of(6)]
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:20])
    reader, told = read(path), list[int]()
    assert reader.last_step == 3
    path.write_text("\n".join(lines[:5]) + "\n")
    reader.read(told.append)
    assert reader.last_step == 5 and sum(told) == len("\n".join(lines[3:5])) + 1
    new = tmp_path / "new"
    new.write_text(lines[0] + "\n")
    new.replace(path)  # as a run that goes back cuts its file
    reader.read()
    assert reader.last_step == 1 and len(reader.values("loss")[0]) == 1


def test_a_million_steps_keep_their_extremes() -> None:
    steps = np.arange(1, 1_000_001)
    values = np.sin(steps / 1e5).astype(np.float32)
    values[617_283], values[4], values[100:200] = 40.0, -30.0, np.nan
    thinned = thin(steps, values, MOST_OF_A_CURVE)
    assert len(thinned.steps) <= MOST_OF_A_CURVE and max(thinned.high) == 40.0 and min(thinned.low) == -30.0
    assert thinned.steps[-1] == 1_000_000 and not thinned.is_whole
    assert max(abs(np.sin(s / 1e5) - m) for s, m in zip(thinned.steps, thinned.mean)) < 0.1
    assert len(json.dumps(vars(thinned))) < 80_000


def test_names_without_end_are_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 1.0} | {f"source/{i}/loss": 1.0 for i in range(900)}) + "\n")
    reader = read(path)
    assert len(reader.curves) == MOST_NAMES + 1 and len(reader.left_out) == 900 - MOST_NAMES
