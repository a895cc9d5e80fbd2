"""Processes that are killed at a chosen operation, phase or moment, and what must be left of their files.

Everything is forked from the test's own process, which has imported torch already: a start costs some ten milliseconds
in place of seconds. A job's ranks, and the processes that write for them, form a process group, so that one signal
reaches all of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist

from megatron_hammer import launch
from megatron_hammer.base import signals
from megatron_hammer.base.faults import VARIABLE
from megatron_hammer.checkpoint.folder import find_checkpoints, step_of
from megatron_hammer.checkpoint.inspect import verify_checkpoint
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.supervise import attempt
from megatron_hammer.train import __main__ as alone
from megatron_hammer.train.run import run_rank
from tests.train.runs import TINY, config_for

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
"""Audit events of what changes a folder; files that are opened to be written, and fsyncs, count beside them."""
KILLED = -signal.SIGKILL
RUN_SECONDS = 120.0
CAN_TRAIN_IN_A_CHILD = not torch.cuda.is_available()
"""With a GPU autograd has threads from the first gradient on, and refuses to compute any in a child."""
if CAN_TRAIN_IN_A_CHILD:
    # torch counts GPUs once, at a process's first gradient, and takes those of tensors without content (FakeTensorMode,
    # with which torch.compile traces) for real. Here, before a test could have made some.
    torch.ones(1, requires_grad=True).sum().backward()


def needs_to_train_in_a_child() -> None:
    """Skip the test where that cannot be done."""
    if not CAN_TRAIN_IN_A_CHILD:
        pytest.skip("with a GPU a forked process cannot compute gradients: run it with CUDA_VISIBLE_DEVICES=''")


def forked(work: Callable[[], int]) -> int:
    """Process number of a child that does the work, and ends with its result, 99 where it raises."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        code = work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> int:
    """Wait for a child; its exit code, or the negative number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(operation: int, work: Callable[[], Any]) -> int:
    """Do the work in a child that is killed just before its n-th operation on files; how the child has ended."""

    def counted() -> int:
        die_before(operation)
        work()
        return 0

    return ended(forked(counted))


def die_before(operation: int) -> Callable[[], None]:
    """Have this process killed before its n-th operation on files from now on; calls off what it returns."""
    left = [operation]

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if opens or event in CHANGES:
            count()

    def sync(descriptor: int, real: Any = os.fsync) -> None:
        count()
        real(descriptor)

    os.fsync = sync
    sys.addaudithook(heard)
    return lambda: left.__setitem__(0, -1)


def committed(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there, each verified to its last byte."""
    found = find_checkpoints(folder)
    for path in found:
        verify_checkpoint(read_manifest(path))
    return [step_of(path) for path in found]


class DeadlySlot(StatusSlot):
    """Kills its process where it notes that a step reaches a phase.

    Args:
        phase: how the note starts.
    """

    def __init__(self, step: int, phase: str) -> None:
        self._deadly = (step, phase)
        super().__init__()

    def mark(self, phase: str) -> None:
        """As in ``StatusSlot``, if the process lives on."""
        if self._step == self._deadly[0] and phase.startswith(self._deadly[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        super().mark(phase)


class Job:
    """A run of some ranks, forked.

    Args:
        folder: for what the ranks say, and where they meet.
        arguments: the run's, as of ``tests.train.runs``.
        fault: of ``HAMMER_FAULT``.
        deadly: rank, step and phase of the status at which that rank is killed.
        patch: changes the program in each rank, which it is told.
    """

    def __init__(
        self,
        ranks: int,
        folder: Path,
        arguments: Sequence[str],
        fault: str = "",
        deadly: tuple[int, int, str] | None = None,
        patch: Callable[[int], None] = lambda rank: None,
    ) -> None:
        needs_to_train_in_a_child()
        self._folder, self._patch = folder, patch
        folder.mkdir()
        self._children: dict[int, int] = {}
        for rank in range(ranks):
            child = forked(lambda rank=rank: self._rank(rank, ranks, arguments, fault, deadly))  # type: ignore[misc]
            self._children[rank] = child
            with contextlib.suppress(OSError):
                os.setpgid(child, self._children[0])

    def _rank(
        self, rank: int, ranks: int, arguments: Sequence[str], fault: str, deadly: tuple[int, int, str] | None
    ) -> int:
        os.setpgid(0, self._children.get(0, 0))
        said = os.open(self._folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT, 0o666)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", VARIABLE: fault}
        store = dist.FileStore(str(self._folder / "store"), ranks) if ranks > 1 else None
        self._patch(rank)
        status = DeadlySlot(*deadly[1:]) if deadly is not None and deadly[0] == rank else None
        return run_rank(config_for(arguments), rank, rank, ranks, store, status=status)

    def is_running(self) -> bool:
        """Whether no rank has ended."""
        found = (os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self._children.values())
        return not any(found)

    def kill(self) -> None:
        """SIGKILL to everything."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._children[0], signal.SIGKILL)

    def wait(self, seconds: float = RUN_SECONDS) -> list[int]:
        """Exit codes of all ranks; when one of them fails, or time is up, everything is killed, as a launcher does."""
        codes: dict[int, int] = {}
        until = time.monotonic() + seconds
        while len(codes) < len(self._children):
            for rank, child in self._children.items():
                if rank not in codes and (found := os.waitpid(child, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(found[1])
                    if codes[rank]:
                        self.kill()
            if time.monotonic() > until:
                self.kill()
            time.sleep(0.005)
        if any(codes.values()):
            self.kill()
        return [codes[rank] for rank in sorted(codes)]

    def said(self) -> str:
        """All that the ranks have said."""
        return "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("*.log")))


def become_program(
    ranks: int | None,
    arguments: Sequence[str],
    said: Path,
    fault: str,
    patch: Callable[[], None],
    began: Callable[[], object],
) -> NoReturn:
    """Be the launcher in a session of one's own, its ranks forked where it would spawn them; or a run in one process.

    Args:
        ranks: None: ``python -m megatron_hammer.train``.
        said: takes what it writes on stderr.
        patch: changes the program.
        began: called when its signal handlers stand.
    """
    os.setsid()
    null, stderr = os.open("/dev/null", os.O_RDWR), os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for target, source in ((0, null), (1, null), (2, stderr)):
        os.dup2(source, target)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", VARIABLE: fault, "OMP_NUM_THREADS": "1"}
    code = 99
    try:
        patch()
        real = multiprocessing.get_context
        attempt.multiprocessing.get_context = lambda method=None: real("fork")  # type: ignore[attr-defined,assignment]
        sys.argv = ["program", *([] if ranks is None else ["--nproc", str(ranks)]), str(TINY), *arguments]
        signals.end_at_once("before it began")
        began()
        (alone if ranks is None else launch)._main()
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def start_program(
    ranks: int | None, arguments: Sequence[str], said: Path, fault: str = "", patch: Callable[[], None] = lambda: None
) -> int:
    """Number of a child that is the program (``become_program``), when its signal handlers stand."""
    needs_to_train_in_a_child()
    there, ready = os.pipe()
    child = os.fork()
    if child == 0:
        become_program(ranks, arguments, said, fault, patch, lambda: (os.write(ready, b"1"), os.close(ready)))
    os.close(ready)
    os.read(there, 1)
    os.close(there)
    return child


class Launched:
    """A run under the launcher's own command line, in a process group."""

    def __init__(self, ranks: int, said: Path, arguments: Sequence[str]) -> None:
        self._said, self.pid = said, start_program(ranks, arguments, said)

    def is_running(self) -> bool:
        """Whether the launcher has not ended."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self, everything: bool) -> None:
        """SIGKILL to the launcher, or to it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if everything else os.kill)(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = RUN_SECONDS) -> int:
        """Exit code of the launcher, which is killed with everything when time is up."""
        until = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > until:
                self.kill(everything=True)
            time.sleep(0.005)
        return ended(self.pid)

    def is_gone(self, seconds: float) -> bool:
        """Whether nothing that the launcher has started is left, at the latest after so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.005)
        return False

    def said(self) -> str:
        """All that it has said."""
        return self._said.read_text(errors="replace")
