"""Saving checkpoints of a run.

The loop decides when to save, and which state. This module decides what goes into a checkpoint, where it lies, how it
is written (``checkpoint.mode``), and what to do when a save fails (``checkpoint.on_save_error``).

A blocking save returns when the checkpoint is committed on all ranks. One in the background returns at once; the ranks
learn that it has ended from flags that the loop sums over all ranks in each step (``word``, ``heard``). Before the next
one begins, before a blocking one, and before a run ends, what is in flight is waited for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError, DiskError, HammerError
from megatron_hammer.checkpoint.background import BUSY, FAILED, BackgroundSaver, SaveOutcome
from megatron_hammer.checkpoint.dtypes import PRECISION_DTYPES
from megatron_hammer.checkpoint.retention import KnownCheckpoints, Retention
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import config_to_tree
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.agreement import all_or_none
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.output import LockedOutput, mark_saved
from megatron_hammer.train.prepare import Prepared, checkpoints_folder
from megatron_hammer.train.state import RunState

READS_BACK_DIFFERENTLY = 16  # of CheckpointError: the one that a disk causes
RANK_BITS = 20  # of each of the counts in ``word``
MASK = (1 << RANK_BITS) - 1


class Saver:
    """Writes this rank's part of the run's checkpoints.

    Args:
        output: on rank 0 of a run that holds its folder's lock, that folder.
        say: called on rank 0 with a line on each save.
        note: called on rank 0 with a line on what went wrong, or took long.
        sync: on rank 0, makes durable what must be on the disk before a checkpoint is committed.
        committed: called on rank 0 with the folder of each new checkpoint.
    """

    def __init__(
        self,
        prepared: Prepared,
        optimizer: Optimizer,
        ctx: ParallelContext,
        output: LockedOutput | None = None,
        say: Callable[[str], None] = lambda text: None,
        note: Callable[[str], None] = lambda text: None,
        sync: Callable[[], None] = lambda: None,
        committed: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        config = prepared.config
        self._output = output
        self._prepared, self._settings, self._model = prepared, config.checkpoint, config.model
        self._optimizer, self._ctx, self._tree = optimizer, ctx, config_to_tree(config)
        self._folder, self._sync = checkpoints_folder(config), sync
        self._say, self._note, self._committed = say, note, committed
        self._remarks = set(prepared.notes)  # that have been said
        settings = config.checkpoint
        self._retention = Retention(settings.keep_last, settings.keep_every_steps, settings.pinned_steps or ())
        self._known = KnownCheckpoints()
        if prepared.resume is not None:
            self._known.add(prepared.resume.folder)
        self._failures = 0
        self.keeps_all = False
        """Whether the next blocking save removes no older checkpoint."""
        self.must_save = False
        """Whether a save in the background has failed, so that a blocking one must follow now; on all ranks alike."""
        self._background: BackgroundSaver | None = None
        if settings.mode == "background":
            self._background = BackgroundSaver(
                self._folder,
                optimizer.shards(),
                config_tree=self._tree,
                weights_dtype=PRECISION_DTYPES[config.train.precision],
                tokenizer=prepared.tokenizer,
                retention=self._retention,
                timeout_seconds=settings.background_timeout_seconds,
                ctx=ctx,
                sync_first=[Path(config.train.output) / "metrics.jsonl"],
                note=note,
                remark=self._remark,
            )
            optimizer.before_update = self._background.before_update

    def is_due(self, step: int) -> bool:
        """Whether ``checkpoint.pinned_steps`` asks for a save after this step."""
        return step in (self._settings.pinned_steps or ())

    def save(self, state: RunState, last: bool = False) -> None:
        """Save a state whose step is over. Communicates over all ranks.

        Args:
            last: the run ends now: return when the checkpoint is there, and never without it.

        Raises:
            HammerError: on all ranks: what a failed save means here (``checkpoint.on_save_error``).
        """
        self._check_output()
        if self._background is not None and self._background.save is not None:
            began = time.monotonic()
            self._report(self._background.finish())
            if not last and not self.must_save:
                self._note(f"note: training waited {time.monotonic() - began:.1f} s for the checkpoint before")
        try:
            if self._background is None or last or self.must_save:
                self._save_now(state)
            else:
                self._background.begin(state.step, self._optimizer.shards(), self._manifest_state(state))
        except (DiskError, CheckpointError) as error:
            self._failed(error, state.step, last)

    def _remark(self, line: str) -> None:
        """Of what lies in the folder and stays there, one line in a run, and another when it changes."""
        if line not in self._remarks:
            self._remarks.add(line)
            self._note(line)

    def word(self) -> int:
        """What this rank has to say of the save in flight: to be summed over all ranks, and decoded by ``heard``."""
        flags = 0 if self._background is None else self._background.flags()
        return ((flags == BUSY) << RANK_BITS) | ((flags == FAILED) << 2 * RANK_BITS)

    @property
    def phase(self) -> int:
        """To be kept with a word, and given to ``heard`` with the sum."""
        return 0 if self._background is None else self._background.phase

    def heard(self, phase: int, words: int) -> None:
        """What the sum of all ranks' words means; the same on all ranks. Communicates only where a save has failed."""
        if self._background is not None:
            busy, failed = words >> RANK_BITS & MASK, words >> 2 * RANK_BITS & MASK
            self._report(self._background.heard(phase, busy, failed))

    def finish(self) -> None:
        """Wait for the save in flight; if it fails, ``must_save`` is set. Communicates over all ranks."""
        if self._background is not None:
            self._report(self._background.finish())

    def close(self) -> None:
        """Give up what is in flight, and end what works in the background."""
        if self._background is not None:
            self._background.close()
            self._background = None

    def _save_now(self, state: RunState) -> None:
        if self._background is not None:
            self._background.wait_for_pruning()
        self._sync()
        self._check_output()
        folder = save_checkpoint(
            self._folder,
            state.step,
            self._optimizer.shards(),
            model=self._model,
            config_tree=self._tree,
            state=self._manifest_state(state),
            tokenizer=self._prepared.tokenizer,
            ctx=self._ctx,
            retention=replace(self._retention, keep_last=sys.maxsize) if self.keeps_all else self._retention,
            note=self._remark,
            known=self._known,
        )
        self.must_save, self._failures = False, 0
        self._saved(folder, state.step)

    def _saved(self, folder: Path, step: int) -> None:
        if self._ctx.world.rank == 0:
            mark_saved(folder.parents[1], step)
            self._committed(folder)
        self._say(f"saved {folder}")

    def _check_output(self) -> None:
        """Raise on all ranks where the output folder or its lock are no longer those of this run."""
        with all_or_none(self._ctx, "looking at train.output"):
            if self._output is not None:
                self._output.check()

    def _manifest_state(self, state: RunState) -> dict[str, Any]:
        return state.to_manifest(self._optimizer) | self._prepared.to_state()

    def _report(self, outcome: SaveOutcome | None) -> None:
        if outcome is None:
            return
        if outcome.error is None:
            self._failures = 0
            self._saved(outcome.folder, outcome.step)
        else:
            self.must_save = True
            self._note(
                f"warning: saving {outcome.folder} in the background has failed; the present step is saved "
                f"while training waits: {outcome.error}"
            )

    def _failed(self, error: HammerError, step: int, last: bool) -> None:
        """Raise, or go on without this checkpoint; the same on all ranks."""
        self._failures += 1
        disk = isinstance(error, DiskError) or error.number == READS_BACK_DIFFERENTLY
        limit = self._settings.max_save_errors
        if self._settings.on_save_error == "stop" or last or not disk or self._failures >= limit:
            raise error
        self.must_save = False
        self._note(
            f"warning: step {step} was not saved ({self._failures} of at most {limit - 1} in a row, "
            f"checkpoint.on_save_error=continue): {error}"
        )
