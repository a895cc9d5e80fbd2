"""The program that looks into checkpoints: a table, a description, and damage found byte by byte with exit code 4."""

from __future__ import annotations

import re
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
    (run / "checkpoints" / "step-00000020.aside-0123456789abcdef").mkdir()
    assert first.split()[0] == "step-00000010" and "2 (tp 2)" in first
    assert second.split()[0] == "step-00000020" and "error[E403]" in second
    assert inspect(monkeypatch, "list", run) == 0
    assert re.search(r"step-00000020\.aside-0123456789abcdef +- .*kept aside", capsys.readouterr().out)
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


def digest(monkeypatch, capsys, *arguments: object) -> list[str]:
    assert inspect(monkeypatch, "digest", *arguments) == 0
    return [line.split()[-1] for line in capsys.readouterr().out.splitlines()]


def test_the_digest_is_that_of_the_state_and_of_nothing_else(run, tmp_path, monkeypatch, capsys):
    """Equal for every layout; both of its forms can be expected, and another one is refused."""
    at = run / "checkpoints" / "step-00000020"
    whole, strong = digest(monkeypatch, capsys, at, "--sha256")
    assert (len(whole), len(strong)) == (32, 64)
    other = write_layout(tmp_path / "other", MODEL, random_logical(MODEL), 1, 3, step=20).folder
    assert digest(monkeypatch, capsys, other, "--sha256") == [whole, strong]
    assert inspect(monkeypatch, "show", at) == 0
    assert whole in capsys.readouterr().out
    for expected in (whole, whole.upper(), strong):
        assert inspect(monkeypatch, "verify", at, "--expect", expected) == 0
    capsys.readouterr()
    assert inspect(monkeypatch, "verify", run / "checkpoints" / "step-00000010", "--expect", whole) == 4
    assert f"must be of digest {whole}" in capsys.readouterr().err
    assert inspect(monkeypatch, "verify", at, "--expect", "abc") == 2
    assert "error[E203]: --expect=abc" in capsys.readouterr().err


def test_differences_are_named(run, tmp_path, monkeypatch, capsys):
    changed = random_logical(MODEL)
    changed["model.norm.weight", "exp_avg"][3] += 1
    at = run / "checkpoints" / "step-00000020"
    write_layout(tmp_path / "same", MODEL, random_logical(MODEL), 1, 2, step=20)
    write_layout(tmp_path / "changed", MODEL, changed, 1, 2, step=21)
    assert inspect(monkeypatch, "diff", at, tmp_path / "same") == 0
    assert capsys.readouterr().out == "no difference\n"
    assert inspect(monkeypatch, "diff", at, tmp_path / "changed") == 5
    assert capsys.readouterr().out.splitlines() == [
        "step: 20 -> 21", "tensor exp_avg model.norm.weight 8 float32: differs"
    ]  # fmt: skip
