"""Commands on the pages that no walk runs: each is parsed by its own program, in English and in Chinese.

Blocks of ``bash`` are run by the walks of each page; here every command of a page is read: that of any other block,
indented ones too, wholly, and those within a text as far as they go: their options must exist. Files that a command
names under examples/, tools/, docker/ and tests/ must be there, and so must settings.
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
from tests.walk import ROOT

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
