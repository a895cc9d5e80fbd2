"""Gathers for a report what the files in a run's folder say; what cannot be read becomes a note on the page.

::

    starts.jsonl, the newest checkpoint --> config, environment     metrics.jsonl, evaluations.jsonl --> curves
    incidents/, ledger.jsonl            --> incidents               generations.jsonl                --> texts

A run that is alive is read as it is at this moment; nothing in its folder is changed. Needs no torch.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.errors import DataError, HammerError, os_remedy
from megatron_hammer.base.locks import is_locked
from megatron_hammer.base.reading import open_regular, parse_json, read_regular
from megatron_hammer.checkpoint.folder import find_checkpoints, newest_checkpoint, step_of
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.config.phases import Course
from megatron_hammer.metrics.generations import GENERATIONS, Generation, read_generations
from megatron_hammer.metrics.metrics_file import METRICS, split_key
from megatron_hammer.metrics.plot import run_near
from megatron_hammer.metrics.starts import read_starts
from megatron_hammer.report.curves import MetricsReader
from megatron_hammer.sampling.ledger import LEDGER, Rewind, read_ledger
from megatron_hammer.sampling.mixes import PhaseMix, phase_mixes
from megatron_hammer.train.evaluator import EVALUATIONS
from megatron_hammer.train.output import LOCK
from megatron_hammer.train.prepare import VERSIONS

MOST_INCIDENTS = 200
"""Read and shown, the last ones."""
FRESH_SECONDS = 900.0
"""After its last line a run on another machine may be alive."""
MAX_INCIDENT_BYTES = 4 * 2**20
"""An incident has some samples of its step and what each rank found, some kilobytes."""


@dataclass
class RunFacts:
    """What is known of a run; everything but ``folder`` and ``metrics`` may be missing."""

    folder: Path
    metrics: MetricsReader
    evaluations: MetricsReader | None = None
    tree: dict[str, Any] = field(default_factory=dict)
    """The config as plain values."""
    config: Config | None = None
    """The same, where this version understands it."""
    mixes: tuple[PhaseMix, ...] = ()
    course: Course | None = None
    """Which samples the steps to come will hold, where that is known."""
    phase_steps: tuple[int, ...] = ()
    """The step with which each begins."""
    checkpoints: tuple[int, ...] = ()
    """Their steps."""
    starts: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    """Of the newest checkpoint: for a run without ``starts``."""
    layout: dict[str, Any] = field(default_factory=dict)
    incidents: tuple[dict[str, Any], ...] = ()
    """As their files have them, with ``file`` beside."""
    incidents_left_out: int = 0
    ledger: tuple[Rewind, ...] = ()
    generations: tuple[Generation, ...] = ()
    is_alive: bool | None = None
    """Whether a process holds the run's lock; None where that is unknown."""
    written: datetime | None = None
    """When metrics.jsonl was last written to."""
    read_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name or str(self.folder)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run."""
        steps = self.tree.get("train", {}).get("num_steps") if isinstance(self.tree.get("train"), dict) else None
        return steps if isinstance(steps, int) and not isinstance(steps, bool) else None

    @property
    def is_complete(self) -> bool:
        """Whether its last step is done."""
        return self.num_steps is not None and self.metrics.last_step >= self.num_steps


def open_metrics(folder: Path) -> MetricsReader:
    """The metrics of a run, not read yet.

    Raises:
        DataError: E380: there is no such run.
    """
    path = folder / METRICS
    if not path.is_file():
        rule = "is not there" if not os.path.lexists(path) else "is no file"
        raise DataError(80, str(path), rule, run_near(folder))
    return MetricsReader(path)


def gather_runs(folder: Path, metrics: MetricsReader, advance: Callable[[int], None] = lambda count: None) -> RunFacts:
    """Read everything that there is.

    Args:
        metrics: of an earlier call, or of ``open_metrics``; what has come since is read.
        advance: called with the number of bytes of metrics.jsonl that were read.

    Raises:
        DataError: E380 metrics.jsonl cannot be read; E381 it holds no step.
    """
    try:
        metrics.read(advance)
        written = datetime.fromtimestamp((folder / METRICS).stat().st_mtime, UTC)
    except OSError as error:
        raise DataError(80, str(metrics.path), f"could not be read ({error.strerror})", os_remedy(error)) from None
    if not metrics.last_step:
        what = "holds no finished step" + (f", and {metrics.damaged} lines that are none" if metrics.damaged else "")
        raise DataError(81, str(metrics.path), what, "wait until the run has done a step")
    facts = RunFacts(folder, metrics, written=written)
    for part in (_starts, _checkpoints, _settings, _evaluations, _incidents, _ledger, _generations):
        try:
            part(facts)
        except (HammerError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            facts.notes.append(" ".join(str(error).split()) or type(error).__name__)
    facts.is_alive = _is_alive(facts)
    return facts


def _is_alive(facts: RunFacts) -> bool | None:
    """Whether the run goes on; a lock that a process of another machine holds does not show on this one."""
    if held := is_locked(facts.folder / LOCK):
        return held
    host = facts.starts[-1]["environment"].get("host") if facts.starts else None
    is_fresh = facts.written is not None and (facts.read_at - facts.written).total_seconds() < FRESH_SECONDS
    return None if is_fresh and host != platform.node() else held


def _starts(facts: RunFacts) -> None:
    facts.starts = tuple(read_starts(facts.folder))
    if facts.starts and isinstance(facts.starts[-1].get("config"), dict):
        facts.tree = facts.starts[-1]["config"]


def _checkpoints(facts: RunFacts) -> None:
    facts.checkpoints = tuple(step_of(path) for path in find_checkpoints(facts.folder))
    if not facts.checkpoints:
        return
    newest: Manifest | None = newest_checkpoint(facts.folder, facts.notes.append)
    if newest is not None:
        versions = newest.state.get(VERSIONS)
        facts.versions = {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}
        facts.layout = vars(newest.layout)
        facts.tree = facts.tree or newest.config


def _settings(facts: RunFacts) -> None:
    """The config as an object, and the phases with where they begin."""
    if not facts.tree:
        return
    facts.config = config = config_from_tree(facts.tree, facts.notes.append)
    read = {}
    for key, value in facts.metrics.last.items():
        kind, name, figure = split_key(key)
        if (kind, figure) == ("source", "tokens"):
            read[name] = int(value)
    facts.mixes = phase_mixes(config.data, read)
    consumed = facts.metrics.last.get("consumed_samples")
    facts.course = config.course(facts.metrics.last_step, consumed) if isinstance(consumed, int) else config.course()
    facts.phase_steps = tuple(_first_step(facts.metrics, facts.course, phase.first) for phase in config.phases)


def _first_step(metrics: MetricsReader, course: Course, sample: int) -> int:
    """The first step that begins at a sample or behind it; of steps that were done, by their lines."""
    steps, consumed = metrics.values("consumed_samples")
    at = int(np.searchsorted(consumed, np.float32(sample)))
    return int(steps[at]) + 1 if sample > 0 and at < len(steps) else course.steps(sample) + 1


def _evaluations(facts: RunFacts) -> None:
    path = facts.folder / EVALUATIONS
    if path.is_file():
        reader = MetricsReader(path)
        reader.read()
        facts.evaluations = reader


def _incidents(facts: RunFacts) -> None:
    folder = facts.folder / "incidents"
    paths = sorted(folder.glob("step-*.json")) if folder.is_dir() else []
    facts.incidents_left_out = max(0, len(paths) - MOST_INCIDENTS)
    found = []
    for path in paths[-MOST_INCIDENTS:]:
        tree: dict[str, Any] = {"file": path.name, "step": step_of(path)}
        try:
            value = parse_json(read_regular(path, MAX_INCIDENT_BYTES, follow=False))
            tree |= value if isinstance(value, dict) else {"finding": "the file holds no incident"}
        except (OSError, ValueError) as error:
            tree["finding"] = f"the file could not be read ({error})"
        if type(tree["step"]) is not int:
            tree["step"] = step_of(path)
        found.append(tree)
    facts.incidents = tuple(sorted(found, key=lambda tree: tree["step"]))


def _ledger(facts: RunFacts) -> None:
    facts.ledger = read_ledger(facts.folder / LEDGER) or ()


def _generations(facts: RunFacts) -> None:
    path = facts.folder / GENERATIONS
    if path.is_file():
        with open_regular(path, follow=False) as file:
            facts.generations = tuple(read_generations(file))
