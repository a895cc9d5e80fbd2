"""What a run will draw from each source: worked out before it starts, from numbers alone.

::

    data.train {prefix: weight} + data.weights --> sampling_weights --> shares of the samples, by which TrainData draws
    shares, tokens of each source, length of the run --> plan_sources --> tokens, epochs and repeats of each source

A weight is a share of the samples, a number of tokens, or a number of epochs (passes over the source). The length of a
run is ``train.num_steps`` whatever the weights say: the sources are drawn in the proportions that the weights ask for,
all scaled by the same factor, and the plan says so and names the number of steps that would make it 1. So a run that is
extended, or cut short, keeps the order of its samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.tables import align
from megatron_hammer.config import Config
from megatron_hammer.config.phases import Course
from megatron_hammer.sampling.sources import names_by_prefix

WeightUnit = Literal["share", "tokens", "epochs"]

MANY_EPOCHS = 40  # where the returns of repeating have gone (arXiv 2305.16264, figure 5)
_ROUNDING = 1e-9  # relative: 3 epochs of float64 arithmetic must not exceed a limit of 3


def sampling_weights(weights: Sequence[float], unit: WeightUnit, tokens: Sequence[int]) -> list[float]:
    """Weights of any unit as proportions of the samples, in the order given; "share" and "tokens" stay as they are.

    Args:
        weights: of each source, above zero.
        unit: what they are.
        tokens: in each source.
    """
    if unit == "epochs":
        return [weight * count for weight, count in zip(weights, tokens, strict=True)]
    return list(weights)


@dataclass(frozen=True)
class SourceContent:
    """What a plan must know of a source."""

    prefix: str
    tokens: int
    fingerprint: str
    """The same source under another path has the same."""


@dataclass(frozen=True)
class SourcePlan:
    """What the run draws from one source."""

    prefix: str
    weight: float
    """As given in ``data.train``."""
    tokens: int
    """In the source."""
    share: float
    """Of the samples; the shares add up to one."""
    drawn: int
    """Tokens (targets) that the run, or the phase, reads from it; exact to within a sample or two of the mix."""
    before: int = 0
    """Tokens that the phases before have read."""
    name: str = ""
    """What the run calls it, in its metrics too (``sources.py``)."""

    @property
    def shown(self) -> str:
        """Its name for people."""
        return self.name or self.prefix

    @property
    def epochs(self) -> float:
        """Passes over the source."""
        return self.drawn / self.tokens

    @property
    def repeated(self) -> int:
        """Tokens drawn beyond the first pass."""
        return max(0, self.before + self.drawn - max(self.tokens, self.before))


@dataclass(frozen=True)
class DrawPlan:
    """What a run draws, source by source, counted from its first step."""

    sources: tuple[SourcePlan, ...]
    unit: WeightUnit
    num_steps: int
    tokens_per_step: int

    @property
    def drawn(self) -> int:
        """Tokens of the whole run."""
        return self.num_steps * self.tokens_per_step

    @property
    def asked(self) -> float | None:
        """Tokens that the weights ask for; None where they are shares, which ask for no number."""
        return None if self.unit == "share" else _asked(self.sources, self.unit)

    @property
    def fitting_steps(self) -> int | None:
        """The largest number of steps that draws no more than the weights ask for (at least 1); None for shares."""
        asked = self.asked
        return None if asked is None else max(1, int(asked * (1 + _ROUNDING) / self.tokens_per_step))

    def describe(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "weights": self.unit,
            "num_steps": self.num_steps,
            "tokens_per_step": self.tokens_per_step,
            "tokens": self.drawn,
            "asked_tokens": self.asked,
            "fitting_steps": self.fitting_steps,
            "sources": [_told(s) for s in self.sources],
        }


def _asked(sources: Sequence[SourcePlan], unit: WeightUnit) -> float:
    """Tokens that weights, in tokens or epochs, ask for."""
    return sum(source.weight * (source.tokens if unit == "epochs" else 1) for source in sources)


def _told(source: SourcePlan) -> dict[str, Any]:
    tree = asdict(source) | {"epochs": source.epochs, "repeated": source.repeated}
    return {key: value for key, value in tree.items() if key not in ("before", "name") or value}


@dataclass(frozen=True)
class PhasePlan:
    """What a phase draws, source by source."""

    name: str
    first_sample: int
    samples: int
    """Of the phase, as far as the run goes."""
    steps: tuple[int, int]
    """First and last that begin in it; (n + 1, n): none does."""
    seq_length: int
    unit: WeightUnit
    sources: tuple[SourcePlan, ...]

    @property
    def tokens(self) -> int:
        """Targets."""
        return self.samples * self.seq_length


@dataclass(frozen=True)
class RunPlan:
    """What a run draws in all its phases."""

    phases: tuple[PhasePlan, ...]
    course: Course
    whole: DrawPlan | None
    """The same as one table, where there is one phase and one size of a step, now and before."""
    contents: tuple[SourceContent, ...]
    names: Mapping[str, str]
    """Prefix -> what the run calls it."""
    ramp: str = ""
    """What a ramp of the batch size means for what is counted in steps; empty: there is none."""

    @property
    def num_steps(self) -> int:
        """Of the whole run."""
        return self.course.num_steps

    @property
    def consumed(self) -> int:
        """Samples that are behind the run."""
        return self.course.consumed[-1]

    @property
    def tokens(self) -> int:
        """Targets of the whole run."""
        return sum(phase.tokens for phase in self.phases)

    @property
    def totals(self) -> list[SourcePlan]:
        """Each source over all phases; what is the same under two paths is one."""
        drawn = _drawn_by_content(self, None)
        of = {content.fingerprint: content for content in self.contents}
        total = max(1, self.tokens)
        return [
            SourcePlan(of[key].prefix, 0.0, of[key].tokens, tokens / total, tokens, name=self.names[of[key].prefix])
            for key, tokens in drawn.items()
        ]

    @property
    def read(self) -> dict[str, int]:
        """Prefix -> tokens that have been read of each of ``totals``."""
        drawn = _drawn_by_content(self, self.consumed)
        return {c.prefix: drawn.get(c.fingerprint, 0) for c in self.contents}

    def describe(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        if self.whole is not None:
            return self.whole.describe()
        phases = [
            {
                "name": phase.name,
                "first_sample": phase.first_sample,
                "samples": phase.samples,
                "steps": list(phase.steps),
                "seq_length": phase.seq_length,
                "tokens": phase.tokens,
                "weights": phase.unit,
                "sources": [_told(source) for source in phase.sources],
            }
            for phase in self.phases
        ]
        read = self.read
        sources = [_told(s) | {"read": read[s.prefix]} for s in self.totals]
        for source in sources:
            del source["weight"]
        return {"num_steps": self.num_steps, "tokens": self.tokens, "phases": phases, "sources": sources}


def _drawn_by_content(plan: RunPlan, end: int | None) -> dict[str, int]:
    """Fingerprint -> tokens of the samples before ``end``; None: of the whole run."""
    of = {content.prefix: content.fingerprint for content in plan.contents}
    drawn: dict[str, int] = {}
    for phase in plan.phases:
        part = 1.0 if end is None else min(1.0, max(0.0, (end - phase.first_sample) / max(1, phase.samples)))
        for source in phase.sources:
            drawn[of[source.prefix]] = drawn.get(of[source.prefix], 0) + round(source.drawn * part)
    return drawn


def plan_run(
    config: Config, contents: Sequence[SourceContent], course: Course | None = None, max_epochs: float | None = None
) -> RunPlan:
    """Work out what each source gives to a run in each of its phases.

    Args:
        config: of the run.
        contents: of its sources.
        course: which samples its steps hold; absent: those of a run that begins with this config.
        max_epochs: as for ``plan_sources``.

    Raises:
        DataError: E345 a source is empty.
        ConfigError: E293 a source would be read more often than ``max_epochs`` over all phases.
    """
    tokens, of = {c.prefix: c.tokens for c in contents}, {c.prefix: c.fingerprint for c in contents}
    course = course or config.course()
    end = course.num_samples
    names = names_by_prefix([list(phase.train) for phase in config.phases], of)
    drawn: dict[str, int] = {}
    phases = []
    for phase in config.phases:
        last = end if phase.end is None else min(phase.end, end)
        samples = max(0, last - phase.first)
        plan = plan_sources(phase.train, phase.unit, tokens, samples, phase.seq_length)
        sources = tuple(replace(s, before=drawn.get(of[s.prefix], 0), name=names[s.prefix]) for s in plan.sources)
        for source in sources:
            drawn[of[source.prefix]] = drawn.get(of[source.prefix], 0) + source.drawn
        steps = course.steps(min(phase.first, end)) + 1, course.steps(last)
        phases.append(PhasePlan(phase.name, phase.first, samples, steps, phase.seq_length, phase.unit, sources))
    whole = None
    if len(phases) == 1 and len(course.batches.ramp) == 1 and course.is_even:
        (only,) = config.phases
        size = course.batches.at(0) * only.seq_length
        whole = plan_sources(only.train, only.unit, tokens, course.num_steps, size, max_epochs)
        whole = replace(whole, sources=tuple(replace(s, name=names[s.prefix]) for s in whole.sources))
    found = RunPlan(tuple(phases), course, whole, tuple(contents), names, _ramp(config, course))
    worst = _most_read(found.totals)
    if max_epochs is not None and worst.epochs > max_epochs * (1 + _ROUNDING):
        raise ConfigError(
            93,
            f"{worst.prefix}: {_rounded(worst.epochs)} epochs over all phases ({worst.drawn:,} tokens drawn of "
            f"{worst.tokens:,})",
            f"must not exceed data.max_epochs={max_epochs:g}",
            "lower its weight in a phase, shorten the run, add data or raise data.max_epochs",
        )
    return found


def plan_sources(
    weights: Mapping[str, float],
    unit: WeightUnit,
    tokens: Mapping[str, int],
    num_steps: int,
    tokens_per_step: int,
    max_epochs: float | None = None,
) -> DrawPlan:
    """Work out what each source gives to a run.

    Args:
        weights: of each prefix, above zero.
        unit: what they are.
        tokens: in each source.
        num_steps: length of the run.
        tokens_per_step: targets of one step, over all ranks.
        max_epochs: how often a source may be read at most; None: any number of times.

    Raises:
        DataError: E345 a source is empty.
        ConfigError: E293 a source would be read more often than ``max_epochs``.
    """
    for prefix in weights:
        if tokens[prefix] == 0:
            raise DataError(45, f"{prefix}.bin", "holds no token", "leave this source out")
    available = [tokens[prefix] for prefix in weights]
    proportions = sampling_weights(list(weights.values()), unit, available)
    total = num_steps * tokens_per_step
    shares = [proportion / sum(proportions) for proportion in proportions]
    plan = DrawPlan(
        tuple(
            SourcePlan(prefix, weight, count, share, round(total * share))
            for (prefix, weight), count, share in zip(weights.items(), available, shares)
        ),
        unit,
        num_steps,
        tokens_per_step,
    )
    worst = _most_read(plan.sources)
    if max_epochs is not None and worst.epochs > max_epochs * (1 + _ROUNDING):
        longest = int(max_epochs * worst.tokens / (worst.share * tokens_per_step))
        shorter = f"shorten the run to train.num_steps={longest}, " if longest else ""
        raise ConfigError(
            93,
            f"data.train[{worst.prefix}]: {_rounded(worst.epochs)} epochs ({worst.drawn:,} tokens drawn of "
            f"{worst.tokens:,})",
            f"must not exceed data.max_epochs={max_epochs:g}",
            f"lower its weight, {shorter}add data or raise data.max_epochs",
        )
    return plan


def format_run_plan(plan: RunPlan) -> str:
    """The plan of a run as a table: one row a source, or a phase and source and then each source over all phases."""
    if plan.whole is not None:
        return format_plan(plan.whole)
    rows = [["phase", "steps", "seq_length", "source", "weight", "share", "drawn", "epochs", "repeated"]]
    for phase in plan.phases:
        first, last = phase.steps
        shown = [phase.name, "none" if last < first else f"{first:,} to {last:,}", f"{phase.seq_length:,}"]
        for source in phase.sources:
            weight = f"{source.weight:,.6g}" + ("" if phase.unit == "share" else f" {phase.unit}")
            after = (source.before + source.drawn) / source.tokens
            epochs = f"{_rounded(source.before / source.tokens)} to {_rounded(after)}"
            rows.append([*shown, source.shown, weight, f"{100 * source.share:.2f} %", f"{source.drawn:,}", epochs,
                         f"{source.repeated:,}"])  # fmt: skip
            shown = ["", "", ""]
    shown = ["all", f"1 to {plan.num_steps:,}", ""]
    for source in plan.totals:
        rows.append([*shown, source.shown, "", f"{100 * source.share:.2f} %", f"{source.drawn:,}",
                     _rounded(source.epochs), f"{source.repeated:,}"])  # fmt: skip
        shown = ["", "", ""]
    lines = [f"plan of {plan.num_steps:,} steps, {plan.tokens:,} tokens in all; each source goes on where the phase "
             "before has left it; repeated: drawn beyond the first pass", *align(rows, indent="  ")]  # fmt: skip
    if plan.consumed:
        read = plan.read
        told = ", ".join(f"{s.shown} {_rounded(read[s.prefix] / s.tokens)}" for s in plan.totals)
        lines.append(f"read so far, at sample {plan.consumed:,}, in epochs: {told}")
    return "\n".join(lines + _remarks(plan))


def _ramp(config: Config, course: Course) -> str:
    batches = course.batches
    if len(batches.ramp) == 1:
        return ""
    full, warmup = batches.ramp[-1][0], config.warmup_steps
    return (
        f"note: steps grow from {batches.at(0):,} to {config.train.global_batch_size:,} samples, which step "
        f"{course.steps(full) + 1:,} is the first to have; train.num_steps and the learning rate count steps of "
        f"whatever size: the warm-up of {warmup:,} steps ends at sample {course.samples(warmup):,}"
    )


def _remarks(plan: RunPlan) -> list[str]:
    lines = [plan.ramp] if plan.ramp else []
    for phase in (p for p in plan.phases if p.unit != "share" and p.samples):
        asked = _asked(phase.sources, phase.unit)
        if abs(phase.tokens - asked) > phase.seq_length:
            lines.append(
                f"note: {phase.name} with weights={phase.unit} asks for {asked:,.0f} tokens; it draws "
                f"{phase.tokens / asked:.4g} times that, from every source; tokens={asked:.0f} fits"
            )
    lines += [f"note: {p.name} begins behind the end of the run" for p in plan.phases if not p.samples]
    return lines + _many(plan.totals)


def _many(sources: Sequence[SourcePlan]) -> list[str]:
    """A remark where a source is read more often than does any good."""
    worst = _most_read(sources)
    if worst.epochs <= MANY_EPOCHS:
        return []
    return [
        f"note: {worst.shown} is read {worst.epochs:,.0f} times: beyond some {MANY_EPOCHS} passes a text teaches "
        "next to nothing new (arXiv 2305.16264); add data, lower its weight or shorten the run"
    ]


def _most_read(sources: Sequence[SourcePlan]) -> SourcePlan:
    return max(sources, key=lambda source: source.epochs)


def format_plan(plan: DrawPlan) -> str:
    """The plan as a table of one row a source, and a remark where the run's length is not what the weights ask for."""
    header = ["source", "tokens", f"weight ({plan.unit})", "share", "drawn", "epochs", "repeated"]
    rows = [
        [s.shown, f"{s.tokens:,}", f"{s.weight:,.6g}" if s.weight < 1e6 else f"{s.weight:,.0f}",
         f"{100 * s.share:.2f} %", f"{s.drawn:,}", _rounded(s.epochs), f"{s.repeated:,}"]
        for s in plan.sources
    ]  # fmt: skip
    if len(rows) > 1:
        available, repeated = sum(s.tokens for s in plan.sources), sum(s.repeated for s in plan.sources)
        rows.append(["all", f"{available:,}", "", "", f"{plan.drawn:,}", _rounded(plan.drawn / available),
                     f"{repeated:,}"])  # fmt: skip
    lines = [
        f"plan of {plan.num_steps:,} steps of {plan.tokens_per_step:,} tokens, {plan.drawn:,} in all, from step 1; "
        "repeated: drawn beyond the first pass"
    ]
    lines += align([header, *rows], indent="  ")
    asked = plan.asked
    if asked is not None and plan.fitting_steps != plan.num_steps:
        lines.append(
            f"note: data.weights={plan.unit} asks for {asked:,.0f} tokens; this run draws {plan.drawn / asked:.4g} "
            f"times that, from every source; train.num_steps={plan.fitting_steps} fits"
        )
    return "\n".join(lines + _many(plan.sources))


def _rounded(epochs: float) -> str:
    """Three digits after the point, but a little never reads as none."""
    return f"{epochs:.3f}" if epochs >= 0.001 or epochs == 0 else f"{epochs:.1e}"
