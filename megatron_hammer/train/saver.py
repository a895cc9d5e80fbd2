"""Saving checkpoints of a run.

The loop says when, and with which state; here is what goes into a checkpoint and where it lies. ``save`` returns when
the checkpoint is committed on all ranks. A saver that returns earlier and writes while the next steps run would be
another class with this method.
"""

from __future__ import annotations

from pathlib import Path

from megatron_hammer.base.errors import HammerError
from megatron_hammer.checkpoint.folder import KnownCheckpoints
from megatron_hammer.checkpoint.write import save_checkpoint
from megatron_hammer.config import config_to_tree
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.agreement import raise_together
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.output import HeldOutput, mark_saved
from megatron_hammer.train.prepare import Prepared, checkpoints_folder
from megatron_hammer.train.state import RunState


class Saver:
    """Writes this rank's part of the run's checkpoints."""

    def __init__(
        self, prepared: Prepared, optimizer: Optimizer, ctx: ParallelContext, output: HeldOutput | None = None
    ) -> None:
        self._output = output  # on rank 0 of a run that holds its folder's lock
        self._prepared, self._config, self._tokenizer = prepared, prepared.config, prepared.tokenizer
        self._optimizer, self._ctx = optimizer, ctx
        self._known = KnownCheckpoints()
        if prepared.resume is not None:
            self._known.add(prepared.resume.folder)

    def save(self, state: RunState) -> Path:
        """Write the checkpoint of a state whose step is over; the folder. Communicates over all ranks."""
        self._check_output()
        folder = save_checkpoint(
            checkpoints_folder(self._config),
            state.step,
            self._optimizer.shards(),
            model=self._config.model,
            config_tree=config_to_tree(self._config),
            state=state.to_manifest(self._optimizer) | self._prepared.to_state(),
            tokenizer=self._tokenizer,
            ctx=self._ctx,
            keep_last=self._config.checkpoint.keep_last,
            known=self._known,
        )
        if self._ctx.world.rank == 0:
            mark_saved(folder.parents[1], state.step)
        return folder

    def _check_output(self) -> None:
        """Raise on all ranks where the output folder or its lock are no longer those of this run."""
        failure: HammerError | None = None
        try:
            if self._output is not None:
                self._output.check()
        except HammerError as error:
            failure = error
        raise_together(self._ctx, failure)
