"""Commands on the pages that no test runs: each is parsed by its own program, in English and in Chinese.

Blocks of ``bash`` are run by the test that ``RUN_BY`` names; here every command of a page is read: that of any other
block, indented ones too, wholly, and those within a text as far as they go: their options must exist. Files that a
command names under examples/, tools/, docker/ and tests/ must be there, and so must settings. What no test runs as it
stands is in ``NOT_RUN``, with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from megatron_hammer.base.cli import ArgumentParser
from megatron_hammer.base.errors import HammerError
from megatron_hammer.command import MODULES
from megatron_hammer.config import Config
from tests.page_blocks import ROOT, blocks_of

PAGES = sorted(
    path
    for folder in (".", "docs", "examples", "examples/*", "docker", "benchmarks")
    for path in ROOT.glob(f"{folder}/*.md")
    if path.name != "CHANGELOG.md"  # what was, with names of its time
)
OTHERS = ("yaml", "python", "json", "text")  # blocks without commands
PROGRAM = re.compile(
    r"(?:python3? )?(tools/(?:[a-z_]+)\.py|-m megatron_hammer\.(?:train|launch)|hammer [a-z]+(?:-[a-z]+)*)(?![\w/.-])"
)
VARIABLE = r"\$\{?\w+(?:\[[^\]]*\])?\}?"  # of the shell: 1 stands for each
PLACES = ("examples/", "tools/", "docker/", "tests/", "benchmarks/")


RUN_BY = {  # page -> the test that runs its blocks of bash, at toy size
    "README.md": "test_readme.py",
    "docs/data.md": "test_tokenizer_and_data_pages.py",
    "docs/evaluation.md": "evaluation/test_evaluate.py",
    "docs/installation.md": "test_command.py",  # HAMMER_BUILD=1: of an installed wheel, each night
    "docs/layout.md": "test_layout_page.py",
    "docs/models.md": "huggingface/test_convert.py",
    "docs/planning.md": "costs/test_planner.py",
    "docs/publish.md": "publish/test_page.py",
    "docs/quick_start.md": "test_readme.py",
    "docs/report.md": "report/test_write.py",
    "docs/reproduce.md": "test_reproduce.py",
    "docs/tokenizer.md": "test_tokenizer_and_data_pages.py",
}
NOT_RUN = {  # page -> beginning of a command that no test runs as it stands -> why, or what runs it in its place
    "docs/data.md": {
        "ray start": "a cluster; tests/dataset/make/test_ray.py starts one on this machine",
        "python tools/preprocess_data.py --input 'corpus/*.jsonl'": "the same: with --engine ray",
        "python tools/branch.py RUN": "needs a run of 40,000 steps; tests/train/test_branch.py makes small ones",
        "bash NEW/branch.sh": "the same",
    },
    "docs/evaluation.md": {
        "python -m megatron_hammer.launch --nproc 8": "eight ranks; tests/train/test_evaluator.py has one",
        "lm_eval": "downloads its tasks; tests/evaluation/test_lm_eval.py has tasks of its own",
    },
    "docs/installation.md": {
        "python3.12 -m venv": "another interpreter; HAMMER_BUILD=1 has that of the tests",
        "source hammer/bin/activate": "the same",
        "pip install torch": "gigabytes of an index",
        "pip install ./megatron_hammer": "a release's wheel; HAMMER_BUILD=1 builds and installs one",
        "pip install build": "an index; HAMMER_BUILD=1 builds with what is installed",
        "python -m build": "HAMMER_BUILD=1 builds both",
        "pipx run cibuildwheel": "needs Docker; .github/workflows/release.yml runs it",
        "pip install auditwheel": "an index",
    },
    "docs/layout.md": {"python tools/verify_parallel.py": "four ranks; tests/verify/test_grid.py proves such layouts"},
    "docs/publish.md": {
        "vllm serve": "needs a GPU; HAMMER_CLIENTS=1 has its loader",
        "python -m sglang.launch_server": "needs a GPU; HAMMER_CLIENTS=1 has its loader",
        "python llama.cpp/convert_hf_to_gguf.py": "another repository; HAMMER_CLIENTS=1",
        "llama-completion": "another repository; HAMMER_CLIENTS=1",
        "printf 'FROM ./mine.gguf": "ollama's service",
        "ollama create": "ollama's service",
        "ollama run": "ollama's service",
        "HAMMER_CLIENTS=1 bash tests/run.sh": "a gigabyte of downloads, each night",
        "swift sft": "downloads its data; HAMMER_CLIENTS=1 has the loader",
    },
    "docs/quick_start.md": {
        "export TORCH_INDEX_URL": "a variable, for an index",
        "python tools/selftest.py": "two minutes; tests/verify/test_selftest.py runs its parts, HAMMER_SELFTEST=1 all",
        "python tools/report.py": "tests/report/test_write.py runs it on small runs",
        "python tools/plan.py": "tests/costs/test_planner.py runs it of a toy",
    },
    "examples/README.md": {
        "bash examples/continue_from_hf.sh": "hours; tests/test_example_starts.py has stand-ins for its programs",
        "bash examples/anneal.sh": "tests/train/test_branch.py runs it on a small run",
        "bash examples/long_context.sh": "as continue_from_hf.sh",
        "bash examples/pretrain_8b.sh plan": "as continue_from_hf.sh",
        "kubectl apply": "a cluster; tests/test_example_starts.py reads its file",
        "sky jobs": "a cloud; tests/test_example_starts.py reads its file",
    },
    "docs/reproduce.md": {
        "export TORCH_INDEX_URL": "a variable, for an index",
        "bash tools/make_venv.sh": "an index; tests/run.sh begins with it",
        "source .venv/bin/activate": "tests have an interpreter",
    },
}
TYPED = re.compile(  # what begins a line that is a command, not a drawing
    r"(?:[A-Z_]+=\S+ )*(?:bash|docker|export|hammer|lm_eval|llama-\w+|ollama|pipx?|printf|python3?(?:\.\d+)?|ray|"
    r"source|swift|vllm) "
)


class Found(Exception):
    """A program's parser, and how the program has it read a command line."""

    def __init__(self, parser: ArgumentParser, method: str) -> None:
        super().__init__()
        self.parser, self.method = parser, method


def commands_of(page: str) -> Iterator[str]:
    """Whole commands of all blocks, in one line each."""
    fences = re.findall(r"^ *```(\w*)\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL)
    blocks = [block for kind, block in fences if kind not in OTHERS]
    plain = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"(?:^ {4,}\S.*\n?)+", plain, re.MULTILINE)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        yield from re.split(r" (?:&&|\|\|?|;) | >>? .*", line.strip())


def mentions_of(page: str) -> Iterator[str]:
    """Commands within a text."""
    plain = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"`([^`\n]+)`", plain)


def file_of(command: str) -> str:
    """``tools/NAME.py`` or ``-m MODULE`` of a command as it is typed."""
    if not command.startswith("hammer "):
        return command
    name = command.removeprefix("hammer ")
    return f"-m megatron_hammer.{name}" if name in MODULES else f"tools/{name.replace('-', '_')}.py"


@cache
def parser_of(name: str) -> Found:
    """That of ``tools/NAME.py`` or ``-m MODULE``."""
    if name.startswith("-m "):
        inner = {"megatron_hammer.train": "train.__main__", "megatron_hammer.launch": "supervise.start"}
        module = importlib.import_module(f"megatron_hammer.{inner[name.removeprefix('-m ')]}")
    else:
        spec = importlib.util.spec_from_file_location(f"page_{Path(name).stem}", ROOT / name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

    def caught(method: str) -> Any:
        def read(self: ArgumentParser, *words: Any) -> None:
            raise Found(self, method)

        return read

    with pytest.MonkeyPatch.context() as changed, pytest.raises(Found) as found:
        for method in ("parse_args", "parse_intermixed_args", "parse_known_args"):
            changed.setattr(ArgumentParser, method, caught(method), raising=False)
        module.main()
    return found.value


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All of a program, its sub-commands' too."""
    options = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options |= {option for each in action.choices.values() for option in options_of(each)}
    return options


def is_setting(name: str) -> bool:
    """Whether ``group.field`` is one, or something in one."""
    kind: Any = Config
    for part in name.split(".")[:2]:
        if part not in (fields := get_type_hints(kind)):
            return False
        kind = fields[part]
    return True


def test_every_block_is_run_and_what_is_not_is_named() -> None:
    seen = set()
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]:
        if ".zh-CN" in path.name:  # has the same blocks: tests/test_pages_in_chinese.py
            continue
        page, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        in_blocks = set(commands_of("".join(f"```bash\n{block}```\n" for block in blocks_of(page))))
        if is_run := name in RUN_BY:
            test = (ROOT / "tests" / RUN_BY[name]).read_text(encoding="utf-8")
            assert in_blocks and f'"{path.name}"' in test and "blocks_of(" in test, name
            seen.add((name, ""))
        for command in commands_of(page):
            if command and (not is_run if command in in_blocks else TYPED.match(command)):
                begun = [begin for begin in NOT_RUN.get(name, {}) if command.startswith(begin)]
                assert len(begun) == 1, f"{name}: {command}: neither run nor in NOT_RUN"
                seen.add((name, begun[0]))
    assert seen == {(name, begin) for name, begins in NOT_RUN.items() for begin in begins} | {
        (name, "") for name in RUN_BY
    }
    for test in re.findall(r"tests/[\w/]+\.py", " ".join(why for of in NOT_RUN.values() for why in of.values())):
        assert (ROOT / test).is_file(), test


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_every_command_can_be_typed(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    wrong = []
    for command in commands_of(page):
        try:
            words = shlex.split(re.sub(VARIABLE, "1", command), comments=True)
        except ValueError:  # a text, a drawing
            continue
        places = [word for word in words if word.startswith(PLACES) and "*" not in word]
        wrong += [f"{command}: there is no {place}" for place in places if not (ROOT / place).exists()]
        line = " ".join(shlex.quote(word) for word in words)
        if (found := PROGRAM.search(line)) is None:
            continue
        known, rest = parser_of(file_of(found[1])), shlex.split(line[found.end() :])
        try:
            getattr(known.parser, known.method)(rest)
        except HammerError as error:
            wrong.append(f"{command}: {error}")
    for text in [*commands_of(page), *mentions_of(page)]:
        for setting in re.findall(r"(?<![\w./])([a-z]+\.[a-z_]+)=", text):
            if setting.partition(".")[0] in get_type_hints(Config) and not is_setting(setting):
                wrong.append(f"{text}: {setting} is no setting")
    for text in mentions_of(page):
        if (found := PROGRAM.match(text)) is None or found[1] in ("hammer completion", "hammer help"):
            continue
        if not (name := file_of(found[1])).startswith("-m ") and not (ROOT / name).is_file():
            wrong.append(f"{text}: there is no such program")
            continue
        known_options = options_of(parser_of(name).parser)
        wrong += [f"{text}: there is no {option}" for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)
                  if option not in known_options]  # fmt: skip
    assert not wrong, "\n".join(wrong)
