"""What ``--help`` prints about the settings: their names, types, defaults and docstrings."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from dataclasses import dataclass
from typing import Any

from megatron_hammer.base.cli import ArgumentParser
from megatron_hammer.config import settings
from megatron_hammer.config.effects import Effect, effect_of
from megatron_hammer.config.mistakes import option_remedy
from megatron_hammer.config.tree import Config


@dataclass(frozen=True)
class FieldHelp:
    """One line of ``--help``."""

    type: str
    default: str
    text: str
    effect: Effect
    """What a change of it means for a run that goes on."""


def describe_fields() -> dict[str, dict[str, FieldHelp]]:
    """Group -> field -> type, default and the docstring under the field, read from the source of ``settings.py``."""
    docs, effects = _field_docstrings(), setting_effects()
    described: dict[str, dict[str, FieldHelp]] = {}
    for group, hint in typing.get_type_hints(Config).items():
        described[group] = {}
        for f in dataclasses.fields(hint):
            effect = effects[f"{group}.{f.name}"]
            spelled = str(f.type).removeprefix(f"{effect.name.capitalize()}[")[:-1]
            if choices := typing.get_args(getattr(settings, spelled, None)):  # a type that has a name
                spelled = f"Literal{[*choices]}"
            described[group][f.name] = FieldHelp(spelled, _default(f), docs[hint.__name__][f.name], effect)
    return described


def describe_parts() -> dict[str, dict[str, FieldHelp]]:
    """Class -> field -> the same, for the classes that are values of settings, such as ``PhaseConfig``."""
    docs, groups = _field_docstrings(), set(typing.get_type_hints(Config).values())
    described: dict[str, dict[str, FieldHelp]] = {}
    for group, fields in describe_fields().items():
        for name, entry in fields.items():
            for part in (word for word in re.findall(r"\w+", entry.type) if word in docs):
                cls = getattr(settings, part)
                assert cls not in groups, f"{group}.{name}"
                described[part] = {
                    f.name: FieldHelp(str(f.type), _default(f), docs[part][f.name], entry.effect)
                    for f in dataclasses.fields(cls)
                }
    return described


def _default(field: dataclasses.Field[Any]) -> str:
    return "required" if field.default is dataclasses.MISSING else _plain(field.default)


def setting_effects() -> dict[str, Effect]:
    """``group.field`` -> what a change of it means, for every setting."""
    effects = {}
    for group, hint in typing.get_type_hints(Config).items():
        stated = typing.get_type_hints(hint, include_extras=True)
        for f in dataclasses.fields(hint):
            effect = effect_of(stated[f.name])
            assert effect is not None, f"{group}.{f.name} does not say what a change of it means (config/effects.py)"
            effects[f"{group}.{f.name}"] = effect
    return effects


def _plain(value: Any) -> str:
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def _field_docstrings() -> dict[str, dict[str, str]]:
    """Class -> field -> the docstring under it. Nobody changes what it returns."""
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


def add_settings(parser: ArgumentParser) -> None:
    """Give a program the arguments that name a run's settings: a preset, what replaces it, and ``--accept``."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="preset, for example examples/configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="settings that replace the preset's")
    add_accept(parser)


def add_accept(parser: ArgumentParser) -> None:
    """The option ``--accept`` of the programs that train, and what options that they lack are here."""
    parser.option_remedy = lambda option: option_remedy(option, list(setting_effects()))
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="NAME",
        help="when resuming: let this setting (optimizer.lr) differ from the checkpoint, or the content of the "
        "datasets (data) or the tokenizer (tokenizer); may be repeated",
    )


def help_text() -> str:
    """Every field with its type, default and meaning, for ``--help``."""
    lines = [
        "settings (in the YAML file, or as group.field=value arguments; the last one wins); a run that goes on with "
        "another value of one marked * needs --accept group.field:"
    ]
    for group, fields in describe_fields().items():
        lines.append(f"\n{group}:")
        for name, entry in fields.items():
            mark = " *" if entry.effect.must_be_accepted else ""
            lines.append(f"  {group}.{name} ({entry.type}) = {entry.default}{mark}")
            lines += textwrap.wrap(entry.text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
