"""Where each phase of a run begins, counted in samples, and how many samples each step has: functions of the config.

::

    data.phases    {tokens: N, train: A}    {steps: M, train: B}    {train: C}
    samples     0 ------------------- a ------------------- b --------------> end of the run

A *phase* is a part of a run with a data mix of its own; ``data.train`` alone is one phase. A length in tokens is
rounded up to whole samples, one in steps is counted from the first step that begins in the phase. A step may hold
samples of two phases, unless these differ in seq_length or RoPE: then a phase that is not given in samples ends with a
step. Needs no torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_hammer.config.settings import DataConfig, ModelConfig, RopeScaling, TrainConfig


@dataclass(frozen=True)
class BatchSizes:
    """How many samples a step has, as a function of the samples consumed before it."""

    ramp: tuple[tuple[int, int], ...]
    """(first sample, size), rising: a step that begins at this sample or later has this size, until the next entry."""

    @classmethod
    def of(cls, train: TrainConfig) -> BatchSizes:
        """Those of a config."""
        ramp, final = train.batch_size_ramp, train.global_batch_size
        if ramp is None:
            return cls(((0, final),))
        growths = (final - ramp.start) // ramp.increment
        firsts = (-(-growth * ramp.samples // growths) for growth in range(growths + 1))
        return cls(tuple((first, ramp.start + i * ramp.increment) for i, first in enumerate(firsts)))

    def at(self, consumed: int) -> int:
        """Samples of the step that begins when ``consumed`` are behind the run."""
        return self.ramp[bisect_right(self.ramp, consumed, key=lambda entry: entry[0]) - 1][1]

    def samples(self, steps: int, start: int = 0) -> int:
        """Samples that are consumed after so many steps, of which the first begins at sample ``start``."""
        consumed = start
        for entry, (_, size) in enumerate(self.ramp):
            limit = self.ramp[entry + 1][0] if entry + 1 < len(self.ramp) else None
            here = steps if limit is None else min(steps, max(0, -(-(limit - consumed) // size)))
            consumed, steps = consumed + here * size, steps - here
        return consumed

    def steps(self, sample: int, start: int = 0) -> int:
        """Steps that begin before a sample, the first of them at sample ``start``."""
        consumed, steps = start, 0
        for entry, (_, size) in enumerate(self.ramp):
            limit = self.ramp[entry + 1][0] if entry + 1 < len(self.ramp) else sample
            here = max(0, -(-(min(limit, sample) - consumed) // size))
            consumed, steps = consumed + here * size, steps + here
        return steps

    def step_end(self, sample: int, start: int = 0) -> int:
        """The first end of a step at or after a sample."""
        return self.samples(self.steps(sample, start), start)


@dataclass(frozen=True)
class Course:
    """Which samples each step of a run holds: those behind it as they were, those to come as the config says.

    The batch may have been made larger or smaller in mid-run, so steps to come are counted from where the run stands.
    """

    batches: BatchSizes
    num_steps: int
    done: Sequence[int] = (0,)
    """Numbers of steps of which is known what they had consumed, rising from 0; the run stands after the last."""
    consumed: Sequence[int] = (0,)
    """Samples that were behind the run after each of ``done``."""

    @property
    def num_samples(self) -> int:
        """Samples of the whole run."""
        return self.samples(max(self.num_steps, self.done[-1]))

    @property
    def is_even(self) -> bool:
        """Whether all steps have had the sizes that the config says."""
        return all(self.batches.samples(n) == count for n, count in zip(self.done, self.consumed, strict=True))

    def samples(self, steps: int) -> int:
        """Samples that are consumed after so many steps."""
        at = bisect_right(self.done, steps) - 1
        found = self.batches.samples(steps - self.done[at], self.consumed[at])
        return found if at + 1 == len(self.done) else min(found, self.consumed[at + 1])

    def steps(self, sample: int) -> int:
        """Steps that begin before a sample."""
        after = bisect_left(self.consumed, sample)
        if after < len(self.consumed) and self.consumed[after] == sample:
            return self.done[after]
        found = self.done[after - 1] + self.batches.steps(sample, self.consumed[after - 1])
        return found if after == len(self.done) else min(found, self.done[after])


@dataclass(frozen=True)
class Phase:
    """A phase of the run with its place among the samples and its defaults filled in."""

    name: str
    """What the config calls it: ``data.phases[1]``, or ``data``."""
    first: int
    """Number of its first sample."""
    end: int | None
    """Number of the sample after its last; None: it runs to the end."""
    train: Mapping[str, float]
    unit: Literal["share", "tokens", "epochs"]
    """What the weights are."""
    seq_length: int
    rope_theta: float
    rope_scaling: RopeScaling | None

    def has_shape_of(self, other: Phase) -> bool:
        """Whether steps of both are shaped alike, so that one step may hold samples of both."""
        return self.shape == other.shape

    def draws_as(self, other: Phase) -> bool:
        """Whether samples of both are drawn alike, so that their losses can be held against each other."""
        return (self.train, self.unit, self.shape) == (other.train, other.unit, other.shape)

    @property
    def shape(self) -> tuple[int, float, RopeScaling | None]:
        """What a step is shaped by."""
        return self.seq_length, self.rope_theta, self.rope_scaling


def phases_of(data: DataConfig, model: ModelConfig, batches: BatchSizes) -> tuple[Phase, ...]:
    """The phases of a run in their order; empty where no data are named."""
    placed: list[Phase] = []
    first, theta, scaling = 0, model.rope_theta, model.rope_scaling
    mixes = data.mixes
    for i, mix in enumerate(mixes):
        theta, scaling = mix.rope_theta or theta, mix.rope_scaling or scaling
        length, end = mix.seq_length or data.seq_length, None
        if i + 1 < len(mixes):
            if mix.samples is not None:
                end = first + mix.samples
            elif mix.steps is not None:
                end = batches.samples(batches.steps(first) + mix.steps)
            else:
                assert mix.tokens is not None, "a phase before the last has a length"
                end = first + -(-mix.tokens // length)
            after = mixes[i + 1]
            differs = (after.seq_length or data.seq_length) != length or after.rope_theta or after.rope_scaling
            if differs and mix.samples is None:
                end = batches.step_end(end)
        name = "data" if data.phases is None else f"data.phases[{i}]"
        placed.append(Phase(name, first, end, mix.train, mix.weights or data.weights, length, theta, scaling))
        first = end or 0
    return tuple(placed)


def phase_at(phases: tuple[Phase, ...], sample: int) -> Phase:
    """The phase that holds a sample."""
    return next(phase for phase in phases if phase.end is None or sample < phase.end)


def tokens_before(phases: tuple[Phase, ...], sample: int) -> int:
    """Targets of the samples [0, sample)."""
    return sum(
        (min(sample, sample if phase.end is None else phase.end) - phase.first) * phase.seq_length
        for phase in phases
        if phase.first < sample
    )
