"""The facts about a run that its model card states: figures only, no path, no name of a machine.

::

    checkpoint: config, tensors, counts of sources   --+
    metrics.jsonl up to the checkpoint's step        --+--> CardFacts --> card.py
    evaluations.jsonl, certificate.json              --+

Whatever is not there (a run that was imported has no metrics) is None or empty, and the card leaves it out. Needs no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.reading import parse_json
from megatron_hammer.checkpoint.manifest import Manifest, saved_model
from megatron_hammer.config import Config, DataConfig, config_from_tree
from megatron_hammer.metrics.metrics_file import METRICS, read_lines, split_key
from megatron_hammer.model.parameters import count_parameters
from megatron_hammer.sampling.mixes import PhaseMix, phase_mixes
from megatron_hammer.sampling.sources import ENDING, source_names
from megatron_hammer.train.evaluator import EVALUATIONS

MEAN_STEPS = 100  # of the training loss that the card states: one step's is noise


@dataclass(frozen=True)
class CardFacts:
    """All that the card is made of."""

    config: Config
    """Resolved, with its model; its paths are not for the card."""
    parameters: int
    step: int
    tokens: int | None
    """That training has consumed."""
    phases: tuple[PhaseMix, ...]
    loss: float | None
    """Mean of the last ``MEAN_STEPS`` steps."""
    valid: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Set -> figure -> value, of the last evaluation."""
    valid_step: int | None = None
    evaluations: Mapping[str, float] = field(default_factory=dict)
    """Of train.evaluator, at ``evaluations_step``."""
    evaluations_step: int | None = None
    certificate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Whether the run has done all its steps."""
        return self.step >= self.config.train.num_steps


def gather_facts(manifest: Manifest, run: Path | None, certificate: Mapping[str, Any]) -> CardFacts:
    """The facts of a checkpoint.

    Args:
        run: the folder with metrics.jsonl and evaluations.jsonl; None where the checkpoint lies alone.
    """
    config = replace(config_from_tree(manifest.config), model=saved_model(manifest))
    lines = [] if run is None else _lines(run / METRICS, manifest.step)
    recent: list[dict[str, Any]] = [parse_json(line) for line in lines[-MEAN_STEPS:]]
    losses = [line["loss"] for line in recent if _is_figure(line.get("loss"))]
    valid_step, valid = None, dict[str, dict[str, float]]()
    for line in reversed(lines):
        if b'"valid/' in line:
            found = parse_json(line)
            valid_step, valid = int(found["step"]), figures_of(found, "valid")
            break
    evaluated = [] if run is None else _lines(run / EVALUATIONS, manifest.step)
    evaluation = parse_json(evaluated[-1]) if evaluated else {}
    tokens = recent[-1].get("consumed_tokens") if recent else None
    return CardFacts(
        config=config,
        parameters=count_parameters(config.model),
        step=manifest.step,
        tokens=int(tokens) if isinstance(tokens, int | float) else None,
        phases=_phases(config.data, lines),
        loss=sum(losses) / len(losses) if losses else None,
        valid=valid,
        valid_step=valid_step,
        evaluations={
            key.removeprefix("evaluation/"): value for key, value in evaluation.items()
            if key.startswith("evaluation/") and isinstance(value, int | float)
        },
        evaluations_step=evaluation.get("step"),
        certificate=certificate,
    )  # fmt: skip


def _lines(path: Path, up_to: int) -> list[bytes]:
    """The lines of a file of steps, up to one; none where it is not there."""
    try:
        return [text for step, text in read_lines(path).lines if step <= up_to]
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise DataError(80, str(path), rule, "mend its permissions, or move it away") from None


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def figures_of(line: Mapping[str, Any], kind: str) -> dict[str, dict[str, float]]:
    """The figures of a kind (``valid``, ``source``) as name -> figure -> value; what is not finite is left out."""
    found: dict[str, dict[str, float]] = {}
    for key, value in line.items():
        of, name, figure = split_key(key)
        if of == kind and _is_figure(value):
            found.setdefault(name, {})[figure] = value
    return found


def _tokens_read(lines: Sequence[bytes], names: Sequence[str]) -> dict[str, int]:
    """Tokens of each source up to the last line; a line has those of the sources that gave something to its step."""
    found: dict[str, int] = {}
    for line in reversed(lines):
        if len(found) == len(names):
            break
        if b'"source/' in line:
            for name, figures in figures_of(parse_json(line), "source").items():
                if name in names and "tokens" in figures:
                    found.setdefault(name, int(figures["tokens"]))
    return found


def _phases(data: DataConfig, lines: Sequence[bytes]) -> tuple[PhaseMix, ...]:
    """The mixes of the run; sources go by the names that metrics.jsonl has, as far as these hide their folders."""
    prefixes = data.train_prefixes
    read = _tokens_read(lines, source_names(prefixes))
    return phase_mixes(data, read, dict(zip(prefixes, _without_folders(prefixes))))


def _without_folders(prefixes: Sequence[str]) -> list[str]:
    """The name of each file without its ending; equal ones are numbered."""
    ends = [Path(prefix).name.removesuffix(ENDING) or "data" for prefix in prefixes]
    return [end if ends.count(end) == 1 else f"{end} ({ends[: i + 1].count(end)})" for i, end in enumerate(ends)]
