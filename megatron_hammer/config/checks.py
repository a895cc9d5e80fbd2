"""The words that every check of a setting is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_hammer.base.errors import ConfigError


def require(condition: bool, what: str, rule: str, remedy: str, number: int = 4) -> None:
    """Raise ``ConfigError`` (E2xx of ``number``) unless the condition holds."""
    if not condition:
        raise ConfigError(number, what, rule, remedy)


def at_least(group: str, values: Mapping[str, float | None], minimum: float) -> None:
    """Raise E204 for the first of a group's settings that is below ``minimum``; None, absent, is never."""
    for name, value in values.items():
        if value is not None and not value >= minimum:  # also catches NaN
            raise ConfigError(4, f"{group}.{name}={value}", f"must be at least {minimum}", f"raise {group}.{name}")


def divisors(number: int) -> str:
    """All divisors, as ``choices`` spells them."""
    return choices([d for d in range(1, number + 1) if number % d == 0])


def choices(values: Sequence[int]) -> str:
    """``1, 2 or 4``: for the remedy of an error."""
    shown = [str(v) for v in values]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]
