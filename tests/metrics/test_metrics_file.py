"""metrics.jsonl never blocks a run: what is damaged in it is kept aside, and said."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from megatron_hammer.metrics.metrics_file import MetricsFile, read_lines

LINES = [b'{"step": %d, "loss": 1.5}' % step for step in range(8, 15)]


def write(path: Path, lines: list[bytes]) -> bytes:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path.read_bytes()


def test_numbers_are_exact(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    values = {"step": 1, "a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": None, "e": True, "f": 1 / 3}
    file.write(values)
    file.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "a": 0.1 + 0.2, "b": None, "c": None, "d": None, "e": True, "f": 1 / 3}


def test_later_steps_and_a_torn_line_go_without_a_word(tmp_path: Path) -> None:
    path, told = tmp_path / "metrics.jsonl", list[str]()
    write(path, LINES)
    with path.open("ab") as file:
        file.write(b'{"step": 15, "lo')
    MetricsFile(path, 12, told.append).close()
    assert path.read_bytes().splitlines() == LINES[:5] and told == []
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("bad", [
    b"garbage", b"\0" * 40, b"[]", b"3", b'{"stap": 10}', b'{"step": "10"}', b'{"step": 92}', b'{"step": 2}',
    b'{"step": -1}', b'{"step": true}', b"[" * 100_000, b"\xff\xfe", b'{"step": NaN}',
    b'{"step": 1' + b"0" * 5000 + b"}",
])  # fmt: skip
def test_a_damaged_line_is_kept_aside_and_costs_no_other(tmp_path: Path, bad: bytes) -> None:
    path, told = tmp_path / "metrics.jsonl", list[str]()
    before = write(path, [*LINES[:2], bad, *LINES[3:]])
    MetricsFile(path, 13, told.append).close()
    assert path.read_bytes().splitlines() == LINES[:2] + LINES[3:6]
    (aside,) = tmp_path.glob("metrics.jsonl.aside-*")
    assert aside.read_bytes() == before
    assert len(told) == 1 and "the first is line 3" in told[0] and aside.name in told[0]


def no_links(*paths: Path) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("links", [True, False])
def test_a_hole_of_a_hundred_gigabytes_is_one_damaged_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Its first bytes alone are read; kept aside by a second name, without which it would have to be copied."""
    path, told = tmp_path / "metrics.jsonl", list[str]()
    write(path, LINES[:3])
    os.truncate(path, 10**11 if links else 10**7)
    with path.open("ab") as file:
        file.write(b"\n" + b"\n".join(LINES[3:]) + b"\n")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    MetricsFile(path, 13, told.append).close()
    assert path.read_bytes().splitlines() == LINES[:6]
    (aside,) = tmp_path.glob("metrics.jsonl.aside-*")
    assert aside.stat().st_size > 10**7 and len(told) == 1 and "the first is line 4" in told[0]


@pytest.mark.parametrize("make", ["folder", "pipe", "link"])
def test_what_is_no_file_is_kept_aside(tmp_path: Path, make: str) -> None:
    path, told, other = tmp_path / "metrics.jsonl", list[str](), tmp_path / "other"
    content = write(other, LINES)
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(other)}[make]()
    MetricsFile(path, 13, told.append).close()
    assert path.read_bytes() == b"" and path.is_file() and not path.is_symlink()
    assert len(told) == 1 and "kept as metrics.jsonl.aside-" in told[0] and other.read_bytes() == content


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "metrics.jsonl").last_step == 0
