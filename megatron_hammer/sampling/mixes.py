"""The data mix of a run, phase by phase, beside what it has read so far: for reports and model cards.

The caller gives the counts (``source/NAME/tokens`` of metrics.jsonl). The datasets need not be on this machine; then
the number of passes over them is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hammer.base.errors import HammerError
from megatron_hammer.config import DataConfig
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.sampling.sources import source_names


@dataclass(frozen=True)
class MixSource:
    """One source of the data mix."""

    name: str
    weight: float
    """As the config has it: a share, tokens or passes, see ``DataConfig.weights``."""
    tokens_read: int | None
    """By the run so far; None where that was not counted."""
    passes: float | None
    """How often it was read; None where the dataset is not on this machine."""


@dataclass(frozen=True)
class PhaseMix:
    """What one phase draws from, and how much of it."""

    length: str
    """As the config has it, "10,000,000 tokens"; empty: to the end of the run."""
    sources: tuple[MixSource, ...]


def phase_mixes(
    data: DataConfig, read: Mapping[str, int], shown: Mapping[str, str] | None = None
) -> tuple[PhaseMix, ...]:
    """The mixes of a run.

    Args:
        read: tokens read so far, by the names of ``source_names``.
        shown: what a prefix is called instead.
    """
    prefixes = data.train_prefixes
    names = dict(zip(prefixes, source_names(prefixes), strict=True))
    sizes = {prefix: _tokens_in(prefix) for prefix in prefixes}
    found = []
    for phase in data.mixes:
        lengths = {unit: getattr(phase, unit) for unit in ("tokens", "samples", "steps")}
        length = next((f"{value:,} {unit}" for unit, value in lengths.items() if value is not None), "")
        sources = tuple(
            MixSource((shown or names)[prefix], weight, read.get(names[prefix]),
                   _passes(read.get(names[prefix]), sizes[prefix]))
            for prefix, weight in phase.train.items()
        )  # fmt: skip
        found.append(PhaseMix(length, sources))
    return tuple(found)


def _tokens_in(prefix: str) -> int | None:
    try:
        return IndexedDataset(prefix).num_tokens
    except (HammerError, OSError):  # moved, or never on this machine
        return None


def _passes(read: int | None, size: int | None) -> float | None:
    return None if read is None or not size else read / size
