"""Former names of settings, so that configs which use them can still be read.

A setting that is given under both of its names must have the same value under both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_hammer.base.errors import ConfigError

OTHER_NAMES = {"parallel.pipeline_parallel_size": "parallel.pipeline_model_parallel_size"}
"""The former name of a setting -> its present one."""


def with_present_names(tree: Mapping[str, Any], note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """``tree`` (group -> field -> value) with every setting under its own name; ``note``, if there is one, hears of it.

    Raises:
        ConfigError: both names are given, with two values.
    """
    found = dict(tree)
    for other, name in OTHER_NAMES.items():
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
