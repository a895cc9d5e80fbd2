"""The faults of a drill, one function each, which act on real processes and real files.

A fault gets the running launcher and the run's folder, waits for its moment, acts, and returns the exit code that the
launcher must then have. Ranks are found as the launcher's children. Linux; needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_hammer.base.system import command_of, parents
from megatron_hammer.checkpoint.folder import find_checkpoints, step_of
from megatron_hammer.metrics.metrics_file import METRICS

POLL_SECONDS = 0.002  # a step of a shrunk model takes some ten milliseconds
SAVE_SECONDS = 0.02  # into a save: one of a shrunk model takes about as long


@dataclass
class DrilledRun:
    """A run of a drill, to which faults are done: its launcher and its folder."""

    launcher: subprocess.Popen[str]
    output: Path
    random: random.Random
    seen: set[int] = field(default_factory=set)
    """Its processes, as they were before the fault: none may outlive it."""
    committed: int = 0
    """Step of the newest checkpoint before the fault: it must be there afterwards."""

    def send(self, pids: Sequence[int], number: signal.Signals) -> None:
        """Do the fault: a signal to some of its processes. What must hold afterwards is noted before."""
        self.committed = max(map(step_of, find_checkpoints(self.output)), default=0)
        self.seen.update(descendants(self.launcher.pid))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def steps(self) -> int:
        """How many steps are done."""
        return steps_done(self.output)

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Wait until a condition holds; False where the run ends before."""
        while self.launcher.poll() is None:
            if condition():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def ranks(self) -> list[int]:
        """Process numbers of the ranks, in their order."""
        return [pid for pid in descendants(self.launcher.pid) if b"spawn_main" in command_of(pid)]


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    name: str
    strike: Callable[[DrilledRun], None]
    codes: frozenset[int]
    """Exit codes of the launcher that are right afterwards."""
    before_start: bool = False
    """It is done to the files of a run that does not run, and the next start must come to terms with it."""
    file_limit: bool = False
    """The run may write files up to a size only, which a checkpoint's exceed."""


def steps_done(output: Path) -> int:
    """Steps of a run whose numbers are in metrics.jsonl; 0 where that is not there yet."""
    with contextlib.suppress(OSError):
        return (output / METRICS).read_bytes().count(b"\n")
    return 0


def descendants(pid: int) -> list[int]:
    """A process's children, their children and so on, by number."""
    parent_of, found, new = parents(), set[int](), {pid}
    while new:
        new = {child for child, parent in parent_of.items() if parent in new} - found
        found |= new
    return sorted(found)


def _some_step(run: DrilledRun) -> bool:
    """Wait for a random one of the next steps, and a part of it."""
    last = run.steps() + run.random.randint(1, 6)
    reached = run.wait_for(lambda: run.steps() >= last)
    time.sleep(run.random.random() * SAVE_SECONDS)
    return reached


def kill_rank(run: DrilledRun) -> None:
    """SIGKILL to one rank."""
    if _some_step(run):
        run.send([run.random.choice(run.ranks())], signal.SIGKILL)


def kill_launcher(run: DrilledRun) -> None:
    """SIGKILL to the launcher alone: its ranks must go with it."""
    if _some_step(run):
        run.send([run.launcher.pid], signal.SIGKILL)


def kill_all(run: DrilledRun) -> None:
    """SIGKILL to everything at once."""
    if _some_step(run):
        run.send([run.launcher.pid, *descendants(run.launcher.pid)], signal.SIGKILL)


def kill_in_save(run: DrilledRun) -> None:
    """SIGKILL to everything while a checkpoint is being written."""
    folder = run.output / "checkpoints"
    started = run.steps()
    if run.wait_for(lambda: run.steps() > started and any(folder.glob("step-*.tmp-*"))):
        time.sleep(run.random.random() * SAVE_SECONDS)
        run.send([run.launcher.pid, *descendants(run.launcher.pid)], signal.SIGKILL)


def stop_signal(run: DrilledRun) -> None:
    """One of the signals that mean "save and stop", to the launcher."""
    number = run.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
    if _some_step(run):
        run.send([run.launcher.pid], number)


def stick(run: DrilledRun) -> None:
    """SIGSTOP to one rank: it does nothing any more, and does not end."""
    if _some_step(run):
        run.send([run.random.choice(run.ranks())], signal.SIGSTOP)


def flip_bit(run: DrilledRun) -> None:
    """One bit of the newest checkpoint's tensors."""
    path = run.random.choice(sorted(newest_folder(run.output).glob("*.safetensors")))
    content = bytearray(path.read_bytes())
    content[run.random.randrange(len(content) // 2, len(content))] ^= 1 << run.random.randrange(8)
    path.write_bytes(content)


def newest_folder(output: Path) -> Path:
    """The newest of the run's checkpoints."""
    return sorted(path for path in (output / "checkpoints").glob("step-*") if path.name[5:].isdigit())[-1]


def nothing(run: DrilledRun) -> None:
    """What is wrong lies in the run's surroundings."""
    run.wait_for(lambda: False)


LOST, KILLED, STOPPED = frozenset({7}), frozenset({-9}), frozenset({75})
KILLS = (
    Fault("kill a rank", kill_rank, LOST),
    Fault("kill the launcher", kill_launcher, KILLED),
    Fault("kill everything", kill_all, KILLED),
    Fault("kill everything inside a save", kill_in_save, KILLED),
)
OTHERS = (
    Fault("a stop signal", stop_signal, STOPPED),
    Fault("a stuck rank", stick, frozenset({8})),
    Fault("a flipped bit in the newest checkpoint", flip_bit, STOPPED, before_start=True),
    Fault("a full disk", nothing, frozenset({6}), file_limit=True),
)
