"""Reads the command-line arguments of an analysis: tokenizers, texts by domain, places for pictures and the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.lab.analyze import OVERALL
from megatron_hammer.tokenizer.load import find_file, is_tiktoken, load_tokenizer


def load_named(paths: Sequence[str], tiktoken_pattern: str | None = None) -> dict[str, Tokenizer]:
    """Load tokenizers under the names of their rows: file stem, or folder; where two are equal, with the folder above.

    Args:
        tiktoken_pattern: how those that are tiktoken vocabularies cut texts into words; None: by their names.

    Raises:
        ConfigError: E236 the same tokenizer twice, E299 a pattern and no tiktoken vocabulary.
        DataError: as ``load_tokenizer``.
    """
    places = [Path(os.path.abspath(path)) for path in paths]  # "." has a name; links keep theirs
    for i, place in enumerate(places):
        if place.resolve() in {other.resolve() for other in places[:i]}:
            raise ConfigError(36, paths[i], "is named twice", "name each tokenizer once")
    names = [place.name if place.is_dir() else place.stem for place in places]
    if len(set(names)) < len(names):
        names = [f"{place.parent.name}/{name}" for place, name in zip(places, names)]
    if len(set(names)) < len(names):
        names = list(paths)
    files = [find_file(Path(path)) for path in paths]
    lacking = [is_tiktoken(path) for path in files]
    if tiktoken_pattern and not any(lacking):
        option = f"--tiktoken-pattern {tiktoken_pattern}"
        raise ConfigError(99, option, "is for tiktoken vocabularies, and none is named", "leave it out")
    return {
        name: load_tokenizer(path, tiktoken_pattern if lacks_pattern else None)
        for name, path, lacks_pattern in zip(names, paths, lacking)
    }


def parse_texts(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """``name=file`` arguments as files by domain, in the order named; a domain may have several files.

    Raises:
        ConfigError: E235.
    """
    domains: dict[str, list[Path]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            raise ConfigError(35, f"--texts {argument}", "is not name=F.jsonl", "write it as zh=corpus/zh.valid.jsonl")
        if name == OVERALL:
            raise ConfigError(35, f"--texts {argument}", "uses the name of the sum over all texts", "name it otherwise")
        domains.setdefault(name, []).append(Path(path))
    return domains


def prepare_outputs(folder: Path | None, page: Path | None) -> None:
    """Make the folders that pictures and the report go to, before any long work.

    Raises:
        ConfigError: E237 a file where a folder is needed, or a folder where a file is.
    """
    if folder and folder.exists() and not folder.is_dir():
        raise ConfigError(37, f"--pictures {folder}", "is a file", "name a folder, it is made if need be")
    if page and page.is_dir():
        raise ConfigError(37, f"--report {page}", "is a folder", "name the page, as in report.html")
    if page and page.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(37, f"--report {page}", "gets a page of HTML", f"write {page.with_suffix('.html')}")
    for parent in [*([folder] if folder else []), *([page.parent] if page else [])]:
        parent.mkdir(parents=True, exist_ok=True)
