"""The checks of single settings: at least, at most, one of, a divisor of. Each raises the same kind of error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_hammer.base.errors import ConfigError

_MOST_TRIED = 100_000
"""Divisors tried: all of a number up to 10^10."""


def require(condition: bool, what: str, rule: str, remedy: str, number: int = 4) -> None:
    """Raise ``ConfigError`` (E2xx of ``number``) unless the condition holds."""
    if not condition:
        raise ConfigError(number, what, rule, remedy)


def at_least(group: str, values: Mapping[str, float | None], minimum: float) -> None:
    """Raise E204 for the first of a group's settings that is below ``minimum``; None, absent, is never."""
    for name, value in values.items():
        if value is not None and not value >= minimum:  # also catches NaN
            raise ConfigError(4, f"{group}.{name}={value}", f"must be at least {minimum}", f"raise {group}.{name}")


def at_most(group: str, values: Mapping[str, float | None], maximum: int) -> None:
    """Raise E204 for the first of a group's settings that is above ``maximum``; None, absent, never is."""
    for name, value in values.items():
        if value is not None and not value <= maximum:
            raise ConfigError(4, f"{group}.{name}={value}", f"must be at most {maximum:,}", f"lower {group}.{name}")


def divisors(number: int) -> str:
    """All divisors, as ``choices`` spells them; in square-root time, since a mistaken number may have any size."""
    small = [d for d in range(1, min(math.isqrt(number), _MOST_TRIED) + 1) if number % d == 0]
    return choices(sorted({*small, *(number // d for d in small)}))


def choices(values: Sequence[int]) -> str:
    """``1, 2 or 4``: for the remedy of an error."""
    shown = [str(v) for v in values]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]
