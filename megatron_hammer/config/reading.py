"""YAML and overrides -> tree of plain values -> ``Config``, and back: checks names and types, ``Config`` the ranges."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.base.characters import in_ascii, is_quoted
from megatron_hammer.base.errors import ConfigError, os_remedy
from megatron_hammer.base.paths import RENAME_REMEDY, is_unicode
from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import read_regular
from megatron_hammer.config.help import setting_effects
from megatron_hammer.config.mistakes import (
    bool_remedy,
    config_remedy,
    elsewhere_remedy,
    encoding_remedy,
    foreign_remedy,
    list_remedy,
    mapping_remedy,
    nearest_choice,
    number_remedy,
    pairs_remedy,
    setting_of_argument,
    sources_remedy,
    unknown_remedy,
    yaml_remedy,
)
from megatron_hammer.config.presets import preset_path
from megatron_hammer.config.tree import Config

Overrides = Sequence[str] | Mapping[str, Any]
"""``group.field=value`` texts; or a mapping of ``group.field``, or of groups, to plain values."""
MAX_CONFIG_BYTES = 2**18
"""A mix of 2,500 sources with paths of 100 characters; PyYAML takes a second for the worst text of this length."""
ALIASES = {"parallel.pipeline_parallel_size": "parallel.pipeline_model_parallel_size"}
"""Other names under which settings are read -> what they are called; one that is given by both must have one value."""
_MAX_PARTS = 20
"""Of a name in an argument; settings have three."""


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; ``where`` names it in the error."""
    import yaml

    from megatron_hammer.config.strict_yaml import StrictLoader

    if not is_unicode(text):
        raise ConfigError(8, where, "holds a name that is not UTF-8", RENAME_REMEDY)
    try:
        return yaml.load(text, Loader=StrictLoader)  # derived from the safe loader
    except (yaml.YAMLError, ValueError, RecursionError, ArithmeticError, TypeError, LookupError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        found = f"line {mark.line + 1}: {problem}" if mark is not None and problem else str(error)
        remedy = "mend the syntax"
        if problem and problem.startswith("mapping values are not allowed"):
            remedy = "give all lines of a group the same blanks in front, and put text with a colon in quotes"
        elif problem and problem.endswith("is given twice"):
            remedy = "leave one of the two out"
        raise ConfigError(8, where, f"is not valid YAML ({found})", remedy) from None


def load_config(path: str | Path, overrides: Overrides = (), note: Callable[[str], None] | None = say) -> Config:
    """Read a YAML file, apply overrides in order, and check names and types.

    Ranges and relations are checked by ``Config.validate``.

    Args:
        path: of the file, or the name of a preset (``preset_names``).
        overrides: ``group.field=value`` texts, or a mapping of ``group.field`` to plain values.
        note: called with a line on each setting that has no effect any more; prints on stderr by default.

    Raises:
        ConfigError: missing or malformed file, unknown or misspelt key (the nearest is named), wrong type.
    """
    if not isinstance(path, str | Path):
        remedy = "give a file or a preset, and settings behind it: load_config('tiny', {'train.num_steps': 10})"
        raise ConfigError(6, f"load_config({path!r:.80})", "is no path of a YAML file", remedy)
    path = preset_path(path) or path
    try:
        data = read_regular(path, MAX_CONFIG_BYTES)
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = encoding_remedy(data)
        raise ConfigError(8, str(path), f"is not UTF-8 text ({error.reason})", remedy) from None
    except OSError as error:
        shown = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
        remedy = config_remedy(str(path)) if shown else os_remedy(error)
        raise ConfigError(6, str(path), f"could not be read ({error.strerror})", remedy) from None
    try:
        tree = parse_yaml(text, str(path))
    except ConfigError as error:
        error.remedy = foreign_remedy(str(path), None) or yaml_remedy(text) or error.remedy
        raise
    has_groups = isinstance(tree, dict) and any(f.name in tree for f in dataclasses.fields(Config))
    if tree is not None and not has_groups and (remedy := foreign_remedy(str(path), tree)):
        raise ConfigError(8, str(path), "is no config of ours", remedy)
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        remedy = yaml_remedy(text) or "see examples/configs/tiny.yaml"
        raise ConfigError(8, str(path), "must hold groups (model:, train:, ...)", remedy)
    in_file = _names_of(tree)
    _apply(overrides, tree)
    try:
        return config_from_tree(tree, note)
    except ConfigError as error:
        if error.number == 2 and error.what in in_file:
            error.remedy = yaml_remedy(text) or unknown_remedy(error.what, _known_settings(), in_file=True)
        raise


def _names_of(tree: Mapping[Any, Any]) -> set[str]:
    """Names of groups and fields, as errors spell them."""
    names = {str(key) for key in tree}
    return names | {f"{key}.{field}" for key, group in tree.items() if isinstance(group, dict) for field in group}


def with_overrides(tree: Mapping[str, Any], overrides: Overrides) -> Config:
    """The config of a tree of plain values after overrides; the tree stays as it is.

    Raises:
        ConfigError: as ``load_config``.
    """
    changed = copy.deepcopy(dict(tree))
    _apply(overrides, changed)
    return config_from_tree(changed)


def change_config(config: Config, overrides: Overrides) -> Config:
    """The config with other values; the given one stays as it is.

    Args:
        overrides: as for ``load_config``.

    Raises:
        ConfigError: as ``load_config``.
    """
    return with_overrides(config_to_tree(config), overrides)


def _apply(overrides: Overrides, tree: dict[str, Any]) -> None:
    """Put what overrides say into a tree, in their order."""
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            if isinstance(value, Mapping) and name in _types_of(Config):
                _apply({f"{name}.{field}": of_field for field, of_field in value.items()}, tree)
            else:
                _put(tree, str(name), _plain_value(value), str(name))
        return
    if not isinstance(overrides, str | Sequence):
        raise ConfigError(1, f"settings {overrides!r:.80}", "are no settings", "give {'train.num_steps': 10}")
    for override in [overrides] if isinstance(overrides, str) else overrides:
        if not isinstance(override, str):
            remedy = "write 'train.num_steps=10', or give a mapping: {'train.num_steps': 10}"
            raise ConfigError(1, f"argument {override!r}", "is no text", remedy)
        _apply_override(tree, override)


def _plain_value(value: Any) -> Any:
    """A value of Python's as YAML would give it: paths are texts, and numbers of NumPy are numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain_value(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, int | float) and isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or key != key.strip() or is_quoted(key):
        raise _no_setting(override)
    try:
        value = parse_yaml(text, key)
    except ConfigError as error:
        if key in ("data.train", "data.valid") and ":" in (plain := in_ascii(text)):
            error.remedy = mapping_remedy(plain)
        raise
    _put(tree, key, value, override)


def _no_setting(override: str) -> ConfigError:
    remedy = setting_of_argument(override, _known_settings())
    return ConfigError(1, f"argument {override!r}", "is not group.field=value", remedy)


def _put(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Set ``group.field``, or a deeper one, of a tree."""
    parts = key.split(".")
    if not 2 <= len(parts) <= _MAX_PARTS or not all(parts):
        raise _no_setting(override)
    node = tree
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            where = ".".join(parts[: depth + 1])
            raise ConfigError(3, f"{where}={node!r}", "must be a group of fields", f"write {where} as a mapping")
    node[parts[-1]] = value


def config_from_tree(tree: Mapping[str, Any], note: Callable[[str], None] | None = None) -> Config:
    """Build a ``Config`` from nested plain values, as ``load_config`` reads them and checkpoints store them."""
    config: Config
    try:
        config = _build(Config, tree, "")
    except ConfigError as error:
        if error.number != 2 or error.what not in ALIASES:
            raise
        config = _build(Config, _with_present_names(tree, note), "")
    return config


def _with_present_names(tree: Mapping[str, Any], note: Callable[[str], None] | None) -> dict[str, Any]:
    """``tree`` (group -> field -> value) with every setting under its own name; ``note``, if there is one, is called
    with a line on each.

    Raises:
        ConfigError: both names are given, with two values.
    """
    found = dict(tree)
    for other, name in ALIASES.items():
        group, field = other.split(".")
        present, fields = name.split(".")[1], found.get(group)
        if not isinstance(fields, Mapping) or field not in fields:
            continue
        value = fields[field]
        if fields.get(present, value) != value:
            rule = f"is another name of {name}={fields[present]}, with another value"
            raise ConfigError(4, f"{other}={value}", rule, f"leave {other} out")
        if note is not None:
            note(f"note: {other} is read as {name}")
        found[group] = {key: fields[key] for key in fields if key != field} | {present: value}
    return found


def config_to_tree(config: Config) -> dict[str, Any]:
    """The inverse: nested plain values, every field filled in."""
    return dataclasses.asdict(config)


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise _not_a_group(cls, tree, where)
    hints = _types_of(cls)
    for key in tree:
        if key not in hints:
            raise _not_a_setting(key, hints, where)
    values = {}
    for f in dataclasses.fields(cls):
        name = f"{where}.{f.name}" if where else f.name
        if f.name in tree and not (tree[f.name] is None and dataclasses.is_dataclass(hints[f.name])):
            values[f.name] = _convert(hints[f.name], tree[f.name], name)
        elif dataclasses.is_dataclass(hints[f.name]) and f.default_factory is dataclasses.MISSING:
            values[f.name] = _build(hints[f.name], {}, name)  # names the first missing field
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(7, name, "is not set and has no default", f"add {name} to the YAML file or the arguments")
    return cls(**values)


def _not_a_setting(key: Any, hints: Mapping[str, Any], where: str) -> ConfigError:
    name = f"{where}.{key}" if where else str(key)
    known = [f"{where}.{own}" for own in hints] if "[" in where else _known_settings()
    return ConfigError(2, name, "is not a known setting", unknown_remedy(name, known, in_file=False))


def _not_a_group(cls: type, given: Any, where: str) -> ConfigError:
    remedy = f"write {where}={_group_form(cls, given)}"
    if isinstance(given, str) and ":" in in_ascii(given):
        remedy = f"put a blank behind the colon: {given.split()[0].replace(':', ': ')}"
    return ConfigError(3, f"{where}={given!r}", "must be a group of fields", remedy)


def _group_form(cls: type, given: Any) -> str:
    """How a group of fields is written: those that it needs, with what was given in their place where that fits."""
    fields = dataclasses.fields(cls)
    named = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    named = named or [f.name for f in fields][:3]
    values = dict.fromkeys(named, "VALUE")
    if isinstance(given, list) and len(given) == len(named):
        values = {name: str(value) for name, value in zip(named, given)}
    elif isinstance(given, str | int | float) and not isinstance(given, bool):
        choices = {name: typing.get_args(hint) for name, hint in _types_of(cls).items()}
        meant = next((name for name, known in choices.items() if given in known), named[0])
        values = {meant: str(given)} | {name: "VALUE" for name in named if name != meant}
    rest = ", ..." if len(values) < len(fields) else ""
    return "{" + ", ".join(f"{name}: {value}" for name, value in values.items()) + rest + "}"


@functools.cache
def _types_of(cls: type) -> dict[str, Any]:
    """The types of a group's fields, by name. Annotations are strings, and to evaluate them costs a millisecond."""
    return typing.get_type_hints(cls)


def _known_settings() -> list[str]:
    return [*setting_effects(), *_types_of(Config)]


def _convert(hint: Any, value: Any, name: str) -> Any:
    """``value`` (as YAML gives it) as the field's type, or a ``ConfigError`` naming the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, name)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)  # type: ignore[arg-type]
    if origin is Literal:
        if value is False and "off" in args:
            return "off"  # YAML 1.1 reads off as a bool
        if value not in args:
            raise _not_a_choice(args, value, name)
        return value
    if origin is dict:
        return _convert_dict(args[1], value, name)
    if origin is tuple:
        values = value if isinstance(value, list | tuple) else [value]  # one may stand alone
        if dataclasses.is_dataclass(args[0]):
            return tuple(_convert(args[0], v, f"{name}[{i}]") for i, v in enumerate(values))
        known = typing.get_args(args[0])
        if len(values) == 1 and (remedy := list_remedy(values[0], known)):
            raise ConfigError(3, f"{name}={values[0]}", f"must be a list of {', '.join(map(str, known))}", remedy)
        return tuple(_convert(args[0], v, name) for v in values)
    number = _number(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number is not None and float(number).is_integer():
        return int(number)
    if hint is float and number is not None and math.isfinite(number):
        return float(number)
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise _not_of_type(hint, value, name)


def _convert_dict(value_hint: Any, value: Any, name: str) -> dict[str, Any] | None:
    if value_hint is float and isinstance(value, str):
        if remedy := sources_remedy(value):
            raise ConfigError(3, f"{name}={value!r}", "must be one prefix or {prefix: weight}", remedy)
        return {value: 1.0}  # one prefix
    if not isinstance(value, dict) or not value:
        raise _not_a_mapping(value_hint, value, name)
    for key, given in value.items():
        if given is None:  # {a 1} and {a, b}: YAML reads keys without values
            remedy = pairs_remedy(value, value_hint is float)
            raise ConfigError(3, f"{name}[{key}]", "has no value", remedy)
    return {str(k): _convert(value_hint, v, f"{name}[{k}]") for k, v in value.items()}


def _number(value: Any) -> int | float | None:
    """Numbers as people write them: YAML 1.1 reads ``5e-4`` (no dot) as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text that ``load_config`` reads back to an equal config."""
    import yaml

    return yaml.safe_dump(config_to_tree(config), sort_keys=False, allow_unicode=True, width=1000)


# ---- what is wrong with a value -------------------------------------------------------------------------------------


def _not_a_choice(choices: Sequence[Any], value: Any, name: str) -> ConfigError:
    near, listed = nearest_choice(value, choices), ", ".join(map(str, choices))
    remedy = elsewhere_remedy(value, choices) or (f"did you mean {near}?" if near else f"choose one of {listed}")
    return ConfigError(3, f"{name}={value}", f"must be one of {listed}", remedy)


def _not_of_type(hint: Any, value: Any, name: str) -> ConfigError:
    """For a number, a switch or a text that is none."""
    if hint is float and _number(value) is not None:
        return ConfigError(4, f"{name}={value}", "must be a finite number", "write a number")
    if value is None:
        return ConfigError(3, f"{name}=", "has no value", f"write {name}=VALUE, or leave it out")
    remedy = number_remedy(value, hint is int) if hint in (int, float) else "correct the value"
    remedy = bool_remedy(value) if hint is bool else remedy
    return ConfigError(3, f"{name}={value!r}", f"must be of type {hint.__name__}", remedy)


def _not_a_mapping(value_hint: Any, value: Any, name: str) -> ConfigError:
    wanted = "one prefix or {prefix: weight}" if value_hint is float else "{name: prefix}"
    wanted = "{prefix: {rate: 0.5, ...}}" if dataclasses.is_dataclass(value_hint) else wanted
    remedy = ""
    if isinstance(value, list) and value and value_hint is float:  # Megatron's pairs, or sources of equal weight
        equal = "write {" + ", ".join(f"{prefix}: 1" for prefix in value) + "}"
        remedy = sources_remedy(" ".join(map(str, value))) or equal
    elif isinstance(value, str) and value and value_hint is str:
        remedy = f"give the set a name: {{valid: {value}}}"
    return ConfigError(3, f"{name}={value!r}", f"must be {wanted}", remedy or "write it as a YAML mapping")
