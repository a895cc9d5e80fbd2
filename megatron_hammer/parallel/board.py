"""The board: shared memory in which each rank of a machine notes its step, phase and collective for the launcher.

::

    launcher   Board: an anonymous file of one slot a rank, mapped; its descriptor is handed to each rank
    rank r     StatusSlot: writes slot r whenever something begins; the time of that writing is its sign of life
               and a second anonymous file, into which the rank's Python stacks are written when the launcher asks

No network, no file name, nothing that outlives the processes. A rank notes what it is going to do before it does it, so
the slot of a rank that stops half-way still says where. A note costs about a microsecond. For a collective, of which a
layer has ten, it costs no Python call: what changes lies together in the slot, and ``collectives.py`` writes it with
``StatusSlot.note``, a C function. A rank may be writing while its slot is read, so a reader reads until it has seen the
same bytes twice. Needs no torch.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import reduction
from typing import Any

from megatron_hammer.base.system import shared_memory_file

STACKS_SIGNAL = signal.SIGUSR2  # asks a rank for its Python stacks; USR1 is a stop signal (base/signals.py)
START = "start-up"  # the phase before the first step
_PLACE = struct.Struct("<qqq48s")  # pid, answers, step, phase
_NOW = struct.Struct("<qq?7x24s")  # time in ns, collectives, waiting, collective
SLOT_BYTES = 128  # two cache lines: ranks do not write into each other's
_READ_TRIES = 100  # of a slot that is being written, before what was read is taken as it is


@dataclass(frozen=True)
class Doing:
    """What a rank was doing when it last said so."""

    noted: float
    """When that was, by ``time.monotonic``, which is one clock for all processes of a machine."""
    pid: int
    """0 before the rank has begun to note anything."""
    answers: bool
    """Whether it writes its stacks when it is asked to."""
    step: int
    """0 before the first step of this process."""
    collectives: int
    """How many collectives it has begun."""
    waiting: bool
    """Whether it is in one, or waits for one."""
    phase: str
    collective: str
    """The last one begun."""

    def __str__(self) -> str:
        """For people: ``step 7, saving: waits in all_reduce, its collective number 812``."""
        where = f"step {self.step}, {self.phase}" if self.step else self.phase
        if not self.waiting:
            return where
        return f"{where}: waits in {self.collective}, its collective number {self.collectives}"


class StatusSlot:
    """Writes what one rank is doing into its slot; PyTorch's flight recorder keeps the like of collectives.

    Args:
        slot: of a board; None for a process that nobody watches.
    """

    def __init__(self, slot: memoryview | None = None) -> None:
        self._slot = slot if slot is not None else memoryview(bytearray(SLOT_BYTES))
        self.note: Callable[..., None] = partial(_NOW.pack_into, self._slot, _PLACE.size)
        """Writes ``time.monotonic_ns()``, then ``collectives``, whether the rank waits, and ``collective``."""
        self.collectives, self.collective = 0, b""
        """How many collectives have begun, and the last one. They and ``is_waiting`` are set before they are noted."""
        self.is_waiting = False
        """Whether the rank is in a collective, or has failed in one."""
        self._pid, self._answers, self._step, self._phase = os.getpid(), 0, 0, START.encode()
        self._write()

    def answer(self, stacks: int) -> None:
        """Write the Python stacks of all threads into an open file when ``STACKS_SIGNAL`` comes, or a bad access."""
        faulthandler.enable(stacks, all_threads=True)
        faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True, chain=False)
        self._answers = 1
        self._write()

    def step(self, number: int) -> None:
        """Step ``number`` begins."""
        self._step = number
        self._write()

    def mark(self, phase: str) -> None:
        """Another part of the step begins; saying the same again is a sign of life too."""
        self._phase = phase.encode()[:48]
        self._write()

    def leave(self) -> None:
        """The rank has done its work: its slot is empty again."""
        self._pid = 0
        self._write()

    @contextmanager
    def waits(self, collective: str | None = None) -> Iterator[None]:
        """Within the block this rank waits for others.

        Args:
            collective: one that begins now; None: one that has begun.
        """
        if collective is not None:
            self.collectives, self.collective = self.collectives + 1, collective.encode()[:24]
        self.is_waiting = True
        self.note(time.monotonic_ns(), self.collectives, True, self.collective)
        yield
        self.is_waiting = False  # not where it raises: then the slot says in what the rank has failed
        self.note(time.monotonic_ns(), self.collectives, False, self.collective)

    def _write(self) -> None:
        _PLACE.pack_into(self._slot, 0, self._pid, self._answers, self._step, self._phase)
        self.note(time.monotonic_ns(), self.collectives, self.is_waiting, self.collective)


class Board:
    """The slots of some ranks, and the files for their stacks.

    Args:
        ranks: how many.
        descriptors: of a board that another process has made: its own first, then the files for stacks.
    """

    def __init__(self, ranks: int, descriptors: tuple[int, ...] | None = None) -> None:
        if descriptors is None:
            descriptors = tuple(shared_memory_file(f"hammer-board-{i}") for i in range(ranks + 1))
            os.ftruncate(descriptors[0], ranks * SLOT_BYTES)
        self.descriptors = descriptors
        self._memory = mmap.mmap(descriptors[0], ranks * SLOT_BYTES)
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        """How it reaches a process that is being spawned: by descriptors that the child inherits."""
        return _inherited, (self.ranks, tuple(reduction.DupFd(descriptor) for descriptor in self.descriptors))

    def slot(self, rank: int) -> StatusSlot:
        """For the process that is this rank."""
        status = StatusSlot(memoryview(self._memory)[rank * SLOT_BYTES : (rank + 1) * SLOT_BYTES])
        status.answer(self.descriptors[1 + rank])
        return status

    def read(self, rank: int) -> Doing | None:
        """What this rank does; None before it has said anything."""
        before = b""
        for _ in range(_READ_TRIES):
            slot = self._memory[rank * SLOT_BYTES : (rank + 1) * SLOT_BYTES]
            if slot == before:
                break
            before = slot
        pid, answers, step, phase = _PLACE.unpack_from(before)
        noted, collectives, waiting, collective = _NOW.unpack_from(before, _PLACE.size)
        if not pid:
            return None
        texts = (text.rstrip(b"\0").decode(errors="replace") for text in (phase, collective))
        return Doing(noted / 1e9, pid, bool(answers), step, collectives, waiting, *texts)

    def stacks(self, rank: int) -> str:
        """What has been written into the file for the stacks of this rank since it was last read."""
        descriptor = self.descriptors[1 + rank]
        size = os.fstat(descriptor).st_size
        text = os.pread(descriptor, size, 0)
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)  # one position for all who have the file
        return text.decode(errors="replace")

    def close(self) -> None:
        """Give the memory back; slots of this process must not be used any more."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def _inherited(ranks: int, descriptors: tuple[Any, ...]) -> Board:
    """The board of the parent process."""
    return Board(ranks, tuple(descriptor.detach() for descriptor in descriptors))
