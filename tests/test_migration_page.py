"""docs/migration.md: our names are settings, transformers' are the library's, names of other programs lead to ours."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from megatron_hammer.config import describe_fields
from megatron_hammer.config.mistakes import nearest_setting
from tests.page_blocks import ROOT

NAMES = [f"{group}.{field}" for group, fields in describe_fields().items() for field in fields]
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in (ROOT / "docs" / "migration.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_ours_are_settings() -> None:
    assert len(ROWS) > 45 and all(len(row) == 5 for row in ROWS)
    assert not [name for row in ROWS for name in named(row[0]) if name not in NAMES]


def test_those_of_the_trainer_are_in_the_library() -> None:
    """Read from its source, which takes no import of torch."""
    found = importlib.util.find_spec("transformers")
    assert found is not None and found.origin is not None
    tree = ast.parse(Path(found.origin).with_name("training_args.py").read_text(encoding="utf-8"))
    (arguments,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = {n.target.id for n in arguments.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    theirs = [name for row in ROWS if not named(row[0])[0].startswith("model.") for name in named(row[2])]
    assert not set(theirs) - fields - {"from_pretrained"}


@pytest.mark.parametrize("column", [1, 2, 4], ids=["Megatron-LM", "transformers", "GPT-NeoX"])
def test_whoever_types_another_name_is_led_to_ours(column: int) -> None:
    """By the error line (E202), where a row gives one name and the name says nothing else elsewhere."""
    led = {}
    for row in ROWS:
        theirs = named(row[column])
        if len(theirs) == len(named(row[0])) and row[column].startswith("`") and "." not in "".join(theirs):
            for name, ours in zip(theirs, named(row[0])):
                led[name] = (nearest_setting(name.strip("-"), NAMES), ours)
    assert len(led) > 15
    assert not {name: found for name, (found, ours) in led.items() if found.partition("=")[0] != ours}
