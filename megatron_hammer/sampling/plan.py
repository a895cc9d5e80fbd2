"""What a run will draw from each source: worked out before it starts, from numbers alone.

::

    data.train {prefix: weight} + data.weights --> sampling_weights --> shares of the samples, by which TrainData draws
    shares, tokens of each source, length of the run --> make_plan --> tokens, epochs and repeats of each source

A weight is a share of the samples, a number of tokens, or a number of epochs (passes over the source). The length of a
run is ``train.num_steps`` whatever the weights say: the sources are drawn in the proportions that the weights ask for,
all scaled by the same factor, and the plan says so and names the number of steps that would make it 1. So a run that is
extended, or cut short, keeps the order of its samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.tables import align

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
    """Tokens (targets) that the run reads from it; exact to within a sample or two of the mix."""

    @property
    def epochs(self) -> float:
        """Passes over the source."""
        return self.drawn / self.tokens

    @property
    def repeated(self) -> int:
        """Tokens drawn beyond the first pass."""
        return max(0, self.drawn - self.tokens)


@dataclass(frozen=True)
class Plan:
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
        if self.unit == "share":
            return None
        return sum(s.weight * (s.tokens if self.unit == "epochs" else 1) for s in self.sources)

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
            "sources": [asdict(s) | {"epochs": s.epochs, "repeated": s.repeated} for s in self.sources],
        }


def make_plan(
    weights: Mapping[str, float],
    unit: WeightUnit,
    tokens: Mapping[str, int],
    num_steps: int,
    tokens_per_step: int,
    max_epochs: float | None = None,
) -> Plan:
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
    plan = Plan(
        tuple(
            SourcePlan(prefix, weight, count, share, round(total * share))
            for (prefix, weight), count, share in zip(weights.items(), available, shares)
        ),
        unit,
        num_steps,
        tokens_per_step,
    )
    worst = max(plan.sources, key=lambda source: source.epochs)
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


def format_plan(plan: Plan) -> str:
    """The plan as a table of one row a source, and a remark where the run's length is not what the weights ask for."""
    header = ["source", "tokens", f"weight ({plan.unit})", "share", "drawn", "epochs", "repeated"]
    rows = [
        [s.prefix, f"{s.tokens:,}", f"{s.weight:,.6g}" if s.weight < 1e6 else f"{s.weight:,.0f}",
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
    worst = max(plan.sources, key=lambda source: source.epochs)
    if worst.epochs > MANY_EPOCHS:
        lines.append(
            f"note: {worst.prefix} is read {worst.epochs:,.0f} times: beyond some {MANY_EPOCHS} passes a text teaches "
            "next to nothing new (arXiv 2305.16264); add data, lower its weight or shorten the run"
        )
    return "\n".join(lines)


def _rounded(epochs: float) -> str:
    """Three digits after the point, but a little never reads as none."""
    return f"{epochs:.3f}" if epochs >= 0.001 or epochs == 0 else f"{epochs:.1e}"
