"""The names of the interface: the very list, each documented and typed, and none of them loaded by the import."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import megatron_hammer as mh

NAMES = [
    "Batch", "CheckpointError", "Config", "ConfigError", "Continuation",
    "DataError", "DiskError", "DriftError", "HammerError", "IndexedDataset",
    "Interrupted", "MemoryShortage", "NonFiniteError", "RefusedError", "Run",
    "Sampling", "TextCorpus", "TextModel", "Tokenizer", "ValidResult",
    "change_config", "continue_texts", "dry_run", "export_hf", "import_hf",
    "load_config", "load_tokenizer", "make_dataset", "open_run", "open_text_model",
    "preset_names", "to_yaml", "train_tokenizer",
]  # fmt: skip
"""A name may come; none goes, and none gets another meaning, before a release has warned of it."""

TREE = ast.parse(Path(str(mh.__file__)).read_text(encoding="utf-8"))


def test_the_list() -> None:
    assert mh.__all__ == NAMES and set(NAMES) <= set(dir(mh))
    declared = {alias.name: node.module for node in ast.walk(TREE) if isinstance(node, ast.ImportFrom)
                for alias in node.names if alias.name in NAMES}  # fmt: skip
    loaded = {name: f"megatron_hammer.{module}" for module, names in mh._MODULES.items() for name in names.split()}
    assert declared == loaded and sorted(loaded) == sorted(NAMES), "what type checkers see is what is loaded"
    with pytest.raises(AttributeError, match=r"no attribute 'open_rum'. Did you mean 'open_run'"):
        mh.open_rum  # noqa: B018


def test_the_import_loads_nothing() -> None:
    """But sys: everything else comes when it is asked for."""
    imports = [node for node in TREE.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import sys"]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_documented(name: str) -> None:
    found = getattr(mh, name)
    assert inspect.getdoc(found), name
    if inspect.isfunction(found):
        hints = found.__annotations__
        assert set(inspect.signature(found).parameters) | {"return"} == set(hints), f"{name}: types"
    public = (
        [member for key, member in vars(found).items() if not key.startswith("_")] if inspect.isclass(found) else []
    )
    for member in public if name == "Run" else ():
        assert inspect.getdoc(member), f"{name}.{member}"


def test_the_page_names_them_all() -> None:
    docs = Path(__file__).parents[2] / "docs"
    for page in ("python.md", "python.zh-CN.md"):
        text = (docs / page).read_text(encoding="utf-8")
        public = [key for key in vars(mh.Run) if not key.startswith("_")]
        assert not [name for name in NAMES if f"`{name}" not in text], page
        assert not [name for name in public if f"`{name}" not in text], page
