"""Settings that earlier versions had: configs and checkpoints that hold them can still be read.

A retired setting is accepted with the value that changes nothing and refused with any other. A config that a checkpoint
stores is read in silence; in a config that somebody wrote, the setting is remarked on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_hammer.base.errors import ConfigError


@dataclass(frozen=True)
class Retired:
    """What became of a setting."""

    accepted: Any
    """The one value that is still read, and changes nothing."""
    rule: str
    """What is wrong with any other."""
    remedy: str
    """What to write instead of another value."""


RETIRED = {
    "parallel.pipeline_model_parallel_size": Retired(1, "must be 1 in this version", "use tensor and data parallelism"),
}


def without_retired(tree: Mapping[str, Any], note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """``tree`` (group -> field -> value) without retired settings; each is remarked on by ``note``, if there is one.

    Raises:
        ConfigError: a retired setting has a value that it cannot have any more.
    """
    found = dict(tree)
    for name, retired in RETIRED.items():
        group, field = name.split(".")
        fields = found.get(group)
        if not isinstance(fields, Mapping) or field not in fields:
            continue
        value = fields[field]
        if value != retired.accepted or isinstance(value, bool):
            raise ConfigError(4, f"{name}={value}", retired.rule, retired.remedy)
        if note is not None:
            note(f"note: {name} is not a setting any more and may be left out; {value} changes nothing")
        found[group] = {key: fields[key] for key in fields if key != field}
    return found
