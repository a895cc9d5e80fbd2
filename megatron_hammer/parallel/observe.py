"""Which rank hangs, and which one the others wait for: judged by what the ranks note on the board and by the kernel.

A rank that hangs writes no more notes. Those that wait for it write none either, but their last note says that they are
waiting. So the rank to blame is stopped, or computes without a note, or is behind in the count of collectives. A rank
that still writes notes is slow, not stuck: it is named in a message, and left alone. ``hung`` and ``Stragglers`` only
judge; ``Observer`` reads the board, asks ranks for their Python stacks, and makes the messages. Needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_hammer.base.errors import HangError
from megatron_hammer.base.progress import say
from megatron_hammer.base.system import find_process, wait_channel
from megatron_hammer.parallel.board import STACKS_SIGNAL, START, Board, Doing

BUSY_SHARE = 0.02  # of a core: who computes and says nothing compiles a model, or takes a very long step
STACKS_SECONDS = 2.0  # for all ranks to write their stacks; a healthy one takes milliseconds
WINDOW_SECONDS = 30.0  # over which a straggler is judged
SLOW_SHARE = 1 / 3  # of the window in which the others waited for one rank: ten seconds, far beyond a pause of two
QUIET_SECONDS = 600.0  # between two notes on stragglers
WAITED_SECONDS = 0.3  # a wait that counts for them; of one who works, a rest that is none between two notes
PAUSE_SECONDS = 5.0  # between two looks, which come every half second: this process was stopped, and so its ranks were
WORK_OF_ONE = (START, "saving")  # phases in which one rank may work while the others wait


@dataclass(frozen=True)
class Seen:
    """One rank, as it was seen at one moment."""

    rank: int
    doing: Doing | None
    """None before it has said anything."""
    silent: float
    """Seconds since it last said something, or since it was started."""
    state: str = "S"
    """A letter of the kernel: R runs, S sleeps, D waits for a device, T is stopped, Z has ended."""
    wait_channel: str = ""
    """The function of the kernel in which it sleeps, where the kernel tells."""
    is_busy: bool = False
    """Whether it has computed while it was silent."""

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        return self.doing is not None and self.doing.waiting

    @property
    def is_stopped(self) -> bool:
        """By SIGSTOP, or by a debugger."""
        return self.state in ("T", "t")

    @property
    def has_ended(self) -> bool:
        """Whether the process is no more."""
        return self.state == "Z"

    def __str__(self) -> str:
        what = "start-up, before its first words" if self.doing is None else str(self.doing)
        state = {"T": "stopped", "t": "stopped by a debugger", "D": "waits for a device"}.get(self.state, "")
        channel = f"in {self.wait_channel}" if self.wait_channel not in ("", "0") else ""
        kernel = ", ".join(part for part in (f"state {self.state}", state, channel) if part)
        return f"{what}; silent for {self.silent:.1f} s ({kernel})"


def hung(ranks: Sequence[Seen], limit: float, alone: bool = True) -> list[Seen]:
    """Those to blame where some rank has been silent for too long; none where nothing hangs, or another node's does.

    Args:
        limit: seconds.
        alone: whether these are all ranks of the run.
    """
    late = [r for r in ranks if r.silent >= limit and (r.waits or r.is_stopped or not r.is_busy)]
    lively = [r for r in ranks if not r.waits and r.silent < limit / 2]  # the others wait for one who is slow
    return to_blame(ranks, alone) if late and not lively else []


def to_blame(ranks: Sequence[Seen], alone: bool) -> list[Seen]:
    """Whom the silent wait for: who is stopped, else who works, else who is behind; all, where nobody is.

    Of those that say that they work one that computes nothing is stuck. The others may wait as well: a GPU that waits
    takes some thousand launches, and the next one spins in its driver until there is room again.
    """
    working = [r for r in ranks if not r.waits]
    idle = [r for r in working if not r.is_busy and r.silent >= WAITED_SECONDS]
    for guilty in ([r for r in ranks if r.is_stopped], idle, working):
        if guilty:
            return guilty
    counts = {r.rank: (r.doing.step, r.doing.collectives) for r in ranks if r.doing is not None}
    behind = [r for r in ranks if counts[r.rank] == min(counts.values())]
    return behind if len(behind) < len(ranks) or alone else []


class Stragglers:
    """Who makes the others wait, over the last half minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, frozenset[int]]] = deque()
        self._last = self._quiet_until = 0.0

    def judge(self, now: float, ranks: Sequence[Seen]) -> tuple[int, float] | None:
        """A rank for which the others have waited for a large share of the window, and the share.

        Args:
            now: by ``time.monotonic``; called every half second or so.
        """
        seconds, self._last = min(now - self._last, 2.0), now
        guilty: frozenset[int] = frozenset()
        if any(r.waits and r.silent >= WAITED_SECONDS and not r.is_stopped for r in ranks):
            working = [r for r in ranks if r.is_stopped or not r.waits]
            excused = any(r.doing is None or r.doing.phase.startswith(WORK_OF_ONE) for r in working)
            guilty = frozenset() if excused else frozenset(r.rank for r in working)
        self._seen.append((now, seconds, guilty))
        while self._seen[0][0] < now - WINDOW_SECONDS:
            self._seen.popleft()
        if now < self._quiet_until:
            return None
        shares = {
            r.rank: sum(s for _, s, guilty in self._seen if r.rank in guilty) / WINDOW_SECONDS for r in ranks
        }  # fmt: skip
        slow = [rank for rank, share in shares.items() if share >= SLOW_SHARE]
        if len(slow) != 1:  # where it is now one and now the other, the work is uneven and no rank is slow
            return None
        self._quiet_until = now + QUIET_SECONDS
        return slow[0], shares[slow[0]]


class Observer:
    """Looks at the ranks of one machine.

    Args:
        board: theirs, in the order of ``numbers``.
        numbers: of the ranks in the run.
        limit: seconds of silence that make a hang (``parallel.timeout_seconds``).
        alone: whether these are all ranks of the run.
        note: gets the notes on stragglers.
    """

    def __init__(
        self, board: Board, numbers: Sequence[int], limit: float, alone: bool = True, note: Callable[[str], None] = say
    ) -> None:
        self.board, self.numbers, self.limit, self.alone, self._note = board, list(numbers), limit, alone, note
        self._began, self._asked = time.monotonic(), False
        self._looked: tuple[float, float] | None = None
        """When this process looked last, and the CPU time that it had taken then."""
        self._woke = self._began
        self._stragglers = Stragglers()
        self._computed: dict[int, tuple[float, float]] = {}  # rank -> (its last words, its CPU time then)

    def ask(self) -> None:
        """Say at the next look what all ranks are doing."""
        self._asked = True

    def see(self, pids: Mapping[int, int]) -> list[Seen]:
        """The ranks with these processes, as they are now."""
        return [self._see(rank, pid) for rank, pid in pids.items()]

    def _see(self, rank: int, pid: int) -> Seen:
        doing = self.board.read(self.numbers.index(rank))
        noted = self._began if doing is None else doing.noted
        silent = max(0.0, time.monotonic() - max(noted, self._woke))
        state, computed = process_state(pid)
        if self._computed.get(rank, (None, 0.0))[0] != noted:
            self._computed[rank] = noted, computed
        busy = state == "R" or computed - self._computed[rank][1] >= BUSY_SHARE * silent
        return Seen(rank, doing, silent, state, wait_channel(pid) if silent > 1 else "", busy)

    def look(self, pids: Mapping[int, int]) -> tuple[HangError, str] | None:
        """The hang, if there is one, and what all ranks were doing; notes stragglers.

        Args:
            pids: of the ranks that live.
        """
        seen = self.see(pids)
        if self._asked:
            self._asked = False
            self._note(self.stacks(pids))
        if guilty := self._judge(seen):
            return self.describe(guilty, pids)
        return None

    def find(self, pids: Mapping[int, int]) -> list[Seen]:
        """The ranks that hang, among those that live; notes stragglers."""
        return self._judge(self.see(pids))

    def _has_slept(self) -> bool:
        """Whether the whole run has been stopped since the last look (Ctrl-Z, a frozen container): it is no silence."""
        now, computed = time.monotonic(), time.process_time()
        before, before_computed = self._looked or (now, computed)
        self._looked = now, computed
        slept = now - before
        # A rank that looks itself (torchrun) may be kept from it by its own code, which computes meanwhile.
        if slept <= PAUSE_SECONDS or computed - before_computed >= BUSY_SHARE * slept:
            return False
        self._woke = now
        self._note(f"note: this run has stood still for {slept:.0f} s, and goes on")
        return True

    def _judge(self, seen: Sequence[Seen]) -> list[Seen]:
        if self._has_slept():
            return []
        if guilty := hung(seen, self.limit, self.alone):
            return guilty
        if slow := self._stragglers.judge(time.monotonic(), seen):
            rank, share = slow
            (where,) = (r for r in seen if r.rank == rank)
            self._note(
                f"note: rank {rank} is slow: the others have waited for it in {share:.0%} of the last "
                f"{WINDOW_SECONDS:.0f} s; it is in {where}"
            )
        return []

    def after_timeout(self, failed: Sequence[int], waited_until: float, pids: Mapping[int, int]) -> bool:
        """Whether a rank has failed because its time in a collective was up, while ranks that live kept it waiting.

        Args:
            failed: their numbers.
            waited_until: when the first one failed.
            pids: of the ranks that live.
        """
        words = [self.board.read(self.numbers.index(rank)) for rank in failed]
        since = [max(d.noted, self._woke) for d in words if d and d.waiting]
        return bool(pids) and any(waited_until - at >= 0.9 * self.limit for at in since)

    def describe_waited_for(self, pids: Mapping[int, int]) -> tuple[HangError, str]:
        """``describe`` those of the living that kept a rank waiting until its time was up."""
        return self.describe(to_blame(self.see(pids), alone=True), pids)

    def describe(self, guilty: Sequence[Seen], pids: Mapping[int, int]) -> tuple[HangError, str]:
        """The error that names these, and what every rank was doing, with its Python stack."""
        numbers = ", ".join(str(r.rank) for r in guilty)
        error = HangError(
            1,
            f"rank {numbers}",
            f"hung: {guilty[0]}",
            "the Python stacks of all ranks are above; run the same command again: it resumes from the last checkpoint",
        )
        return error, self.stacks(pids)

    def stacks(self, pids: Mapping[int, int]) -> str:
        """What each rank is doing and its Python stack, ranks with the same stack together."""
        seen = {r.rank: r for r in self.see(pids)}
        asked = [rank for rank, r in seen.items() if r.doing is not None and r.doing.answers and not r.is_stopped]
        texts = dict.fromkeys(asked, "")
        for rank in asked:
            self.board.stacks(self.numbers.index(rank))  # what an earlier question has left
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], STACKS_SIGNAL)
        deadline = time.monotonic() + STACKS_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.05)  # also after the first bytes of the last one, for the others
            new = {rank: self.board.stacks(self.numbers.index(rank)) for rank in asked}
            texts = {rank: text + new[rank] for rank, text in texts.items()}
            if all(texts.values()) and not any(new.values()):
                break
        lines = [f"rank {rank}: {r}" for rank, r in seen.items()]
        for text, ranks in _alike(texts).items():
            lines.append(f"rank {', '.join(map(str, ranks))}, Python stack:")
            lines.append(text or "  (it did not answer)")
        return "\n".join(lines)

    def last_stack(self, rank: int) -> str:
        """What a rank wrote of itself when it died of a bad access or an abort."""
        return _without_addresses(self.board.stacks(self.numbers.index(rank)))

    def began_training(self, pids: Mapping[int, int]) -> bool:
        """Whether one of these ranks has begun a step."""
        return any(r.doing is not None and r.doing.step > 0 for r in self.see(pids))


def _alike(texts: Mapping[int, str]) -> dict[str, list[int]]:
    """Stack -> the ranks that have it."""
    groups: dict[str, list[int]] = {}
    for rank, text in texts.items():
        groups.setdefault(_without_addresses(text), []).append(rank)
    return groups


def _without_addresses(text: str) -> str:
    """A stack as faulthandler writes it, without what differs from process to process."""
    return re.sub(r"hread 0x[0-9a-f]+", "hread", text).strip("\n")


def process_state(pid: int) -> tuple[str, float]:
    """The kernel's letter for a process and the CPU seconds it has used; ``Z`` where there is none."""
    process = find_process(pid)
    return ("Z", 0.0) if process is None else (process.state, process.cpu_seconds)
