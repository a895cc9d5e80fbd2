"""Finds a hung rank without our launcher: a thread in every rank that does what the launcher's observer does.

Under torchrun or srun no launcher reads the board, so every rank of a machine does. All see the same, so all find the
same one to hang; the lowest rank that is well says so, kills it and leaves with the exit code of a hang, and the others
leave with it a moment later. The thread runs while the rank waits in a collective, which holds no lock of Python's.
Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from typing import Protocol

from megatron_hammer.base.errors import HangError, ParallelError
from megatron_hammer.base.progress import say
from megatron_hammer.base.system import open_of_process
from megatron_hammer.parallel.board import Board, StatusSlot
from megatron_hammer.parallel.observe import Observer

LOOK_SECONDS = 0.5
FOLLOW_SECONDS = 3.0  # after one rank has begun to speak: until the others leave, longer than stacks are waited for


class StoreLike(Protocol):
    """What is needed of the store where ranks meet."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


def share_board(store: StoreLike, node: int, local_rank: int, ranks: int) -> Board:
    """The board of the ranks of a machine, which its first rank makes and the others open.

    Raises:
        OSError: it cannot be opened, as where every rank has a container of its own.
    """
    key = f"board/{node}"
    if local_rank == 0:
        board = Board(ranks)
        store.set(key, json.dumps([os.getpid(), board.descriptors]))
        return board
    pid, descriptors = json.loads(store.get(key))
    return Board(ranks, tuple(open_of_process(pid, number) for number in descriptors))


class Watchman:
    """Watches the ranks of this machine, on behalf of one of them.

    Args:
        numbers: of the ranks, in the order of the board.
        rank: this one.
        limit: seconds of silence that make a hang (``parallel.timeout_seconds``).
        alone: whether these are all ranks of the run.
    """

    def __init__(
        self,
        board: Board,
        numbers: range,
        rank: int,
        limit: float,
        alone: bool,
    ) -> None:
        self.status: StatusSlot = board.slot(numbers.index(rank))
        self._board, self._numbers, self._rank = board, numbers, rank
        self._observer = Observer(board, numbers, limit, alone, say if rank == numbers[0] else lambda text: None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchman", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank has done its work: nobody waits for it any more."""
        self._stop.set()
        self._thread.join()
        self.status.leave()

    def dead(self) -> ParallelError | None:
        """The ranks of this machine that have died and not left, as an error; None where there are none."""
        pids = self._pids()
        dead = [seen.rank for seen in self._observer.see(pids) if seen.has_ended]
        if not dead:
            return None
        return ParallelError(
            1,
            f"rank {', '.join(map(str, dead))}",
            "died",
            "look at what started it for the signal; run the same command again: it resumes from the last checkpoint",
        )

    def _pids(self) -> dict[int, int]:
        """Of the ranks that have begun and not left."""
        words = {rank: self._board.read(place) for place, rank in enumerate(self._numbers)}
        return {rank: doing.pid for rank, doing in words.items() if doing is not None}

    def _watch(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            pids = self._pids()
            living = {seen.rank: pids[seen.rank] for seen in self._observer.see(pids) if not seen.has_ended}
            if guilty := self._observer.find(living):
                names = {seen.rank for seen in guilty}
                well = [s.rank for s in self._observer.see(living) if not s.is_stopped]
                speaker = min([rank for rank in well if rank not in names] or well or [self._rank])
                if self._rank == speaker:
                    error, stacks = self._observer.describe(guilty, living)
                    print(stacks, error, sep="\n", file=sys.stderr, flush=True)
                    for rank in names - {self._rank}:
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(living[rank], signal.SIGKILL)
                else:
                    time.sleep(FOLLOW_SECONDS)
                os._exit(HangError.exit_code)
