"""README.md: every block of commands runs, in order, verbatim; the Chinese one has the same; what it lists is there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_hammer import __version__
from tests.walk import ROOT, blocks_of, run_block

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")}
PAGE, CHINESE = PAGES.values()

pytestmark = pytest.mark.timeout(900)  # the walk takes one to two minutes alone on two cores


def prepare_clone(folder: Path) -> Path:
    """What the README's commands need of a clone, with a complete .venv; short runs; the tests do not run twice."""
    for name in ("tools", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder / name)
    for preset, shorter in (
        ("quick_start", {"num_steps": 4, "eval_interval_steps": 2, "save_interval_steps": 2, "warmup_steps": 2}),
        ("tiny", {"num_steps": 4, "eval_interval_steps": 2, "save_interval_steps": 2}),
    ):
        path = folder / "examples" / "configs" / f"{preset}.yaml"
        text = path.read_text(encoding="utf-8")
        for field, value in shorter.items():
            text, changed = re.subn(rf"(?m)^  {field}: \d+", f"  {field}: {value}", text)
            assert changed == 1, field
        path.write_text(text, encoding="utf-8")
    (folder / "tests").mkdir()
    (folder / "tests" / "run.sh").write_text("echo the tests run\n")
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (binaries / "python").chmod(0o755)
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')
    here = '"$(dirname -- "${BASH_SOURCE[0]}")/.."'
    script = (folder / "tools" / "make_venv.sh").read_text(encoding="utf-8").replace(here, f"'{folder}'")
    wanted = script.removesuffix("main\n") + "wanted >.venv/.complete\n"
    subprocess.run(["bash", "-c", wanted], check=True)
    return folder


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All blocks in one shell."""
    folder = prepare_clone(tmp_path_factory.mktemp("readme"))
    return folder, run_block("\n".join(blocks_of(PAGE)), folder, timeout=840)


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_block_runs_in_order(walked: tuple[Path, str]) -> None:
    folder, said = walked
    runs = folder / "runs"
    lengths = {"pretrain_1b4": 4, "my_text": 4, "shrunk": 40, "continued": 20, "mine": 4, "my_1b4": 4}
    assert {path.name: len(steps(path)) for path in runs.iterdir() if path.name != "imported"} == lengths
    for name in ("pretrain_1b4", "my_text", "mine", "my_1b4"):
        assert json.loads((runs / name / "hf" / "certificate.json").read_text())["verdict"] == "passed"
    for name in ("pretrain_1b4", "my_text", "my_1b4"):
        assert (runs / name / "loss.png").exists() and (runs / name / "tensorboard").is_dir()
    assert "the tests run\n" in said and said.count("\nDone. Everything is in ") == 3
    assert "is made of your text" not in said and "made of your text, at a size for this machine." in said
    lines = [json.loads(line) for line in (runs / "shrunk" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5 and lines[-1]["lr"] == pytest.approx(4e-4)


def test_both_pages_have_the_same_commands() -> None:
    commands = [re.sub(r"(?m)^#.*\n|\s+#.*", "", block) for block in blocks_of(PAGE)]
    assert len(commands) >= 6 and commands == [re.sub(r"(?m)^#.*\n|\s+#.*", "", block) for block in blocks_of(CHINESE)]


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_what_the_page_lists_is_there(page: str) -> None:
    head = page[: page.index("\n## ")]
    assert __version__ in head and "WSL2" in head and "macOS" in head, "the status line"
    for tool in (ROOT / "tools").glob("*.py"):
        assert tool.name in page, tool.name
    for link in re.findall(r"\]\((?!http)([^)#]+)", page):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_every_extra_is_in_the_table_and_used(page: str) -> None:
    """An extra that no module imports would promise something."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {"te": "transformer_engine", "flash": "flash_attn", "parquet": "pyarrow", "eval": "lm_eval"}
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "megatron_hammer").rglob("*.py"))
    code += (ROOT / "tests" / "evaluation" / "test_lm_eval.py").read_text(encoding="utf-8")  # a program beside ours
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    for extra in set(project["optional-dependencies"]) - {"dev"}:
        assert f"`{extra}`" in rows, extra
        module = modules.get(extra, extra)
        assert re.search(rf"(import|from) {module}\b|\"{module}\"", code), extra
