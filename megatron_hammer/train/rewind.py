"""Goes back from a bad step to a checkpoint, and on without the samples around it (``train.on_spike=rewind``).

What PaLM's authors did by hand (arXiv 2204.02311, 5.1): restart from a checkpoint before the spike, and leave out the
steps that were seen before and during it. They found that the same samples from another checkpoint made no spike: it
takes both, and other samples cure it. Here::

    step        40 | 41 42 43 44 45    45 is a spike, train.rewind_skip_steps_before=1: the window is 44 45
    checkpoint  40                     the newest before the window
    now         40 | 41 42 43 | 44 ... 41 to 43 read what they have read, 44 what 46 would have read

The order in which this is done makes it safe to be killed at any moment: first the lines of metrics.jsonl that will be
taken back are kept aside, then the ledger gets its line (``sampling/ledger.py``), durably, by which the rewind has
happened, and then checkpoints of steps in the window are set aside. A start finds the ledger and goes on as the run
itself does now: from the newest checkpoint that holds nothing which was taken back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import NonFiniteError
from megatron_hammer.base.files import replace_file, set_aside
from megatron_hammer.checkpoint.folder import find_checkpoints, open_checkpoint, readable_checkpoints, step_of
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.config import Config
from megatron_hammer.config.phases import Course, phase_at
from megatron_hammer.metrics.metrics_file import METRICS, read_lines
from megatron_hammer.parallel.agreement import all_or_none, gather_values
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.ledger import LEDGER, Finding, Ledger, Range, Rewind, ledger_bytes
from megatron_hammer.sampling.phases import Skips
from megatron_hammer.sampling.samples import TrainData
from megatron_hammer.train.changes import FRESH
from megatron_hammer.train.course import recorded
from megatron_hammer.train.incident_file import incident_path
from megatron_hammer.train.prepare import Prepared, StartingPoint, checkpoints_folder, settle
from megatron_hammer.train.start import name_starting_point, open_starting_point

LOOKED_FOR = 64  # samples ahead for each that is unwanted: a source of which a phase draws less is not waited for
LOOKED_AT_ONCE = 1024  # samples; chosen by eye


@dataclass(frozen=True)
class BadStep:
    """What a run goes back from."""

    step: int
    finding: Finding
    first_sample: int
    """Of its global batch: the number in the run."""
    text: str
    """Step, loss, norm and what is wrong with them, for people."""


def go_back(
    bad: BadStep, prepared: Prepared, data: TrainData, ctx: ParallelContext, say: Callable[[str], None]
) -> Prepared:
    """Record that the run goes back; what it begins again with, the same on all ranks. Communicates over the world.

    Raises:
        NonFiniteError: on all ranks, E905: it has gone back to this checkpoint too often.
        HammerError: on all ranks: the ledger cannot be written, or a rank cannot go on from there.
    """
    names = None
    with all_or_none(ctx, "recording a rewind"):
        if ctx.world.rank == 0:
            names = _record(bad, prepared, data, say)
    names = gather_values(ctx, names)[0]
    assert prepared.inputs is not None
    accepted = [name for name in prepared.accepted if name != FRESH]  # which was for the folder as the start found it
    with all_or_none(ctx, "going on after a rewind"):
        start = open_starting_point(names, prepared.config, ctx.world.rank)
        settled = settle(prepared.inputs, start, accepted)  # may open the datasets again
    return settled


def _record(bad: BadStep, prepared: Prepared, data: TrainData, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything that rank 0 writes, in the order that the module states; what it tells the others."""
    config, done = prepared.config, prepared.rewinds
    output = Path(config.train.output)
    target = _target(checkpoints_folder(config), bad.step - config.train.rewind_skip_steps_before, bad.step)
    back_to = 0 if target is None else target.step
    _refuse_another(bad, back_to, done, config.train.max_rewinds)
    first = 0 if target is None else target.state["consumed_samples"]
    course = recorded(config, bad.step - 1, bad.first_sample)
    skipped = left_out(*_window(bad, config, course, first), course.num_samples, data)
    rewind = Rewind(len(done) + 1, bad.step, bad.finding, back_to, skipped)
    kept = _keep_lines(output, back_to, incident_path(config, bad.step, len(done)).with_suffix(".metrics.jsonl"))
    ledger: Ledger = (*done, rewind)
    replace_file(output / LEDGER, ledger_bytes(ledger))
    aside = [set_aside(path).name for path in find_checkpoints(output) if back_to < step_of(path)]
    where = "the beginning" if target is None else str(target.folder)
    ranges = ", ".join(f"[{start}, {end})" for start, end in rewind.skipped)
    say(
        f"{bad.text}: rewind {rewind.number}, back to {where}; samples {ranges} of the order are left out "
        f"({output / LEDGER})"
    )
    if kept is not None:
        say(f"metrics of steps {back_to + 1} to {bad.step} are kept as {kept}")
    for name in aside:
        say(f"kept as {name}: a checkpoint with steps of the window")
    init_from = config.checkpoint.init_from if target is None else None
    first_weights = None if init_from is None else open_checkpoint(init_from)
    return name_starting_point(StartingPoint(target, first_weights, rewinds=ledger), config)


def _target(checkpoints: Path, window: int, bad: int) -> Manifest | None:
    """The newest checkpoint before a window, which begins with that step; None where there are none.

    Where all are in the window, as few are kept, the oldest: of the window is left out what lies behind it.
    """
    found = None
    for manifest in readable_checkpoints(checkpoints):
        if manifest.step < bad:
            found = manifest
        if manifest.step < window:
            break
    return found


def _refuse_another(bad: BadStep, back_to: int, done: Ledger, most: int) -> None:
    times = sum(rewind.back_to_step == back_to for rewind in done)
    if times >= most:
        raise NonFiniteError(
            5,
            bad.text,
            f"once more, after {times} rewinds to step {back_to} (train.max_rewinds={most})",
            "see OUT/incidents; lower optimizer.lr, or raise train.rewind_skip_steps_after and train.max_rewinds",
        )


def _window(bad: BadStep, config: Config, course: Course, first: int) -> Range:
    """The numbers of the samples to leave out: none that the checkpoint, whose next is ``first``, has read.

    A window spans phases, but not to where samples have another length: these are cut from what others have left.
    """
    train, phases = config.train, config.phases
    length = phase_at(phases, bad.first_sample).seq_length
    others = [phase for phase in phases if phase.seq_length != length]
    start = max(first, course.samples(max(0, bad.step - 1 - train.rewind_skip_steps_before)))
    start = max([start, *(p.end for p in others if p.end is not None and p.end <= bad.first_sample)])
    end = course.samples(bad.step + train.rewind_skip_steps_after)
    return start, min([end, *(p.first for p in others if p.first > bad.first_sample)])


def left_out(start: int, end: int, total: int, data: TrainData) -> tuple[Range, ...]:
    """Places in the order that a run of ``total`` samples leaves out so as not to read samples [start, end) any more.

    Within a phase these are the places of the samples. A phase that leaves something out goes on with what comes next
    of its sources, and those behind it begin there. So of a window that spans phases, and of what has been left out
    before in later ones, each sample is looked for where it comes now::

        order     A A A A A A | B B B B B B        the window: w, which A has read, and v, which B has
        before    . . . . w w | v v . . . .
        now       . . . . w w a v . | v . .        A reads three more and meets a v; B meets the other
    """
    order, whole, pieces = data.order, data.order.whole, list(data.order.skips.pieces(start, end - start))
    phase_end = whole.span_at(pieces[0][0]).end
    behind = order.skips.end(total)  # of what the run comes to
    later = [part for part in order.skips.ranges if phase_end is not None and phase_end <= part[0] < behind]
    if phase_end is None or (sum(pieces[-1]) <= phase_end and not later):
        return tuple((place, place + count) for place, count in pieces)
    end = min(end, total)
    unwanted = set(order.ids(start, end - start))
    for place, until in later:
        unwanted.update(whole.ids(place, until - place))
    found: list[Range] = []
    number, ahead = start, max(end, *(until for _, until in later), 0)
    while unwanted and number < min(total, ahead + LOOKED_FOR * len(unwanted)):
        now = data.with_skips(Skips(tuple(sorted((*order.skips.ranges, *found))))).order
        phase_end = now.whole.span_at(now.skips.place(number)).end
        count = min(max(end - start, LOOKED_AT_ONCE), total - number)
        places = [at + i for at, taken in now.skips.pieces(number, count) for i in range(taken)]
        places = [place for place in places if phase_end is None or place < phase_end]
        names = now.ids(number, len(places))
        met = [i for i, name in enumerate(names) if name in unwanted]
        found += [(places[i], places[i] + 1) for i in met]
        unwanted.difference_update(names)
        number += met[0] if met else len(places)
    return _joined(sorted(found))


def _joined(ranges: list[Range]) -> tuple[Range, ...]:
    """The same places in as few ranges as can be."""
    joined: list[Range] = []
    for first, end in ranges:
        if joined and joined[-1][1] == first:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((first, end))
    return tuple(joined)


def _keep_lines(output: Path, back_to: int, kept: Path) -> Path | None:
    """Write the metrics of steps after ``back_to`` to a file of their own; None where there are none."""
    try:
        lines = read_lines(output / METRICS).content(after=back_to)
    except OSError:  # which costs no run (metrics_file.py)
        return None
    if not lines:
        return None
    kept.parent.mkdir(parents=True, exist_ok=True)
    replace_file(kept, lines)
    return kept
