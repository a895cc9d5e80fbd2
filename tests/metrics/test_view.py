"""What a run shows on a terminal, and that a log has lines alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_hammer.base.language import sayer, span
from megatron_hammer.metrics.reporter import Reporter
from megatron_hammer.metrics.view import RunView
from tests.base.test_terminal import Screen, terminal
from tests.model.tiny import tiny_config

LINE: dict[str, Any] = {"step": 3, "loss": 2.5, "grad_norm": 1.0, "lr": 1e-3, "tokens_per_second": 9000.0,
                        "skipped": False, "source/zh/loss": 2.0, "source/en/loss": 3.0}  # fmt: skip


def test_rows() -> None:
    time = [0.0]
    longer = RunView(10, 2, lambda: time[0], lambda line: 8 * 7)  # the rest has eight times the tokens
    view = RunView(10, 2, lambda: time[0])
    time[0] = 61.0
    longer.take(LINE)
    assert ("left", "56 min") in longer.rows()[0]
    assert view.rows() == []
    view.take(LINE | {"mfu": 0.41, "memory_bytes": 3 * 2**29, "valid/x/loss": None})
    rows = view.rows()
    flat = [item for row in rows for item in row]
    assert flat[:2] == [("step", "3 / 10"), ("", "30.0%")] and ("left", "7 min") in flat and ("", "1 min ago") in flat
    assert {("loss", "2.5000"), ("MFU", "41.0%"), ("memory", "1.50 GiB"), ("zh", "2.0000"), ("x", "nan")} <= set(flat)
    view.saved(3)
    view.take({"step": 10, "loss": float("nan")} | {key: value for key, value in LINE.items() if "zh" not in key
                                                     and key not in ("step", "loss")})  # fmt: skip
    later = view.rows()
    assert ("checkpoint", "step 3") in later[-1] and ("", "done") in later[0] and ("loss", "nan") in later[1]
    assert ("zh", "2.0000") in later[2], "a source that gave nothing keeps its last value"
    times, english = (5, 65, 7300, 1e5, float("inf")), sayer("en")
    assert [span(s, english) for s in times] == ["5 s", "1 min", "2 h 1 min", "1 d 3 h", "years"]
    assert [span(s, sayer("zh")) for s in times[1:4]] == ["1 分", "2 小时 1 分", "1 天 3 小时"]


@pytest.mark.parametrize("name", ["xterm", "dumb"])
def test_a_run_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A failing run's last words stand below the view; a dumb terminal gets the lines of a log."""
    monkeypatch.setenv("TERM", name)
    config = tiny_config(
        train__output=str(tmp_path), train__num_steps=10, log__tensorboard=False, log__interval_steps=1
    )
    with terminal(60) as screen:
        monkeypatch.setattr(sys, "stderr", screen.stream)
        monkeypatch.setattr(sys, "stdout", screen.stream)
        with pytest.raises(ValueError), Reporter(config, 0, (1.0, 1.0), None, 1) as reporter:
            for step in (1, 2, 3):
                reporter.step({**LINE, "step": step}, {"valid/x/loss": 2.0, "valid/x/bits_per_byte": None}
                              if step == 2 else {})  # fmt: skip
            reporter.saved(3)
            reporter.warn("warning: a tracker is late")
            raise ValueError
        print("error[E902]: it failed", file=sys.stderr)
        shown = Screen(60)
        shown.feed(screen.received())
    assert shown.lines[-2] == "error[E902]: it failed"
    lines = [line for line in shown.lines if line.startswith("step ") and "perplexity" in line]
    if name == "dumb":
        assert [line[:9] for line in lines] == ["step 1/10", "step 2/10", "step 3/10"] and "zh 2.0000" not in str(
            shown.lines
        )
    else:
        assert [line[:9] for line in lines] == ["step 2/10"], "what the view says is not printed besides"
        view = "\n".join(shown.lines[shown.lines.index("warning: a tracker is late") + 1 : -2])
        assert (
            "step 3 / 10" in view
            and "zh 2.0000" in view
            and "lr 1.000e-03" in view
            and "x 2.0000" in view
            and "checkpoint step 3" in view
        )


def test_lines_go_to_a_log_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Standard output in a file and a terminal for standard error: both get their own."""
    monkeypatch.setenv("TERM", "xterm")
    config = tiny_config(
        train__output=str(tmp_path), train__num_steps=10, log__tensorboard=False, log__interval_steps=1
    )
    with terminal(60) as screen:
        monkeypatch.setattr(sys, "stderr", screen.stream)
        with Reporter(config, 0, (1.0, 1.0), None, 1) as reporter:
            reporter.step({**LINE, "step": 1}, {})
        assert "loss" in screen.received()
    assert capsys.readouterr().out.startswith("step 1/10 | loss 2.5000 | perplexity 12.18 | grad norm 1.000")
