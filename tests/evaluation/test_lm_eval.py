"""lm-eval's own harness on an exported folder, by the documented command, offline, with a task in local files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_hammer.tokenizer.load import load_tokenizer
from tests.checkpoint.layouts import random_logical, tiny_model, write_layout
from tests.huggingface.unproved import write_unproved
from tests.page_blocks import ROOT

LIBRARY = "lm_eval"
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install -e ".[eval]"'
)
TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": "江边的渡口还罩着什么？", "choices": [" 薄雾", " shortest_path"], "answer": 0},
    {"question": "What does queue.popleft() return?", "choices": [" 采茶姑娘", " (y, x), steps"], "answer": 1},
]


def documented_command() -> list[str]:
    """``lm_eval ...`` as docs/evaluation.md has it."""
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    found = re.search(r"^lm_eval (?:.*\\\n)*.*$", page, re.MULTILINE)
    assert found is not None
    return found[0].replace("\\\n", " ").split()


def test_the_command_names_the_benchmarks() -> None:
    words = documented_command()
    assert words[:3] == ["lm_eval", "--model", "hf"] and "ceval-valid,cmmlu,hellaswag,arc_challenge" in words


@needs_library
def test_the_documented_command_on_an_export(tmp_path: Path, tokenizer_model: Path) -> None:
    model = tiny_model(hidden_size=32, ffn_hidden_size=40, vocab_size=700)
    tokenizer = load_tokenizer(tokenizer_model)
    manifest = write_layout(
        tmp_path / "run", model, random_logical(model, kinds=("weight",)), 1, 1, tokenizer=tokenizer
    )
    write_unproved(manifest, tmp_path / "hf")
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(question, ensure_ascii=False) + "\n" for question in QUESTIONS))
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=file))
    replaced = {"runs/mine/hf": str(tmp_path / "hf"), "runs/mine/lm-eval": str(tmp_path / "out")}
    words = documented_command()[1:]
    words[words.index("--tasks") + 1] = "local_choice"
    for old, new in replaced.items():
        words = [word.replace(old, new) for word in words]
    command = [sys.executable, "-m", LIBRARY, *words, "--include_path", str(tmp_path / "tasks"), "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(written.read_text())
    assert results["results"]["local_choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert results["n-samples"]["local_choice"]["effective"] == len(QUESTIONS)
