"""A drill: trains the user's own config, made small, once undisturbed and once under faults, and compares the results.

::

    the user's config -- shrink --> the same run, uninterrupted ---------------------------+
                               '--> fault, start again, fault, start again ... to the end -+--> every step, final state

Every start is the launcher's command line in processes of its own; what survives a fault is what is on the disk. Equal
means equal in bits: all fields of every line of metrics.jsonl but those that a clock decides, and the hashes of all
tensors of the last checkpoint with its state. Needs no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.errors import require_linux
from megatron_hammer.base.processes import KILL_SECONDS
from megatron_hammer.base.system import find_process
from megatron_hammer.base.tables import align
from megatron_hammer.checkpoint.folder import newest_checkpoint
from megatron_hammer.config import Config, to_yaml
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.verify.faults import KILLS, OTHERS, DrilledRun, Fault, newest_folder, steps_done
from megatron_hammer.verify.golden import make_predictable
from megatron_hammer.verify.shrink import shrink

STEPS_A_FAULT = 14  # what a fault lets the run do, about, and half as much again
SAVE_EVERY, EVALUATE_EVERY = 5, 10
STUCK_SECONDS = 10  # of silence: parallel.timeout_seconds of the run
GONE_SECONDS = 5.0  # for the processes of a run after its launcher's end
RUN_SECONDS = 600.0  # of one start, before the drill gives it up
OF_THE_CLOCK = ("tokens_per_second", "step_seconds", "tflops_causal", "mfu", "mfu_causal", "memory_bytes")
DOCUMENTS, LONGEST = 64, 400  # of the made-up dataset


@dataclass(frozen=True)
class Strike:
    """What came of one fault."""

    fault: str
    step: int
    """Steps done when the run ended."""
    code: int
    said: str
    """The error line, if there was one."""
    wrong: str
    """What should not have been; empty where all was well."""


@dataclass(frozen=True)
class DrillReport:
    """What came of a drill."""

    strikes: list[Strike]
    differences: list[str]
    """Between the two runs; empty where they are equal."""
    left_out: list[str]

    @property
    def failed(self) -> bool:
        """Whether something was not as it should be."""
        return bool(self.differences) or any(strike.wrong for strike in self.strikes)

    def table(self) -> list[str]:
        """The faults and what came of them, for people."""
        rows = [("fault", "at step", "exit code", "verdict")]
        rows += [(s.fault, str(s.step), str(s.code), s.wrong or "as it should be") for s in self.strikes]
        return align(rows)


def plan_faults(kills: int, chance: random.Random) -> list[Fault]:
    """So many kills, each kind in turn, and one of every other fault, in random order."""
    faults = [KILLS[i % len(KILLS)] for i in range(kills)] + list(OTHERS)
    chance.shuffle(faults)
    if faults[0].before_start:  # there is no checkpoint yet
        faults.append(faults.pop(0))
    return faults


def small_config(config: Config, world_size: int, folder: Path, faults: int) -> tuple[Config, list[str]]:
    """The config to train, with a dataset of its own in ``folder``; and what was left out of it."""
    small, left_out = shrink(config, world_size)
    assert small.model.vocab_size is not None
    for name, seed in (("train", 1), ("valid", 2)):
        _write_dataset(folder / name, small.model.vocab_size, seed)
    steps = STEPS_A_FAULT * (faults + 2)
    data = dataclasses.replace(small.data, train={str(folder / "train"): 1.0}, weights="share", max_epochs=None,
                               valid={"held-out": str(folder / "valid")}, index_folder=None)  # fmt: skip
    train = dataclasses.replace(
        small.train,
        num_steps=steps,
        eval_interval_steps=EVALUATE_EVERY,
        eval_samples=16,
        drift_check_interval_steps=10,
        evaluator=None,
    )
    return dataclasses.replace(
        small,
        data=data,
        train=train,
        optimizer=dataclasses.replace(small.optimizer, lr=1e-3, min_lr=1e-3),
        parallel=dataclasses.replace(small.parallel, timeout_seconds=STUCK_SECONDS),
        checkpoint=dataclasses.replace(small.checkpoint, save_interval_steps=SAVE_EVERY),
        log=dataclasses.replace(small.log, tensorboard=False, trackers=()),
    ), left_out


def _write_dataset(prefix: Path, vocab_size: int, seed: int) -> None:
    """Documents in which a token mostly decides the next."""
    draw = np.random.default_rng(seed)
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for _ in range(DOCUMENTS):
            tokens = draw.integers(0, vocab_size, int(draw.integers(20, LONGEST)))
            make_predictable(tokens, vocab_size)
            writer.add(tokens, np.array([len(tokens)]))


class Drill:
    """Runs the launcher on one config, again and again.

    Args:
        faults: what happens, in this order.
        chance: of the moments and of who is hit.
        folder: for the config, the dataset and both runs.
        note: gets a line on what is under way.
    """

    def __init__(
        self,
        config: Config,
        world_size: int,
        faults: Sequence[Fault],
        chance: random.Random,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        require_linux("a drill", "what /proc tells of the processes of a run", "run it on Linux (Windows: WSL2)")
        self._random, self._folder, self._note, self._world_size = chance, folder, note, world_size
        self._faults = faults
        self._config, self._left_out = small_config(config, world_size, folder, len(self._faults))
        (folder / "config.yaml").write_text(to_yaml(self._config), encoding="utf-8")
        self._file_limit = 0

    def run(self) -> DrillReport:
        """Run the training once undisturbed and once under faults, and compare the two."""
        reference, drilled = self._folder / "undisturbed", self._folder / "drilled"
        self._note(f"{self._world_size} ranks, {self._config.train.num_steps} steps, undisturbed")
        code, said = self._finish(self._start(reference))
        if code:
            return DrillReport([Strike("none", 0, code, said, "failed without any fault")], [], self._left_out)
        largest = max(p.stat().st_size for p in reference.glob("checkpoints/step-*/*.safetensors"))
        self._file_limit = largest // 2
        strikes = []
        for number, fault in enumerate(self._faults, start=1):
            self._note(f"fault {number} of {len(self._faults)}: {fault.name}")
            strikes.append(self._strike(fault, drilled))
            if strikes[-1].wrong:
                self._note(f"{strikes[-1].wrong}: {strikes[-1].said}")
        self._note("to the end")
        code, said = self._finish(self._start(drilled))
        if code:
            strikes.append(Strike("none", steps_done(drilled), code, said, "does not go on after the faults"))
        return DrillReport(strikes, [] if code else list(run_differences(reference, drilled)), self._left_out)

    def _start(self, output: Path, limited: bool = False) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "megatron_hammer.launch", "--nproc", str(self._world_size)]
        command += [str(self._folder / "config.yaml"), f"train.output={json.dumps(str(output), ensure_ascii=False)}"]
        limit, environment = self._file_limit, os.environ | {"OMP_NUM_THREADS": "1"}

        def fewer_bytes() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

        null, pipe = subprocess.DEVNULL, subprocess.PIPE
        return subprocess.Popen(command, env=environment, text=True, stdout=null, stderr=pipe,
                                preexec_fn=fewer_bytes if limited else None)  # fmt: skip

    def _finish(self, launcher: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and last line of stderr."""
        try:
            _, said = launcher.communicate(timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            launcher.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.communicate(timeout=KILL_SECONDS)
            return -1, f"did not end within {RUN_SECONDS:g} s"
        return launcher.returncode, (said.splitlines() or [""])[-1]

    def _strike(self, fault: Fault, output: Path) -> Strike:
        """One fault on the run, from its start to the end of its processes."""
        if fault.before_start:
            idle = subprocess.Popen(["true"], text=True)
            idle.wait()
            fault.strike(DrilledRun(idle, output, self._random))
        run = DrilledRun(self._start(output, limited=fault.file_limit), output, self._random)
        if fault.before_start:
            return self._start_on_damage(fault, run)
        fault.strike(run)
        code, said = self._finish(run.launcher)
        wrong = "" if code in fault.codes else f"exit code {code}, not {', '.join(map(str, fault.codes))}"
        if left := outliving(run.seen):
            wrong = f"left {len(left)} processes behind"
        last = newest_checkpoint(output / "checkpoints") if run.committed else None
        if run.committed and (last is None or last.step < run.committed):
            wrong = f"the checkpoint of step {run.committed} was committed, and is gone"
        return Strike(fault.name, steps_done(output), code, said, wrong)

    def _start_on_damage(self, fault: Fault, run: DrilledRun) -> Strike:
        """A start on damaged files: it passes over them, or refuses where the config says so, and they are moved."""
        started = run.steps()
        if run.wait_for(lambda: run.steps() not in (0, started)):
            run.launcher.terminate()
        code, said = self._finish(run.launcher)
        if self._config.checkpoint.fallback:
            wrong = "" if code in (0, 75) else f"exit code {code}: it did not go on from an older checkpoint"
        else:
            wrong = "" if code == 4 else f"exit code {code}, not 4: checkpoint.fallback=false"
            newest_folder(run.output).rename(run.output / f"damaged-{started}")
        return Strike(fault.name, steps_done(run.output), code, said, wrong)


def outliving(pids: set[int]) -> list[int]:
    """The processes that still live some seconds after their launcher's end."""
    deadline = time.monotonic() + GONE_SECONDS
    while (left := [pid for pid in pids if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _lives(pid: int) -> bool:
    process = find_process(pid)
    return process is not None and process.state != "Z"


def run_differences(reference: Path, drilled: Path) -> Iterator[str]:
    """What two finished runs do not have in common."""
    ours, theirs = (_lines(folder) for folder in (drilled, reference))
    if len(ours) != len(theirs):
        yield f"metrics.jsonl has {len(ours)} lines, undisturbed {len(theirs)}"
    for a, b in zip(ours, theirs):
        if fields := [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]:
            yield f"step {b.get('step')}: {', '.join(sorted(fields))} of metrics.jsonl"
    last, wanted = (newest_checkpoint(folder / "checkpoints") for folder in (drilled, reference))
    if last is None or wanted is None or last.step != wanted.step:
        yield f"the last checkpoint is {last and last.folder.name}, undisturbed {wanted and wanted.folder.name}"
        return
    if different := _hashes(last) ^ _hashes(wanted):
        yield f"the last checkpoint: {len(different) // 2} slices of tensors, the first {min(different)[:2]}"
    if keys := [key for key in last.state.keys() | wanted.state.keys() if last.state.get(key) != wanted.state.get(key)]:
        yield f"the last checkpoint: {', '.join(sorted(keys))} of its state"


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in OF_THE_CLOCK} for line in lines]


def _hashes(manifest: Any) -> set[tuple[str, ...]]:
    """Tensor, kind, rectangle and hash of every slice."""
    found = set[tuple[str, ...]]()
    for file in manifest.files:
        for part in file.slices:
            tensor = manifest.tensors[part.tensor]
            found.add((tensor.name, tensor.kind, str(part.rows), str(part.cols), part.hash))
    return found


def smallest_world(config: Config) -> int:
    """The fewest ranks, two or more where that can be, and eight at most, that the layout of a config allows."""
    from megatron_hammer.base.errors import ConfigError

    fitting: list[int] = []
    for ranks in range(1, 8 + 1):
        try:
            config.validate(ranks)
        except ConfigError:
            continue
        fitting.append(ranks)
    return next((n for n in fitting if n >= 2), fitting[-1] if fitting else 2)


def run_drill(
    config: Config, world_size: int, kills: int, seed: int, folder: Path, note: Callable[[str], None]
) -> DrillReport:
    """Drill a config that is valid for ``world_size`` ranks, its vocabulary known, by kills and other faults."""
    chance = random.Random(seed)
    return Drill(config, world_size, plan_faults(kills, chance), chance, folder, note).run()


def drill_summary(report: DrillReport) -> Sequence[str]:
    """The lines below the table."""
    if not report.failed:
        return ["equal: every step's record and the final state are those of the undisturbed run, bit for bit"]
    wrong = sum(bool(strike.wrong) for strike in report.strikes)
    lines = [f"DIFFERENT: {wrong} faults were not survived as they should be, {len(report.differences)} differences"]
    return [*lines, *(f"  {text}" for text in report.differences[:12])]
