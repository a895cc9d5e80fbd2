"""The notebook of the quick start: valid, without outputs, and what it does is what the program does."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

import megatron_hammer as mh
from megatron_hammer.checkpoint.folder import newest_checkpoint
from megatron_hammer.huggingface import export
from megatron_hammer.train.run import run_rank
from tests.huggingface.unproved import PROVER_HERE
from tests.train.runs import metrics

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "notebooks" / "quick_start.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_a_notebook_of_version_4_5() -> None:
    """What nbformat's schema asks for, and no outputs: these would differ in each commit."""
    tree = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert set(tree) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (tree["nbformat"], tree["nbformat_minor"]) == (4, 5)
    assert set(tree["metadata"]["kernelspec"]) == {"name", "language", "display_name"}
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in CELLS:
        more = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | more and cell["cell_type"] in (
            "code",
            "markdown",
        )
        assert isinstance(cell["source"], list) and all(line.endswith("\n") for line in cell["source"][:-1])
        assert not cell.get("outputs") and cell.get("execution_count") is None
    nbformat = pytest.importorskip("nbformat", reason="the schema of notebooks: in the extra dev")
    nbformat.validate(nbformat.read(NOTEBOOK, 4))


def test_the_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/python.md, of six steps in place of 200; the Chinese page has the same one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "Prover", PROVER_HERE)
    (tmp_path / "my_text").symlink_to(ROOT / "examples" / "corpus")
    block, chinese = (
        re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)[0]
        for page in ("python.md", "python.zh-CN.md")
    )
    assert ast.dump(ast.parse(block)) == ast.dump(ast.parse(chinese))
    assert block.count('"train.output"') == 1
    names: dict[str, Any] = {}
    exec(compile(block.replace('"train.output"', '"train.num_steps": 6, "train.output"'), "python.md", "exec"), names)
    assert [line["step"] for line in names["lines"]] == [2, 3, 4, 5, 6]
    certificate = json.loads((tmp_path / "runs" / "mine" / "hf" / "certificate.json").read_text())
    assert certificate["verdict"] == "passed"


def test_the_cells_run_and_their_curve_is_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh folder, in this process, the proof of the export too. Evaluation, generation and export in the midst
    of it all change no bit of what the program computes with the same config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(export, "Prover", PROVER_HERE)
    names: dict[str, object] = {}
    for cell in CODE:
        exec(compile(cell.replace('"train.num_steps": 40', '"train.num_steps": 6'), str(NOTEBOOK), "exec"), names)
    assert isinstance(config := names["config"], mh.Config) and isinstance(texts := names["texts"], list)
    assert isinstance(certificate := names["certificate"], dict) and certificate["verdict"] == "passed"
    saved = mh.open_text_model(str(names["checkpoint"]))
    greedy = mh.Sampling(max_new_tokens=20, temperature=0)
    assert texts == list(mh.continue_texts(saved, ["今天", "算盘"], greedy)), "live and saved give the same tokens"
    assert run_rank(mh.change_config(config, {"train.output": tmp_path / "program"}), 0, 0, 1, None) == 0
    assert metrics(tmp_path / "program") == metrics(tmp_path / "notebook" / "run")
    assert newest_checkpoint(tmp_path / "notebook" / "run") is not None
