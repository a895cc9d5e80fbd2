"""Compares the data mixes that a run has drawn from so far with those of its config, and continues them as phases.

::

    checkpoint: mixes, consumed samples --+
                                          +--> the same up to there? --> what comes may be anything
    config: data.phases, or data.train ---+             |
                                                        no: data.phases are refused, with both mixes;
                                                            data.train alone is the mix of a further phase

Sources are compared by content (``identity.pair_up``), shares within rounding. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hammer.config import Config
from megatron_hammer.config.settings import DataConfig, PhaseConfig
from megatron_hammer.train.identity import DataIdentity, DatasetIdentity, SourcePair, pair_up

SAME_SHARE = 1e-9  # relative rounding of two ways to write one mix, {a: 2, b: 1} and {a: 4, b: 2}


@dataclass(frozen=True)
class DrawnSpan:
    """Samples [first, end) and what they are drawn from."""

    first: int
    end: float
    seq_length: int
    shares: Mapping[int, float]
    """Number of a pair of sources -> share."""

    def is_mix_of(self, other: DrawnSpan) -> bool:
        """Whether both draw alike."""
        same_sources = self.seq_length == other.seq_length and self.shares.keys() == other.shares.keys()
        return same_sources and all(
            math.isclose(self.shares[source], other.shares[source], rel_tol=SAME_SHARE) for source in self.shares
        )


class Pasts:
    """What a checkpoint and a config say of the samples of a run, in the same terms."""

    def __init__(self, saved: DataIdentity, ours: DataIdentity, saved_config: Config, config: Config) -> None:
        self.pairs = [part for pair in pair_up(saved.train, ours.train) for part in _apart(pair)]
        self.saved_config = saved_config
        olds, news = ([getattr(pair, side) for pair in self.pairs] for side in ("old", "new"))
        self.saved = _drawn(saved, _first_length(saved_config), olds)
        self.ours = _drawn(ours, _first_length(config), news)

    def difference(self, consumed: int | None = None) -> tuple[str, str] | None:
        """What the first samples in which they differ are drawn from, by the one and by the other; None: they do not.

        Args:
            consumed: only the samples before this one are compared; None: all.
        """
        was, now = (_until(drawn, math.inf if consumed is None else consumed) for drawn in (self.saved, self.ours))
        for old, new in itertools.zip_longest(was, now):
            if old is None or new is None or not old.is_mix_of(new) or old.end != new.end:
                return self._told(old), self._told(new)
        return None

    @property
    def goes_on(self) -> bool:
        """Whether our last mix is the saved one's last."""
        return self.saved[-1].is_mix_of(self.ours[-1])

    def _told(self, drawn: DrawnSpan | None) -> str:
        if drawn is None:
            return "nothing"
        named = [(self.pairs[number].new or self.pairs[number].old, share) for number, share in drawn.shares.items()]
        shares = ", ".join(f"{source.prefix}: {share:.6g}" for source, share in named if source is not None)
        until = "the end" if drawn.end == math.inf else f"{int(drawn.end):,}"
        return f"samples {drawn.first:,} to {until} from {{{shares}}} of seq_length {drawn.seq_length:,}"

    def saved_phases(self, config: Config, consumed: int | None = None) -> tuple[PhaseConfig, ...]:
        """The phases of the saved config, under the paths that the sources have now.

        Args:
            config: ours, whose defaults are left out.
            consumed: those that lie before this sample, in samples; None: all of them, as they were written.
        """
        moved = {p.old.prefix: p.new.prefix for p in self.pairs if p.old is not None and p.new is not None}
        return past_phases(self.saved_config, consumed, moved, config.data)


def past_phases(
    saved: Config, consumed: int | None, moved: Mapping[str, str] | None = None, defaults: DataConfig | None = None
) -> tuple[PhaseConfig, ...]:
    """The phases of a config.

    Args:
        consumed: those that lie before this sample, in samples; None: all of them, as they were written.
        moved: paths that have changed.
        defaults: the settings that the phases are to stand beside; absent: those of ``saved``.
    """
    moved, defaults = moved or {}, defaults or saved.data
    found = []
    for phase, mix in zip(saved.phases, saved.data.mixes, strict=True):
        if consumed is not None and phase.first >= consumed:
            break
        length: dict[str, int | None] = {"tokens": mix.tokens, "samples": mix.samples, "steps": mix.steps}
        if consumed is not None:
            length = {"samples": (consumed if phase.end is None else min(consumed, phase.end)) - phase.first}
        found.append(
            PhaseConfig(
                {moved.get(prefix, prefix): weight for prefix, weight in phase.train.items()},
                weights=None if phase.unit == defaults.weights else phase.unit,
                seq_length=None if phase.seq_length == defaults.seq_length else phase.seq_length,
                rope_theta=mix.rope_theta,
                rope_scaling=mix.rope_scaling,
                **length,
            )
        )
    return tuple(found)


def _apart(pair: SourcePair) -> list[SourcePair]:
    """A dataset that lies elsewhere and holds something else is another source, and the old one has gone."""
    old, new = pair.old, pair.new
    if old is None or new is None or old.prefix == new.prefix or new.has_content_of(old):
        return [pair]
    return [SourcePair(old, None), SourcePair(None, new)]


def _first_length(config: Config) -> int:
    """``seq_length`` of the only phase, which may have its own; where there are more they say it themselves."""
    phases = config.data.phases
    return (phases[0].seq_length if phases else None) or config.data.seq_length


def _drawn(identity: DataIdentity, seq_length: int, places: Sequence[DatasetIdentity | None]) -> list[DrawnSpan]:
    """The mixes of an identity, neighbours that draw alike in one; ``places``: its sources by the numbers of pairs."""
    numbers = [next(i for i, place in enumerate(places) if place is source) for source in identity.train]
    found: list[DrawnSpan] = []
    for mix in identity.all_mixes(seq_length):
        shares = {number: share for number, share in zip(numbers, mix.shares, strict=True) if share > 0}
        drawn = DrawnSpan(mix.first, math.inf if mix.end is None else mix.end, mix.seq_length, shares)
        if found and found[-1].is_mix_of(drawn):
            found[-1] = dataclasses.replace(found[-1], end=drawn.end)
        else:
            found.append(drawn)
    return found


def _until(mixes: Sequence[DrawnSpan], end: float) -> list[DrawnSpan]:
    return [dataclasses.replace(mix, end=min(mix.end, end)) for mix in mixes if mix.first < end]


def in_phases(config: Config, phases: Sequence[PhaseConfig]) -> Config:
    """The config with these phases in place of its mix."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=None, phases=tuple(phases)))


def carried_on(
    config: Config, was: DataIdentity | None, ours: DataIdentity, saved: Config, consumed: int
) -> tuple[Config, bool]:
    """A config with ``data.train`` alone says what a run draws from now on, and nothing of its past.

    Args:
        was: what the checkpoint was trained on; None where it does not say.
        ours: what the config names.
        saved: the checkpoint's config.
        consumed: its samples.

    Returns:
        the config, with the phases of the checkpoint where its mix is that of the last of them, else as the phase
        behind them; and whether that is another mix, for whoever accepts it.
    """
    megatron = "megatron" in (saved.data.order, config.data.order)
    if was is None or config.data.phases is not None or megatron:
        return config, False
    pasts = Pasts(was, ours, saved, config)
    if pasts.difference(consumed) is None:
        return config, False
    if saved.data.phases and pasts.goes_on:
        return in_phases(config, pasts.saved_phases(config)), False
    return with_further_phase(config, pasts, consumed), True


def with_further_phase(config: Config, pasts: Pasts, consumed: int) -> Config:
    """The config with its mix as the phase that follows what has been consumed."""
    (mix,) = config.data.mixes
    return in_phases(config, [*pasts.saved_phases(config, consumed), mix])


def phases_to_paste(config: Config) -> str:
    """``data.phases`` as one line of YAML, without what is absent."""
    import yaml

    trees = [dataclasses.asdict(mix) for mix in config.data.mixes]
    trees = [{name: value for name, value in tree.items() if value is not None} for tree in trees]
    text: str = yaml.safe_dump(trees, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return f"data.phases: {text.strip()}"
