"""Plain progress lines: what they say, and when."""

from __future__ import annotations

import pytest

from megatron_hammer.base import progress
from megatron_hammer.base.progress import Activity, Progress, size_of, track


def test_bytes_are_shown_in_a_unit_that_says_something() -> None:
    assert [size_of(count) for count in (0, 999, 1000, 45_678, 7 * 10**6, 1_234 * 10**9)] == [
        "0 bytes", "999 bytes", "1.00 KB", "45.68 KB", "7.00 MB", "1,234.00 GB",
    ]  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_bytes(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("reading", 4_000_000_000) as shown:
        clock[0] += 4
        shown.advance(1_000_000_000)
        assert capsys.readouterr().err == "", "quick work says nothing"
        clock[0] += 6
        shown.advance(1_000_000_000)
        shown.advance(0)
    assert capsys.readouterr().err == "reading: 2.00 GB of 4.00 (50%), 200 MB/s, 10 s left\n"


def test_lines_of_other_units_and_work_done_before(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("writing", 100, "tensors", done=20, note=lambda: "3 tokens/s") as shown:
        shown.pass_over(20)
        clock[0] += 10
        shown.advance(10)
    assert capsys.readouterr().err == "writing: 50 of 100 tensors (50%), 3 tokens/s, 50 s left\n"


def test_track_counts_what_was_used(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in track(range(3), "comparing", None, "texts"):
        clock[0] += 6
    assert capsys.readouterr().err == "comparing: 1 texts\ncomparing: 3 texts\n"


def test_an_activity_says_what_takes_long(clock: list[float]) -> None:
    said: list[str] = []
    activity = Activity("reading", said.append)
    for seconds in (104, 106, 107, 117):
        activity.show(seconds)
    assert said == ["reading: 6 s so far", "reading: 17 s so far"]
    clock[0] = 120
    activity("comparing")
    activity.show(124)
    activity.begin("drawing")
    activity.show(128)
    assert said[2:] == ["comparing", "drawing: 8 s so far"]


def test_the_end_of_a_bar_is_drawn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """However small its last part is, and however soon it comes."""
    monkeypatch.setattr(progress, "can_redraw", lambda stream: True)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    with Progress("reading", 1_000) as shown:
        for part in (600, 395, 5):
            shown.advance(part)
    drawn = capsys.readouterr().err
    assert "100%" in drawn and "1.00k/1.00k" in drawn
