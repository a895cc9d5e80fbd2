"""Checkpoints in the background: each rank copies its state, a process beside it writes the copy, training goes on.

::

    rank k    begin: staging folder, snapshot    steps ...                        steps ...
    process k                           write rank-k.safetensors, fsync, read back
    rank 0                                                    ask for the commit
    process 0                                                 manifest, rename | prune
                                    in every step, summed over the ranks: is a rank still writing? has one failed?

This needs no collective of its own: the ranks sum flags in each step anyway (``flags``, ``heard``). No step waits
either: a rank reads its process's reports from a pipe without blocking. All ranks get the same sums in the same order,
so all go on to the next phase, or give the save up, at the same step. One save is in flight at a time. A save that
takes too long, whose process dies, or whose disk fails is given up on all ranks; the caller gets the reason, and saves
by itself while training waits.

The processes load little, have no GPU and no connection, only the memory and two pipes; they die with their ranks.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.base.errors import DiskError, HammerError, from_fields
from megatron_hammer.base.files import canonical_json, staging_path
from megatron_hammer.base.processes import KILL_SECONDS, outlives_a_kill
from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import read_regular
from megatron_hammer.base.signals import STOP_SIGNALS, blocked
from megatron_hammer.checkpoint.folder import Note, step_name
from megatron_hammer.checkpoint.kinds import style_of
from megatron_hammer.checkpoint.retention import Retention
from megatron_hammer.checkpoint.snapshot import Snapshot, places_of
from megatron_hammer.checkpoint.space import check_space
from megatron_hammer.checkpoint.write import agreed_number, bytes_to_write, layout_of, owned_views, stage, together
from megatron_hammer.config import config_from_tree
from megatron_hammer.parallel.agreement import all_or_none, raise_together
from megatron_hammer.parallel.collectives import all_reduce, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.sharding import Shard
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.tokenizer_files import MAX_TOKENIZER_BYTES

WAIT_SECONDS = 5.0  # after so long a wait ranks tell each other again: no collective waits for a disk
CLOSE_SECONDS = 60.0  # for what is old to be removed at the end of a run
BUSY, FAILED = 1, 2


class WriterProcess:
    """The process beside one rank (``writer_process.py``): takes requests one after the other and answers each."""

    def __init__(self, snapshot: Snapshot, rank: int, plan: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "megatron_hammer.checkpoint.writer_process"]
        command += [str(n) for n in (snapshot.descriptor, snapshot.size, rank, os.getpid())]
        with blocked(STOP_SIGNALS):  # a stop is the rank's affair
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(snapshot.descriptor,)
            )
        assert self._process.stdout is not None
        self._answers = self._process.stdout.fileno()
        os.set_blocking(self._answers, False)
        self._rest, self._rank = b"", rank
        self._asked, self._answered = 0, 0  # each counted by one thread at a time
        self.error: HammerError | None = None
        self.ask({"do": "plan", **plan})

    @property
    def open(self) -> int:
        """Requests that have not been answered."""
        return self._asked - self._answered

    def ask(self, request: Mapping[str, Any]) -> None:
        """Hand over a request; an error shows in ``error``."""
        assert self._process.stdin is not None
        self._asked += 1
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (OSError, ValueError):  # it has died, as ``hear`` will say; or was ended here, and its pipe closed
            self.error = self.error or self._died()

    def hear(self, note: Note) -> None:
        """Take note of what has been answered so far; never waits."""
        while True:
            try:
                text = os.read(self._answers, 65536)
            except BlockingIOError:
                break
            if not text:
                self.error = self.error or self._died()
                break
            *lines, self._rest = (self._rest + text).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                self._answered += 1
                if "error" in answer:
                    self.error = self.error or from_fields(answer["error"])
                for remark in answer.get("notes", ()):
                    note(remark)

    def wait(self, seconds: float) -> None:
        """Wait for an answer, if one is owed and nothing has failed."""
        if self.open and self.error is None:
            select.select([self._answers], [], [], max(0.0, seconds))

    def end(self) -> str:
        """Kill it, if it lives, and wait for its end, but not for ever.

        Returns:
            an empty text; or, where it is still there, what to say of it.
        """
        self._process.kill()
        self._close()
        try:
            self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return f"rank {self._rank}, writer of checkpoints: {outlives_a_kill(self._process.pid)}"
        return ""

    def close(self, seconds: float) -> str:
        """Let it finish what it was asked for, if it does so in time, and end; the result is that of ``end``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(seconds)
        except (OSError, subprocess.TimeoutExpired):
            return self.end()
        self._close()
        return ""

    def _close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                pass  # what was not written is for nobody any more

    def _died(self) -> DiskError:
        try:
            code = self._process.wait(1.0)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            how = "closed its pipe"
        return DiskError(
            2,
            f"the process that writes for rank {self._rank}",
            how,
            "see what it printed; use checkpoint.mode=blocking",
        )


@dataclass
class InFlight:
    """A save that has begun."""

    step: int
    target: Path
    staging: Path
    state: Mapping[str, Any]
    deadline: float
    commits: bool = False
    """All ranks have written; rank 0's process commits."""


@dataclass(frozen=True)
class SaveOutcome:
    """How a save in the background has ended, on all ranks alike."""

    step: int
    folder: Path
    error: HammerError | None = None
    """Why nothing was committed."""


class BackgroundSaver:
    """Saves a run's checkpoints in the background; all ranks have one and call it alike.

    Args:
        folder: of the checkpoints.
        shards: this rank's part, as it will be with every save.
        sync_first: files that must be on the disk before a checkpoint is committed.
        note: called on rank 0 with a line for people.
        remark: the same, on what lies in the folder: the same line at each save.

    Raises:
        MemoryShortage: on all ranks, where one has no memory for a snapshot.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        *,
        config_tree: Mapping[str, Any],
        weights_dtype: str,
        tokenizer: Tokenizer | None,
        retention: Retention,
        timeout_seconds: float,
        ctx: ParallelContext,
        sync_first: Sequence[Path] = (),
        note: Note,
        remark: Note,
    ) -> None:
        self._folder, self._ctx, self._note, self._remark = folder, ctx, note, remark
        self._timeout, self._leader = timeout_seconds, ctx.world.rank == 0
        self._commit = {
            "config": config_tree,
            "weights_dtype": weights_dtype,
            "layout": asdict(layout_of(ctx, config_tree)),
            "sync_first": [str(path) for path in sync_first],
        }
        canonical_json(self._commit)  # a mistake of ours shows now
        self._retention = asdict(retention)
        slices, views = owned_views(shards)
        sizes = [view.numel() * view.element_size() for view in views]
        self._numels = [view.numel() for view in views]
        self._offsets, size = places_of(sizes)
        rows = [
            [s.name, s.kind, s.rows, s.cols, s.shape, s.dtype, at, n]
            for s, at, n in zip(slices, self._offsets, sizes, strict=True)
        ]
        files = {} if tokenizer is None or not self._leader else _files_of(tokenizer)
        self._plan = {"slices": rows, "tokenizer": files, "fingerprint": tokenizer.fingerprint if tokenizer else ""}
        self._needed = bytes_to_write(config_from_tree(dict(config_tree)).model, shards, style_of(config_tree))
        self._number = agreed_number(ctx)
        with all_or_none(ctx, "taking memory for the copy of a checkpoint"):
            self._snapshot = Snapshot(size, ctx.device)
        self._writer: WriterProcess | None = self._start()
        self._prunes = False
        """Whether rank 0's process was asked to remove what is old, and may still be at it; known to rank 0."""
        self.save: InFlight | None = None
        self.phase = 0
        """Counts up whenever a save begins, goes on or ends: flags that were sent before say nothing any more."""

    def _start(self) -> WriterProcess:
        return WriterProcess(self._snapshot, self._ctx.world.rank, self._plan)

    # ---- a save, in order ----------------------------------------------------------------------------------------

    def begin(self, step: int, shards: Sequence[Shard], state: Mapping[str, Any]) -> None:
        """Begin to save this state as the checkpoint of ``step``. Communicates over the world, as little as can be.

        Raises:
            HammerError: on all ranks, where the staging folder cannot be made or there is too little space.
        """
        assert self.save is None, "one save at a time"
        canonical_json(state)
        self.wait_for_pruning()  # staging removes left-overs, and what is being removed has the name of one
        self._number = (self._number + 1) % 2**64
        target = self._folder / step_name(step)
        staging = staging_path(target, f"{self._number:016x}")
        views = owned_views(shards)[1]
        assert [view.numel() for view in views] == self._numels, "the slices have changed"
        try:
            together(lambda: self._stage(staging, step), self._ctx, target)
        except HammerError:
            if self._leader:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        self._writer = writer = self._healthy_writer()
        self.save = InFlight(step, target, staging, state, time.monotonic() + self._timeout)
        self.phase += 1
        self._snapshot.take(views, self._offsets, lambda: writer.ask({"do": "write", "staging": str(staging)}))

    def _healthy_writer(self) -> WriterProcess:
        """The process, or a new one where it has died since the last save."""
        if self._writer is not None:
            self._writer.hear(self._remark)
            if self._writer.error is None:
                return self._writer
            self._end(self._writer)
        return self._start()

    def _end(self, writer: WriterProcess) -> bool:
        """End a process; whether it has ended. One that has not is named."""
        left = writer.end()
        if left:
            say(f"warning: {left}")
        return not left

    def _stage(self, staging: Path, step: int) -> None:
        if self._leader:
            stage(self._folder, staging, step, self._remark)
            check_space(self._folder, self._needed, self._ctx.world.size)

    def before_update(self) -> None:
        """Wait until the weights may change."""
        self._snapshot.wait()

    def flags(self) -> int:
        """Of this rank, for all others to hear in this step: BUSY while its part is not done, FAILED, or 0."""
        save, writer = self.save, self._writer
        if save is None or writer is None:
            return 0
        writer.hear(self._remark)
        if writer.error is None and time.monotonic() > save.deadline:
            writer.error = self._late(f"written {save.target}")
        if writer.error is not None:
            return FAILED
        return BUSY if self._is_busy(save) else 0

    def _is_busy(self, save: InFlight) -> bool:
        assert self._writer is not None
        if save.commits and not self._leader:
            return False
        return self._writer.open > 0 or not self._snapshot.is_handed_over

    def heard(self, phase: int, busy: int, failed: int) -> SaveOutcome | None:
        """Go on with what all ranks' flags of one step say; communicates only where something has failed.

        Args:
            phase: what ``self.phase`` was when they were sent.
            busy, failed: how many ranks sent which.

        Returns:
            how the save has ended, once it has.
        """
        save = self.save
        if save is None or phase != self.phase or (busy and not failed):
            return None
        self.phase += 1
        if failed:
            return self._give_up(save)
        self._snapshot.finish()
        assert self._writer is not None
        if not save.commits:
            save.commits = True
            if self._leader:
                where = {"staging": str(save.staging), "target": str(save.target), "step": save.step}
                self._writer.ask({"do": "commit", **self._commit, **where, "state": save.state})
            return None
        self.save = None
        if self._leader:
            names = {"folder": str(self._folder), "newest": str(save.target)}
            self._writer.ask({"do": "prune", **names, "retention": self._retention})
            self._prunes = True
        return SaveOutcome(save.step, save.target)

    def finish(self) -> SaveOutcome | None:
        """Wait for the save in flight, if there is one; how it has ended. Communicates over the world."""
        outcome = None
        while self.save is not None and outcome is None:
            self._snapshot.finish()
            busy, failed = self._told(self.flags, self.save.deadline)
            outcome = self.heard(self.phase, busy, failed)
        return outcome

    def wait_for_pruning(self) -> None:
        """Wait until what is old has been removed, so that nobody else removes it at the same time.

        A process that takes too long is ended. Communicates over the world.
        """
        deadline = time.monotonic() + self._timeout
        while self._told(lambda: self._pruning(deadline), deadline)[0]:
            pass

    def _pruning(self, deadline: float) -> int:
        """BUSY while this rank's process removes what is old, at most until the deadline; else 0.

        One that is only being started is not waited for.
        """
        writer = self._writer
        if writer is None or not self._prunes:
            return 0
        writer.hear(self._remark)
        self._prunes = writer.open > 0 and writer.error is None
        if not self._prunes:
            return 0
        if time.monotonic() <= deadline:
            return BUSY
        self._note(f"warning: a process is ended, so that the next save begins: {self._late('removed what is old')}")
        self._end(writer)
        self._writer, self._prunes = None, False
        return 0

    def _told(self, flags: Callable[[], int], deadline: float) -> tuple[int, int]:
        """How many ranks are BUSY, and how many FAILED, once this one is not BUSY, or after a while.

        Args:
            flags: of this rank, which are others after the deadline.
        """
        until = time.monotonic() + WAIT_SECONDS
        while (mine := flags()) == BUSY and (left := until - time.monotonic()) > 0:
            assert self._writer is not None
            self._writer.wait(min(left, deadline - time.monotonic()))
        counts = torch.tensor([mine == BUSY, mine == FAILED], dtype=torch.int32, device=self._ctx.device)
        all_reduce(counts, self._ctx.world)
        busy, failed = read_back(counts, self._ctx.world)
        return busy, failed

    def _late(self, done: str) -> DiskError:
        return DiskError(
            2,
            f"the process that writes for rank {self._ctx.world.rank}",
            f"has not {done} in {self._timeout:g} s (checkpoint.background_timeout_seconds)",
            "look at the disk; allow it more time",
        )

    def _give_up(self, save: InFlight) -> SaveOutcome:
        """End this rank's process if it does not do well, remove what was staged, and tell why; on all ranks."""
        assert self._writer is not None
        self._snapshot.finish()
        self._writer.hear(self._remark)
        mine, ended = self._writer.error, True
        if mine is not None or self._writer.open:
            ended = self._end(self._writer)
            self._writer = None
        self.save = None
        try:
            raise_together(self._ctx, mine)  # nobody writes any more when this returns, or nobody can
        except HammerError as error:
            if self._leader and ended:  # else its last call to the kernel may be the rename: of a whole folder, or none
                shutil.rmtree(save.staging, ignore_errors=True)
            return SaveOutcome(save.step, save.target, error)
        raise AssertionError(f"a save of {save.target} failed on no rank")

    def close(self) -> None:
        """End the process and give the memory back; what is in flight is not waited for."""
        if self._writer is not None:
            left = self._writer.close(CLOSE_SECONDS) if self.save is None else self._writer.end()
            if left:
                say(f"warning: {left}")
            self._writer = None
        self._snapshot.close()


def _files_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a tokenizer, as hexadecimal text."""
    with tempfile.TemporaryDirectory(prefix="hammer-tokenizer-") as folder:
        tokenizer.save_files(Path(folder))
        return {path.name: read_regular(path, MAX_TOKENIZER_BYTES).hex() for path in sorted(Path(folder).iterdir())}
