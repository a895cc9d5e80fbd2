"""The training loop: resume, train, evaluate, save and report, in visible order.

A step is launched and its numbers are read later: on a GPU when the next step has been launched, so that the device
never waits for Python (``late_numbers.py``). All ranks read the same numbers in the same order, and so take the same
decisions.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import EXIT_STOPPED_BY_SIGNAL, NonFiniteError
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.folder import step_of
from megatron_hammer.config import Config
from megatron_hammer.config.phases import phase_at, tokens_before
from megatron_hammer.costs.comparison import Prediction, device_name, peak_of_process
from megatron_hammer.costs.flops import flops_per_token, peak_tflops
from megatron_hammer.kernels.ranges import RangeOf, no_range
from megatron_hammer.metrics.metrics_file import finite
from megatron_hammer.metrics.reporter import Reporter
from megatron_hammer.parallel.collectives import all_reduce, broadcast, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.ledger import Finding
from megatron_hammer.sampling.loader import ReadAhead, micro_batches
from megatron_hammer.sampling.samples import ValidData, open_train_data, open_valid_data
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.corruption import CorruptionCheck
from megatron_hammer.train.cuda_graph import give_up, micro_batch_runner
from megatron_hammer.train.drift import DriftCheck
from megatron_hammer.train.evaluate import ValidResult, evaluate
from megatron_hammer.train.evaluator import Evaluator
from megatron_hammer.train.garbage import garbage_collected_by_hand
from megatron_hammer.train.health import Health, Limits
from megatron_hammer.train.incident_file import incident_path
from megatron_hammer.train.incidents import write_incident
from megatron_hammer.train.late_numbers import LateNumbers
from megatron_hammer.train.output import LockedOutput
from megatron_hammer.train.prepare import Prepared
from megatron_hammer.train.rewind import BadStep, go_back
from megatron_hammer.train.saver import MASK, Saver
from megatron_hammer.train.source_sums import Sources, sizes_of, source_figures
from megatron_hammer.train.state import RunState, check_state, load_state, upcoming
from megatron_hammer.train.step import Checks, StepReport, train_step
from megatron_hammer.train.stopping import CutShort, StopCheck

# Steps between a step and the reading of its numbers: on a GPU the next step is launched before the last one is read,
# so that the device never waits for Python; on a CPU a step has been computed when its call returns.
READ_LAG_STEPS = {"cpu": 0, "cuda": 1}

# Steps between garbage collections, on all ranks at once: a rank that stops for one has the others wait at the next
# collective. A step leaves little behind (nothing; with full recompute seven small objects a layer and micro-batch, no
# tensor), so that 100 steps take milliseconds to go through.
COLLECT_EVERY_STEPS = 100


@dataclass(frozen=True)
class PendingStep:
    """A step that has been launched and whose numbers nobody has read yet."""

    state: RunState
    """That after it."""
    first_sample: int
    consumed: Mapping[int, int]
    """Number of each source that gave something to it -> targets read from it up to here."""
    report: StepReport
    numbers: LateNumbers
    """Loss, norm, whether it was applied and the table of sources; and the words of all ranks: how many had received a
    stop signal, and what they had to say of a save in flight; whether each check of the step has found something."""
    saving: int
    """How far that save was then (``Saver.phase``)."""
    limits: Limits | None
    """What its loss and its norm may be at most."""


def every(interval: int | None, step: int, config: Config) -> bool:
    """Whether something that happens every ``interval`` steps, and always after the last one, happens now."""
    return step == config.train.num_steps or (interval is not None and step % interval == 0)


class TrainLoop:
    """One process's part of a run: the objects that live as long as the loop.

    Within ``reporting`` it goes on by ``advance``: in one call, or in many (``training.py``); that is the same loop.

    Args:
        range_of: entered around the parts of a step, for a profiler.
        output: on rank 0, the output folder whose lock it holds.
        prediction: on rank 0, what the run is held against after some steps.
    """

    def __init__(
        self,
        prepared: Prepared,
        ctx: ParallelContext,
        range_of: RangeOf = no_range,
        output: LockedOutput | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        config = prepared.config
        self.prepared, self.config, self.ctx = prepared, config, ctx
        self.phases, self.batch_sizes = config.phases, config.batch_sizes
        resume = prepared.resume
        self.phase = phase_at(self.phases, 0 if resume is None else resume.state["consumed_samples"])
        shaped = config.in_phase(self.phase)
        self.stages, self.optimizer = build_stages(shaped, ctx, range_of, initial=prepared.begins_anew)
        self.micro_batch = micro_batch_runner(config.kernels, self.optimizer.store.of_stages[0])
        self.state, sums = load_state(prepared, self.optimizer, ctx)
        self.reporter: Reporter | None = None
        self.heard: Callable[[Mapping[str, Any]], None] = lambda line: None
        """Called with each line of metrics.jsonl, on rank 0; to be set before ``reporting`` is entered."""
        self.newest = None if resume is None else resume.folder
        """The newest checkpoint of this run; known to rank 0."""
        self.evaluator: Evaluator | None = None
        self.prediction = prediction
        self.saver = Saver(
            prepared, self.optimizer, ctx, output, self._say, self._note, self._sync_metrics, self._committed
        )
        self.drift = DriftCheck(config, self.optimizer, ctx) if config.train.drift_check_interval_steps else None
        twice = config.train.sdc_check_interval_steps
        self.corruption = CorruptionCheck(config, self.stages, self.optimizer, ctx) if twice else None
        self.first_step = self.state.step + 1
        told = say if ctx.world.rank == 0 else lambda text: None
        course = config.course(self.state.step, self.state.consumed_samples)
        self.num_samples = course.num_samples
        """Of the whole run."""
        self.data = open_train_data(config, told, prepared.rewinds, prepared.tokenizer, prepared.absent, course)
        self.data.prepare(self.state.consumed_samples, self.batch_sizes.at(self.state.consumed_samples))
        self.state = self.state.counted(self.data)
        b, samples = config.train.micro_batch_size, ctx.samples
        self.batches = ReadAhead(
            partial(micro_batches, self.data, micro_batch_size=b, dp_rank=samples.rank, dp_size=samples.size)
        )
        self.valid = open_valid_data(config)
        tokenizer = prepared.tokenizer
        sizes: Tensor | None = None
        if tokenizer is not None:
            assert config.model.vocab_size is not None
            sizes = sizes_of(tokenizer, config.model.vocab_size, self.data.sentinel_ids).to(ctx.device)
        self.sources = Sources(len(self.data.sources), sizes)
        self.pending: list[PendingStep] = []
        self.copies = torch.cuda.Stream(ctx.device) if ctx.device.type == "cuda" else None
        """On which numbers come to the host (``late_numbers.py``)."""
        self.health = Health(config.train.spike_window_steps, config.train.spike_z_score)
        self.health.load(self.state.health or {})
        self.save_is_due = False  # it was put off while steps were skipped
        self.rewound: Prepared | None = None
        """With what the run goes on after it has gone back; None while it has not."""
        check_state(prepared, self.state, self.data, self.optimizer, ctx, sums, say)
        self.clock = time.perf_counter()

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """While the block runs, the run has its outputs: the files and trackers of rank 0, the evaluator, the saver.

        At its end the run is over: nothing of it goes on in the background.
        """
        with (
            closing(self.batches),
            self._reporter() as self.reporter,
            closing(self.saver),
            self._evaluator() as self.evaluator,
        ):
            yield
            give_up(self.micro_batch)  # after an error nobody ends groups of ranks, and a GPU may not answer

    def advance(self, last: int, stop: Callable[[], bool], save_when_stopped: bool = True) -> int:
        """The loop, up to the end of step ``last``; within ``reporting``. Communicates: all ranks call it alike.

        Args:
            stop: whether this rank has been asked to stop.
            save_when_stopped: False: the caller keeps the run, which may go on.

        Returns:
            0; 75 where a rank has been asked to stop, and this step is complete.
        """
        config = self.config
        self.stop = StopCheck(stop, self.ctx)
        with garbage_collected_by_hand():
            if self.state.owed and not self._pay():
                return EXIT_STOPPED_BY_SIGNAL
            self.clock = time.perf_counter()
            for step in range(self.state.step + 1, last + 1):
                report = self._step(step)
                self._launched(report, stop())
                evaluates = bool(self.valid) and every(config.train.eval_interval_steps, step, config)
                saves = every(config.checkpoint.save_interval_steps, step, config) or self.saver.is_due(step)
                saves = saves or self.save_is_due
                lag = 0 if evaluates or saves or step == last else READ_LAG_STEPS[self.ctx.device.type]
                stopped = self._read(lag, self._evaluate if evaluates else None)
                if self.rewound is not None:
                    return EXIT_STOPPED_BY_SIGNAL if stopped else 0
                if saves or stopped or self.saver.must_save:
                    self._read(0)  # every line up to here is written before the checkpoint is committed
                    if self.rewound is not None:
                        return EXIT_STOPPED_BY_SIGNAL if stopped else 0
                if saves or (stopped and save_when_stopped) or self.saver.must_save:
                    self._save_if_healthy(stopped and save_when_stopped, step == config.train.num_steps)
                    if not stopped and self.stop.now():  # a save may have been long: it is not followed by a step
                        stopped = True
                        if save_when_stopped:
                            self._wait_for_save()
                if self.evaluator is not None:
                    self.evaluator.poll()
                if evaluates or saves or step % COLLECT_EVERY_STEPS == 0:
                    self._collect_garbage()
                if stopped and (step < config.train.num_steps or self.state.owed):
                    return EXIT_STOPPED_BY_SIGNAL
        return 0

    def _pay(self) -> bool:
        """Make up for the evaluation that a stop signal cut short; False where another one does."""
        self.ctx.status.step(self.state.step)
        try:
            valid = self._evaluate()
        except CutShort:
            return False
        if self.reporter is not None:
            self.reporter.step(json.loads(self.state.owed), valid)
        self.state = replace(self.state, owed="")
        if self.state.step == self.config.train.num_steps:
            self._save(last=True)  # in the place of the one that owes
        return True

    # ---- one step's surroundings -----------------------------------------------------------------------------------

    def next_batches(self) -> list[Batch[Tensor]]:
        """This rank's micro-batches of the next step, on the device."""
        self.ctx.status.mark("reading samples")
        cp, first, size_at = self.ctx.cp, self.state.consumed_samples, self.batch_sizes.at
        count, behind = size_at(first), first + size_at(first)
        following = size_at(behind) if behind + size_at(behind) <= self.num_samples else 0
        batches = self.batches.get(first, count, following)
        if cp.size > 1:
            batches = [batch.shard(cp.rank, cp.size) for batch in batches]
        return [batch.to(self.ctx.device) for batch in batches]

    def _enter_phase(self, step: int) -> None:
        """Where another phase begins: what the next step is shaped by, length and RoPE, follows it."""
        first = self.state.consumed_samples
        last = first + self.batch_sizes.at(first) - 1
        if first > 0 and not phase_at(self.phases, first - 1).draws_as(phase_at(self.phases, last)):
            self.health.begin_anew(step)
        phase = phase_at(self.phases, first)
        if not phase.has_shape_of(self.phase):
            model = self.config.in_phase(phase).model
            for stage in self.stages:
                stage.change_rope(model)
            give_up(self.micro_batch)
            self.micro_batch = micro_batch_runner(self.config.kernels, self.optimizer.store.of_stages[0])
            if self.reporter is not None:
                self.reporter.flops = flops_per_token(model, phase.seq_length)
        if phase is not self.phase:
            self._say(f"{phase.name} begins at sample {self.state.consumed_samples:,}: seq_length {phase.seq_length:,}")
        self.phase = phase

    def _step(self, step: int) -> StepReport:
        self.ctx.status.step(step)
        self._enter_phase(step)
        interval = self.config.train.drift_check_interval_steps
        due = self.drift is not None and (step == self.first_step or step % interval == 0)
        drift = self.drift if due else None
        corruption = self.corruption if self.corruption is not None and self.corruption.is_due(step) else None
        self.limits = limits = self.health.limits(step)
        holds = limits is not None and self.config.train.on_spike != "report"
        self.optimizer.limits = (limits.loss, limits.grad_norm) if limits is not None and holds else None
        checks, batches = Checks(drift, corruption), self.next_batches()
        return train_step(
            self.stages, self.optimizer, batches, self.config, step, self.ctx, self.micro_batch, checks, self.sources
        )

    def _launched(self, report: StepReport, stop_received: bool) -> None:
        """Account for a step whose numbers may still be under way; ask all ranks whether one must stop."""
        first = self.state.consumed_samples
        ids = self.data.sample_ids(first, self.batch_sizes.at(first))
        self.state = self.state.after_step(ids, self.data)
        self.ctx.status.mark("asking all ranks whether to stop")
        word = int(stop_received) | self.saver.word()
        words = torch.full((), word, dtype=torch.int64, device=self.ctx.device)  # a fill: no copy to wait for
        under_way = all_reduce(words, self.ctx.world, async_op=True)
        consumed = {i: self.state.consumed[self.data.keys[i]] for i in {sample.source for sample in ids}}
        found = [check.found for check in (report.corruption, report.drift) if check is not None]
        numbers = [report.loss, report.grad_norm, report.applied, report.by_source, words, *found]
        late = LateNumbers(numbers, under_way, self.copies)
        self.pending.append(PendingStep(self.state, first, consumed, report, late, self.saver.phase, self.limits))

    def _read(self, lag: int, evaluate_last: Any = None) -> bool:
        """Read launched steps, oldest first, until ``lag`` are left; return whether some rank must stop.

        All ranks read the same numbers in the same order, so all decide the same.
        """
        stopped = False
        while len(self.pending) > lag and self.rewound is None:
            done = self.pending.pop(0)
            with self.ctx.status.waits():  # on a GPU for the device, and so for the other ranks
                numbers: list[Any] = [number.tolist() for number in done.numbers.wait()]
                loss, grad_norm, applied, table, words, *found = numbers
            if any(found):
                self._raise_on_checks(done)
            stopped |= words & MASK > 0
            seconds = time.perf_counter() - self.clock
            consumed = tokens_before(self.phases, done.state.consumed_samples)
            tokens = consumed - tokens_before(self.phases, done.first_sample)
            line = {
                "step": done.state.step,
                "loss": loss,
                "grad_norm": grad_norm,
                "lr": done.report.lr,
                "skipped": not applied,
                "consumed_samples": done.state.consumed_samples,
                "consumed_tokens": consumed,
                "tokens_per_second": tokens / seconds,
                "step_seconds": seconds,
                "samples_digest": done.state.samples_digest,
            }
            line |= source_figures(self.data.names, table, done.consumed)
            try:
                valid = evaluate_last() if evaluate_last is not None and not self.pending else {}
                if self.reporter is not None:
                    self.reporter.step(line, valid)
                if self.prediction is not None and (said := self.prediction.step(tokens, seconds)):
                    self._say(said)
            except CutShort:
                stopped, self.state = True, replace(self.state, owed=self._as_rank_0(line))
            self.clock = time.perf_counter()  # evaluation does not count
            self.saver.heard(done.saving, words)
            self._judge(done, loss, grad_norm, applied)
        return stopped

    def _raise_on_checks(self, done: PendingStep) -> None:
        """Where a check of a step has found something. Communicates over the world."""
        if self.corruption is not None and done.report.corruption is not None:
            path = incident_path(self.config, done.state.step, len(self.prepared.rewinds))
            self.corruption.raise_on(done.report.corruption, path.with_suffix(".corruption.json"))
        if self.drift is not None and done.report.drift is not None:
            self.drift.raise_on(done.report.drift)

    def _as_rank_0(self, line: dict[str, Any]) -> str:
        """The line as JSON, on all ranks with the time that rank 0 has measured. Communicates over the world."""
        names = ("tokens_per_second", "step_seconds")
        measured = torch.tensor([line[name] for name in names], dtype=torch.float64, device=self.ctx.device)
        broadcast(measured, self.ctx.world)
        return json.dumps(line | dict(zip(names, read_back(measured, self.ctx.world), strict=True)))

    def _judge(self, done: PendingStep, loss: float, grad_norm: float, applied: bool) -> None:
        """What is to be done about a step that has been read, where something is: the same on all ranks."""
        train, step, health, limits = self.config.train, done.state.step, self.health, done.limits
        finding = health.take(step, loss, grad_norm, applied, limits, scaled=self.optimizer.scaler.adapts)
        action = {"": "", "nonfinite": train.on_nonfinite, "spike": train.on_spike}[finding]
        what = f"step {step}: loss={loss:.6g} grad_norm={grad_norm:.6g}"
        rule = "is not finite" if finding == "nonfinite" else "is a spike"
        if finding == "spike" and limits is not None:
            rule += (
                f" (limits {limits.loss:.6g} and {limits.grad_norm:.6g}, train.spike_z_score={train.spike_z_score:g})"
            )
        if action == "report":
            self._say(f"{what} {rule}: nothing is done about it (train.on_spike=report)")
        elif action and (health.streak == 1 or action != "skip"):
            written = self._write_incident(done, finding, action, loss, grad_norm)
            self._say(f"{what} {rule}: see {written}")
        if action == "stop":
            remedy = f"see {written}; look at these samples, lower optimizer.lr or lengthen the warm-up"
            raise NonFiniteError(2 if finding == "nonfinite" else 3, what, f"{rule} (train.on_{finding}=stop)", remedy)
        if action == "rewind":
            self.saver.finish()  # a checkpoint on its way may be the one to go back to
            kind: Finding = "nonfinite" if finding == "nonfinite" else "spike"
            bad = BadStep(step, kind, done.first_sample, f"{what} {rule}")
            self.rewound = go_back(bad, self.prepared, self.data, self.ctx, self._say)
            self.pending = []  # what was launched behind it is not looked at
            return
        if health.skips >= train.max_consecutive_skips:
            raise NonFiniteError(
                1,
                f"step {step}: grad_norm={grad_norm}",
                f"was not finite, or a spike, for {health.skips} steps in a row (train.max_consecutive_skips)",
                "lower optimizer.lr, lengthen the warm-up or look at these samples",
            )

    def _write_incident(self, done: PendingStep, finding: str, action: str, loss: float, grad_norm: float) -> str:
        limits = None if done.limits is None else vars(done.limits)
        record = {"step": done.state.step, "finding": finding, "action": action, "limits": limits}
        record |= finite({"loss": loss, "grad_norm": grad_norm})
        optimizer = None if self.pending else self.optimizer
        rewinds = len(self.prepared.rewinds)
        return write_incident(
            self.config, record, done.first_sample, self.stages, optimizer, self.data, self.ctx, rewinds
        )

    def _save_if_healthy(self, stopped: bool, last: bool) -> None:
        """Save, but not while steps are skipped one after the other: what made them bad may be in the weights.

        The last step is saved in any case, and then no older checkpoint is removed.
        """
        in_a_row, step = self.health.streak, self.state.step
        if in_a_row and not last:
            self.save_is_due = True
            self._say(
                f"step {step} is not saved: {in_a_row} steps in a row were skipped; the first that is not will be"
            )
            if stopped:
                self._wait_for_save()
            return
        self.saver.keeps_all = in_a_row > 0
        self._save(last=stopped or last)
        self.save_is_due = False
        if in_a_row:
            self._say(f"the last {in_a_row} steps were skipped: no older checkpoint was removed")

    def _evaluate(self) -> dict[str, float | None]:
        results: dict[str, float | None] = {}
        for name, result in self._measure(self.valid, self.stop).items():
            results |= result.metrics(name)
        return results

    def measure(self, valid: Sequence[ValidData], stop: Callable[[], bool]) -> dict[str, ValidResult]:
        """The result of each set by its name, between two steps. Communicates over dp, pp and the world.

        Raises:
            CutShort: on all ranks, where one has been asked to stop.
        """
        return self._measure(valid, StopCheck(stop, self.ctx))

    def _measure(self, valid: Sequence[ValidData], stop: StopCheck) -> dict[str, ValidResult]:
        size, sizes = self.config.train.micro_batch_size, self.sources.sizes
        return {data.name: evaluate(self.stages, data, size, sizes, self.ctx, stop) for data in valid}

    def save(self) -> None:
        """Save the step that is complete, whatever the interval is, and wait for it. Communicates over all ranks."""
        self._save_if_healthy(stopped=False, last=True)

    def _save(self, last: bool) -> None:
        """Save the present step, unless ranks differ; the time that it takes does not count as training."""
        start = time.perf_counter()
        self.ctx.status.mark("saving, drift check")
        if self.drift is not None:
            self.drift.raise_on(self.drift.check(self.state.step), saving=True)
        coming = upcoming(self.state, self.data, self.config)
        self.saver.save(replace(self.state, upcoming=coming, health=self.health.to_tree()), last)
        self.clock += time.perf_counter() - start

    def _sync_metrics(self) -> None:
        if self.reporter is not None:
            self.reporter.sync()

    def _committed(self, folder: Path) -> None:
        self.newest = folder
        if self.reporter is not None:
            self.reporter.saved(step_of(folder))
        if self.evaluator is not None:
            self.evaluator.committed(folder)

    def _wait_for_save(self) -> None:
        """Before the run ends: what is in flight is committed, or the present step is saved now."""
        self.saver.finish()
        if self.saver.must_save:
            self._save(last=True)

    def _say(self, text: str) -> None:
        if self.reporter is not None:
            self.reporter.say(text)

    def _note(self, text: str) -> None:
        if self.reporter is not None:
            self.reporter.warn(text)

    def _collect_garbage(self) -> None:
        """Its time does not count as training; on a GPU the step that has been launched goes on behind."""
        start = time.perf_counter()
        gc.collect()
        self.clock += time.perf_counter() - start

    def _evaluator(self) -> Any:
        """Rank 0 has checkpoints evaluated beside the run, where the config asks for it; the others get None."""
        resume = self.prepared.resume
        if self.reporter is None or self.config.train.evaluator is None:
            return nullcontext(None)
        start = None if resume is None else resume.folder
        return Evaluator(self.config, start, self.reporter.evaluation, self.reporter.warn)

    def _reporter(self) -> Any:
        """Rank 0 reports; the others get None."""
        if self.ctx.world.rank != 0:
            return nullcontext(None)
        config, device = self.config, self.ctx.device
        name = device_name(device)
        flops = flops_per_token(config.in_phase(self.phase).model, self.phase.seq_length)
        written = self.state.step - bool(self.state.owed)
        peak, asked = peak_tflops(config, name), lambda: peak_of_process(device)
        return Reporter(config, written, flops, peak, self.ctx.world.size, name, asked, self.heard, self._steps_left)

    def _steps_left(self, line: Mapping[str, Any]) -> float:
        """How many steps of the present size the rest of the run has the tokens of."""
        samples: int = line["consumed_samples"]
        left: int = self.config.tokens_before(self.num_samples) - line["consumed_tokens"]
        return left / (self.batch_sizes.at(samples) * phase_at(self.phases, samples).seq_length)
