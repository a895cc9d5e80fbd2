"""Hundreds of runs, through the launcher's own command line and in one process: each ends with the documented code.

Every outcome of ``docs/errors.md`` that training can have is brought about, in layouts and at moments that are drawn.
The launcher is forked, and forks its ranks where it would spawn them, so that a start costs no second of imports. No
process may be left, and the line on stderr must be of the code. ``HAMMER_EXITS=500`` runs so many; ``100:200`` the
second hundred. Some go on at a time, since those that hang or die take seconds without work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_hammer.train.loop import TrainLoop
from tests.faults.kills import ended, forked, start_program
from tests.train.runs import overrides, write_dataset

WANTED = os.environ.get("HAMMER_EXITS", "")
WORKERS = 3  # at a time: enough for two cores while some wait
SECONDS = 120.0  # of one run: far above the timeout of a hang
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
SHORT = (
    "train.num_steps=4",
    "checkpoint.save_interval_steps=2",
    "train.eval_interval_steps=null",
    "train.eval_samples=4",
)


@dataclass
class Trial:
    """One run."""

    folder: Path
    data: Path
    draw: random.Random

    def __post_init__(self) -> None:
        self.ranks = self.draw.choice([1, 1, 2])
        self.launches = self.ranks > 1 or self.draw.random() < 0.5
        self.output = self.folder / "run"
        mode = self.draw.choice(["blocking", "blocking", "blocking", "background"])
        layout = self.draw.choice(["1", "2"]) if self.ranks == 2 else "1"
        self.settings = [*SHORT, f"checkpoint.mode={mode}", f"parallel.tensor_model_parallel_size={layout}"]

    def run(
        self,
        *more: str,
        fault: str = "",
        patch: Callable[[], None] = lambda: None,
        meanwhile: Callable[[int, Trial], None] = lambda pid, trial: None,
    ) -> tuple[int, str]:
        """Exit code and stderr.

        Args:
            more: settings and options.
            fault: of ``HAMMER_FAULT``.
            patch: changes the program, in its own process.
            meanwhile: is told the process while it runs.
        """
        arguments = [*overrides(self.data, self.output, *self.settings), *more]
        child = start_program(self.ranks if self.launches else None, arguments, self.folder / "said", fault, patch)
        meanwhile(child, self)
        until, status = time.monotonic() + SECONDS, (0, 0)
        while status[0] == 0 and time.monotonic() < until:
            status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.005)
        with contextlib.suppress(ProcessLookupError):  # Python's own helper ends a moment later
            while time.monotonic() < until and status[0]:
                os.killpg(child, 0)
                time.sleep(0.005)
            os.killpg(child, signal.SIGKILL)
            pytest.fail(f"{arguments}: {'has left processes' if status[0] else 'does not end'}")
        return os.waitstatus_to_exitcode(status[1]), (self.folder / "said").read_text(errors="replace")


# ---- what is changed in the program --------------------------------------------------------------------------------


def at_step(number: int, rank: int, happen: Callable[[TrainLoop], None]) -> Callable[[], None]:
    """A patch: this happens on a rank before a step."""

    def patch() -> None:
        real = TrainLoop._step

        def step(run: TrainLoop, at: int) -> Any:
            if at == number and run.ctx.world.rank == rank % run.ctx.world.size:
                happen(run)
            return real(run, at)

        TrainLoop._step = step  # type: ignore[method-assign]

    return patch


def raises(error: BaseException) -> Callable[[TrainLoop], None]:
    def happen(run: TrainLoop) -> None:
        raise error

    return happen


def flip(run: TrainLoop) -> None:
    run.optimizer.store.weights[1].detach().view(-1).view(torch.int32)[3] ^= 1 << 22


def no_number() -> None:
    real = TrainLoop._step

    def step(run: TrainLoop, at: int) -> Any:
        report = real(run, at)
        return replace(report, loss=report.loss * float("nan")) if at == 3 else report

    TrainLoop._step = step  # type: ignore[method-assign]


def steps_of(output: Path) -> int:
    with contextlib.suppress(OSError):
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def signal_at(lines: int, delay: float, times: int, number: signal.Signals) -> Callable[[int, Trial], None]:
    def meanwhile(pid: int, trial: Trial) -> None:
        until = time.monotonic() + SECONDS / 2
        while steps_of(trial.output) < lines and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(delay)
        for _ in range(times):
            os.kill(pid, number)

    return meanwhile


# ---- the outcomes --------------------------------------------------------------------------------------------------


def done(trial: Trial) -> tuple[int, tuple[int, str]]:
    first = trial.run()
    return 0, trial.run() if trial.draw.random() < 0.5 and first[0] == 0 else first


def no_reader(trial: Trial) -> tuple[int, tuple[int, str]]:
    return 0, trial.run(patch=lambda: os.close(1))


def usage(trial: Trial) -> tuple[int, tuple[int, str]]:
    wrong = [
        "train.nope=1",
        "model.num_layers=0",
        "parallel.tensor_model_parallel_size=3",
        "optimizer.lr=x",
        "--nope",
        "x",
    ]
    return 2, trial.run(trial.draw.choice(wrong))


def data(trial: Trial) -> tuple[int, tuple[int, str]]:
    how, prefix = trial.draw.choice(["missing", "cut", "foreign"]), trial.folder / "d"
    for suffix in (".idx", ".bin", ".meta.json"):
        shutil.copy(f"{trial.data}/a{suffix}", f"{prefix}{suffix}")
    if how == "missing":
        Path(f"{prefix}.bin").unlink()
    elif how == "cut":
        os.truncate(f"{prefix}.bin", 100)
    else:
        size = os.path.getsize(f"{prefix}.bin")
        Path(f"{prefix}.bin").write_bytes(b"\x2e\x01" * (size // 2))
    return 3, trial.run(f"data.train={{{prefix}: 1}}")


def checkpoint(trial: Trial) -> tuple[int, tuple[int, str]]:
    if trial.draw.random() < 0.3:
        return 4, trial.run(f"checkpoint.init_from={trial.folder}")
    assert trial.run()[0] == 0
    for path in trial.output.glob("checkpoints/step-*/*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-trial.draw.randrange(1, 4000)] ^= 1 << trial.draw.randrange(8)
        path.write_bytes(content)
    return 4, trial.run("train.num_steps=6", "--accept=train.num_steps")


def refused(trial: Trial) -> tuple[int, tuple[int, str]]:
    how = trial.draw.choice(["settings", "traces", "in use"])
    if how == "in use":
        trial.output.mkdir()
        lock = os.open(trial.output, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return 5, trial.run()
        finally:
            os.close(lock)
    assert trial.run()[0] == 0
    if how == "traces":
        shutil.rmtree(trial.output / "checkpoints")
        return 5, trial.run()
    return 5, trial.run("train.num_steps=6", "train.seed=99")


def disk(trial: Trial) -> tuple[int, tuple[int, str]]:
    if trial.draw.random() < 0.2:
        (trial.folder / "file").write_text("")
        return 6, trial.run(f"train.output={trial.folder}/file/run")
    rank = trial.draw.randrange(trial.ranks)
    where = trial.draw.choice(["stage,step=2", f"write,rank={rank}", f"fsync,rank={rank}", "rename", "manifest"])
    return 6, trial.run("checkpoint.mode=blocking", fault=f"{trial.draw.choice(['full', 'io'])}@{where}")


def dies(trial: Trial) -> tuple[int, tuple[int, str]]:
    trial.launches, rank, step = True, trial.draw.randrange(2), trial.draw.randrange(1, 5)
    number = trial.draw.choice([signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL])
    how: Callable[[TrainLoop], None] = lambda run: os.kill(os.getpid(), number)  # noqa: E731
    how = trial.draw.choice([how, raises(ZeroDivisionError("a defect of ours")), lambda run: os._exit(3)])
    return 7, trial.run(patch=at_step(step, rank, how))


def hangs(trial: Trial) -> tuple[int, tuple[int, str]]:
    trial.launches, rank, step = True, trial.draw.randrange(2), trial.draw.randrange(2, 5)
    stop: Callable[[TrainLoop], None] = lambda run: os.kill(os.getpid(), signal.SIGSTOP)  # noqa: E731
    how = trial.draw.choice([stop, lambda run: time.sleep(SECONDS)])
    return 8, trial.run("parallel.timeout_seconds=3", patch=at_step(step, rank, how))


def not_finite(trial: Trial) -> tuple[int, tuple[int, str]]:
    return 9, trial.run("train.on_nonfinite=stop", patch=no_number)


def memory(trial: Trial) -> tuple[int, tuple[int, str]]:
    error = trial.draw.choice([MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
    return 10, trial.run(patch=at_step(trial.draw.randrange(1, 5), trial.draw.randrange(2), raises(error)))


def drifts(trial: Trial) -> tuple[int, tuple[int, str]]:
    trial.ranks, trial.launches = 2, True
    layout = "parallel.tensor_model_parallel_size=1"
    return 11, trial.run(layout, "train.drift_check_interval_steps=1", patch=at_step(3, trial.draw.randrange(2), flip))


def stopped(trial: Trial) -> tuple[int, tuple[int, str]]:
    lines, delay = trial.draw.choice([0, 0, 1, 2, 5]), trial.draw.random() * 0.3
    send = signal_at(lines, delay, trial.draw.choice([1, 1, 2]), trial.draw.choice(STOP_SIGNALS))
    more = "train.num_steps=100000", "checkpoint.save_interval_steps=3"
    found = trial.run(*more, meanwhile=send)
    if found[0] == 75 and lines:
        assert any((trial.output / "checkpoints").glob("step-*")), "it was saved"
    return 75, found


OUTCOMES = (
    done, no_reader, usage, data, checkpoint, refused, disk, dies, hangs, not_finite, memory, drifts, stopped, stopped
)  # fmt: skip


def numbers() -> range:
    first, _, end = WANTED.rpartition(":")
    return range(int(first or 0), int(end or 0))


@pytest.mark.slow
@pytest.mark.skipif(not WANTED, reason="HAMMER_EXITS=500 runs it: twenty minutes on two cores")
@pytest.mark.timeout(0)
def test_every_run_ends_with_its_code(memory_folder: Path) -> None:
    torch.set_num_threads(1)
    (memory_folder / "data").mkdir()
    for seed, (name, documents) in enumerate({"a": 60, "b": 40, "x": 8, "y": 5}.items()):
        write_dataset(memory_folder / "data" / name, documents, seed)
    workers = [forked(partial(work, memory_folder, share)) for share in range(WORKERS)]
    codes = [ended(worker) for worker in workers]
    wrong = "".join((memory_folder / f"wrong-{share}").read_text() for share in range(WORKERS))
    assert codes == [0] * WORKERS and not wrong, wrong


def work(folder: Path, share: int) -> int:
    """Every so many of the runs, one after the other; what is wrong with them goes to a file."""
    (folder / f"wrong-{share}").write_text("")
    wrong, counts = 0, dict.fromkeys((outcome.__name__ for outcome in OUTCOMES), 0)
    for number in numbers()[share::WORKERS]:
        outcome = OUTCOMES[number % len(OUTCOMES)]
        trial = Trial(folder / str(number), folder / "data", random.Random(number))
        trial.folder.mkdir()
        began = time.monotonic()
        code, (found, said) = outcome(trial)
        lines = re.findall(r"^error\[E(\d+)\d\d\]", said, re.MULTILINE)
        told = not lines if code in (0, 75) else lines == [str(code)]
        if found != code or not told:
            wrong += 1
            with open(folder / f"wrong-{share}", "a") as file:
                file.write(f"{number}, {outcome.__name__}: {found} for {code}, said:\n{said[-1500:]}\n")
        counts[outcome.__name__] += 1
        shutil.rmtree(trial.folder)
        print(f"{number}, {outcome.__name__}: {found}, {time.monotonic() - began:.1f} s", flush=True)
    print(f"share {share}: {sum(counts.values())} runs, {wrong} wrong: {counts}", flush=True)
    return 0
