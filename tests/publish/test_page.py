"""The commands of docs/publish.md, on a small run, in this process."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.command import run_file
from megatron_hammer.huggingface import export
from tests.huggingface.unproved import PROVER_HERE
from tests.page_blocks import ROOT, blocks_of


def test_the_page(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = Path(shutil.copytree(made, tmp_path / "runs" / "mine"))
    (run / "metrics.jsonl").unlink()  # of a run with steps left
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(export, "Prover", PROVER_HERE)
    said = []
    page = (ROOT / "docs" / "publish.md").read_text(encoding="utf-8")
    for line in "".join(blocks_of(page)).splitlines():
        if not line.startswith("python "):
            subprocess.run(["bash", "-euc", line], check=True)
            continue
        _, program, *words = shlex.split(line)
        target = words.pop() if ">" in words else None
        words = [word for word in words if word != ">"]
        monkeypatch.setattr(sys, "argv", [program, *words])
        with pytest.raises(SystemExit) as ended:
            run_file(ROOT / program)
        said.append(capsys.readouterr().out)
        assert not ended.value.code, line
        if target is not None:
            Path(target).write_text(said[-1], encoding="utf-8")
    assert said[0].startswith("--- 1 of 1\nimport numpy")
    found = [json.loads(text) for text in Path("texts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["prompt"] for one in found] == ["今天的天气", "def main("]
    assert "certificate passed" in said[2] and "model.safetensors" in said[3] and said[4].startswith("wrote ")
    assert (tmp_path / "published" / "README.md").read_text(encoding="utf-8").startswith("---\nlicense: apache-2.0\n")
