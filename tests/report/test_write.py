"""The program: the page on the disk, the pictures, refreshing while a run lives, and what it refuses."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from megatron_hammer.base.cli import end_of
from megatron_hammer.metrics.metrics_file import append_line
from megatron_hammer.report.write import continue_prompts, write_page
from tests.page_blocks import blocks_of
from tests.report.conftest import lines_of
from tests.train.runs import ROOT


def call(*words: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    spec = importlib.util.spec_from_file_location("report_tool", ROOT / "tools" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return end_of(module.main)


def test_the_program(
    run: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, pictures = tmp_path / "新" / "两个.html", tmp_path / "pictures"
    assert call(run, other, "--output", page, "--language", "zh", monkeypatch=monkeypatch) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{page}: 运行 <一> & to step 200, other to step 200, ") and "the page says what" in said
    assert page.read_bytes().startswith(b"<!DOCTYPE html>")
    few = tmp_path / "少"
    few.mkdir()
    (few / "metrics.jsonl").write_text('{"step": 7, "loss": 2.0, "valid/金/loss": 1.5}\n')
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert call(few, "--pictures", pictures, monkeypatch=monkeypatch) == 0
    assert "训练报告：少" in (few / "report.html").read_text(encoding="utf-8"), "the language of the system"
    assert sorted(path.name for path in pictures.iterdir()) == ["loss.png", "valid.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())
    capsys.readouterr()
    refused = {
        (tmp_path,): "error[E380]",
        (run, tmp_path / "none"): "error[E380]",
        (run, "--output", tmp_path): "is a folder",
        (run, "--output", tmp_path / "a.pdf"): "write " + str(tmp_path / "a.html"),
        (run, "--refresh", "0"): "write --refresh 30",
        (run, "--refresh", "nan"): "write --refresh 30",
    }
    for words, told in refused.items():
        assert call(*words, monkeypatch=monkeypatch) in (2, 3)
        assert told in capsys.readouterr().err


def test_the_commands_of_the_page(run: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its twin are the same (tests/test_pages_in_chinese.py)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    for name, made in (("mine", run), ("other", other)):
        shutil.copytree(made, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "metrics.jsonl", (0, 0))  # of a run that has ended long ago
        (tmp_path / "runs" / name / ".lock").touch()  # which no process holds
    (block,) = blocks_of((ROOT / "docs" / "report.md").read_text(encoding="utf-8"))
    asked = list[str]()
    monkeypatch.setattr(
        "megatron_hammer.report.write.continue_prompts", lambda folder, prompts, tokens: asked.extend(prompts)
    )
    for line in block.splitlines():
        assert call(*shlex.split(line, comments=True)[2:], monkeypatch=monkeypatch) == 0, line
    assert asked == ["The weather", "今天"] and "训练报告" not in Path("runs/mine/report.html").read_text()
    assert Path("compared.html").is_file() and Path("pictures/loss.png").is_file()


@pytest.mark.parametrize("has_font", [True, False])
def test_pictures_have_the_language_of_the_page_where_a_font_has_it(
    has_font: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 2.0}\n')
    drawn = list[str]()
    monkeypatch.setattr("megatron_hammer.base.pictures.can_draw", lambda text: has_font)
    monkeypatch.setattr(
        "megatron_hammer.report.write.draw",
        lambda charts, folder, source, say: drawn.extend([charts[0].title, say("step", "步")]),
    )
    write_page([tmp_path], tmp_path / "page.html", "zh", tmp_path / "pictures")
    assert drawn == (["训练损失（nats/token）", "步"] if has_font else ["Training loss (nats per token)", "step"])
    assert ("pictures are in English" in capsys.readouterr().err) == (not has_font)


def test_a_living_run_is_followed_to_its_end(tmp_path: Path) -> None:
    """Its metrics grow between two versions; the last one does not load itself again."""
    run, page, steps = tmp_path / "run", tmp_path / "report.html", list[int]()
    run.mkdir()
    lines = [json.dumps(line) + "\n" for line in lines_of(9)]
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    start = {"step": 0, "environment": {"host": platform.node()}}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def sleep(seconds: float) -> None:
            assert seconds == 5.0 and '"refresh":5.0' in page.read_text() and "running" in page.read_text()
            with (run / "metrics.jsonl").open("a") as file:
                file.writelines(lines[len(steps) * 3 : len(steps) * 3 + 3])
            if len(steps) == 3:
                fcntl.flock(lock, fcntl.LOCK_UN)

        write_page([run], page, refresh=5.0, sleep=sleep, written=lambda runs: steps.append(runs[0].metrics.last_step))
    assert steps == [3, 6, 9, 9] and '"refresh":null' in page.read_text() and "not running" in page.read_text()


def test_checkpoints_continue_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them once, what was there before stays, and the page has the texts."""
    run, asked = tmp_path / "run", list[object]()
    for step in (2, 4):
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 4, "loss": 2.0}\n')
    (run / "generations.jsonl").write_text('{"step": 2, "prompt": "a", "text": "旧的"}\n{torn')

    def write(checkpoint: Path, step: int, prompts: list[str], output: Path, new_tokens: int, device: str) -> None:
        assert checkpoint == run / "checkpoints" / f"step-{step:08d}" and (new_tokens, device) == (4, "auto")
        asked.append((step, prompts))
        for prompt in prompts:
            append_line(output / "generations.jsonl", {"step": step, "prompt": prompt, "text": f"新 {step} <b>"})

    monkeypatch.setattr("megatron_hammer.report.write.write_generations", write)
    for prompts in (["清晨的"], ["清晨的", "a", "a"]):
        continue_prompts(run, prompts, 4)
    assert asked == [(2, ["清晨的"]), (4, ["清晨的"]), (4, ["a"])]
    write_page([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "旧的" in page and page.count("新 4 &lt;b&gt;</pre>") == 2 and page.count("<summary dir") == 2
