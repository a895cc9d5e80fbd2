"""What ``--help`` prints about the settings: their names, types, defaults and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from dataclasses import dataclass
from typing import Any

from megatron_hammer.config import settings
from megatron_hammer.config.tree import Config


@dataclass(frozen=True)
class FieldHelp:
    """One line of ``--help``."""

    type: str
    default: str
    text: str


def describe_fields() -> dict[str, dict[str, FieldHelp]]:
    """Group -> field -> type, default and the docstring under the field, read from the source of ``settings.py``."""
    docs = _field_docstrings()
    described: dict[str, dict[str, FieldHelp]] = {}
    for group, hint in typing.get_type_hints(Config).items():
        described[group] = {}
        for f in dataclasses.fields(hint):
            default = "required" if f.default is dataclasses.MISSING else _plain(f.default)
            described[group][f.name] = FieldHelp(str(f.type), default, docs[hint.__name__][f.name])
    return described


def _plain(value: Any) -> str:
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field_docstrings() -> dict[str, dict[str, str]]:
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(settings)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        pairs = zip(node.body, node.body[1:], strict=False)
        docs[node.name] = {
            a.target.id: " ".join(b.value.value.split())
            for a, b in pairs
            if isinstance(a, ast.AnnAssign)
            and isinstance(a.target, ast.Name)
            and isinstance(b, ast.Expr)
            and isinstance(b.value, ast.Constant)
            and isinstance(b.value.value, str)
        }
    return docs


def help_text() -> str:
    """Every field with its type, default and meaning, for ``--help``."""
    lines = ["settings (in the YAML file, or as group.field=value arguments; the last one wins):"]
    for group, fields in describe_fields().items():
        lines.append(f"\n{group}:")
        for name, entry in fields.items():
            lines.append(f"  {group}.{name} ({entry.type}) = {entry.default}")
            lines += textwrap.wrap(entry.text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
