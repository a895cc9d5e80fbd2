"""The program that looks into checkpoints: a table, a description, and damage found byte by byte with exit code 4."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.checkpoint.layouts import FakeTokenizer, random_logical, tiny_model, write_layout

TOOL = Path(__file__).parent.parent.parent / "tools" / "inspect_checkpoint.py"
MODEL = tiny_model(hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, num_query_groups=1, vocab_size=33)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20):
        write_layout(tmp_path / "checkpoints", MODEL, random_logical(MODEL), 2, 1, step=step, tokenizer=FakeTokenizer())
    return tmp_path


def inspect(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect_checkpoint.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


def test_a_run_is_listed_and_a_broken_manifest_named(run, monkeypatch, capsys):
    (run / "checkpoints" / "step-00000020" / "manifest.json").write_text("{}")
    assert inspect(monkeypatch, "list", run) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["checkpoint", "ranks"]
    assert first.split()[0] == "step-00000010" and "2 (tp 2)" in first
    assert second.split()[0] == "step-00000020" and "error[E403]" in second
    assert inspect(monkeypatch, "list", run / "checkpoints" / "step-00000010") == 4
    assert "error[E401]" in capsys.readouterr().err


def test_a_checkpoint_is_described(run, monkeypatch, capsys):
    assert inspect(monkeypatch, "show", run) == 0
    text = capsys.readouterr().out
    assert "step 20" in text and "tp 2" in text and "vocab_size=33" in text and "33 x 8" in text
    assert "lm_head.weight" in text and "exp_avg_sq" in text


def test_every_byte_is_verified(run, monkeypatch, capsys):
    checkpoints = sorted((run / "checkpoints").iterdir())
    assert inspect(monkeypatch, "verify", *checkpoints) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(map(str, checkpoints))
    damaged = checkpoints[0] / "rank-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert inspect(monkeypatch, "verify", *checkpoints) == 4
    printed = capsys.readouterr()
    assert "error[E411]" in printed.err and str(damaged) in printed.err
    assert [line.split(":")[0] for line in printed.out.splitlines()] == [str(checkpoints[1])], "the others are read"
    (checkpoints[1] / "tokenizer" / "more").write_text("")
    assert inspect(monkeypatch, "verify", run) == 4
    assert "error[E415]" in capsys.readouterr().err
