"""The state of a run: how far it is, and what a checkpoint keeps of that.

The optimizer's shards, a few scalars of it, and the three values here are the whole state of a run. Everything else
(learning rate, order of samples, initial weights) is a pure function of the config, so that a run which is stopped and
started again computes what it would have computed, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_hammer.checkpoint.live_state import check_live_state
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.loader import chain_digest
from megatron_hammer.sampling.order import SampleId
from megatron_hammer.train.prepare import OWED, STATE_KINDS, Prepared


@dataclass(frozen=True)
class RunState:
    """How far a run is after some step."""

    step: int = 0
    consumed_samples: int = 0
    samples_digest: str = ""
    """Over the names of all these samples (``chain_digest``)."""
    owed: str = ""
    """The line that metrics.jsonl lacks where a stop signal cut short the evaluation of this step: the run goes on
    with that. JSON, which may hold NaN."""

    def after_step(self, ids: Sequence[SampleId], fingerprints: Sequence[str]) -> RunState:
        """The state one step later, which has consumed these samples; ``fingerprints`` are those of the sources."""
        digest = chain_digest(self.samples_digest, ids, fingerprints)
        return RunState(self.step + 1, self.consumed_samples + len(ids), digest)

    def to_manifest(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the manifest of a checkpoint keeps of it, with the optimizer's scalars, as JSON values."""
        return {
            "consumed_samples": self.consumed_samples,
            "samples_digest": self.samples_digest,
            "optimizer": optimizer.scalar_state(),
        } | ({OWED: self.owed} if self.owed else {})

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> RunState:
        """The inverse, for the optimizer's scalars see ``load_state``."""
        state = manifest.state
        return cls(manifest.step, state["consumed_samples"], state["samples_digest"], state.get(OWED, ""))


def check_state(
    prepared: Prepared, state: RunState, optimizer: Optimizer, ctx: ParallelContext, note: Callable[[str], None]
) -> None:
    """Compare the live state, right before the first step, with the digest of what was saved; new runs have none.

    Raises:
        CheckpointError: on all ranks, E417.
    """
    if prepared.resume is not None:
        values = state.to_manifest(optimizer)
        line = check_live_state(prepared.resume, optimizer.shards(), state.step, values, ctx)
        if line is not None and ctx.world.rank == 0:
            note(line)


def load_state(prepared: Prepared, optimizer: Optimizer, ctx: ParallelContext) -> RunState:
    """Fill the optimizer and the model's weights from where the run begins; the state there.

    That is the newest checkpoint of this run, else the weights of ``checkpoint.init_from``, else a new model. Of a
    checkpoint every weight is loaded, or none and all ranks raise: a model that was built for it has no other values.
    """
    if prepared.begins_anew:
        return RunState()
    manifest = prepared.resume or prepared.init_from
    assert manifest is not None
    resumed = manifest is prepared.resume
    kinds = STATE_KINDS if resumed else {"weight"}
    load_shards(manifest, optimizer.shards(), model=prepared.config.model, kinds=kinds, ctx=ctx)
    optimizer.copy_params_from_masters()
    if not resumed:
        return RunState()
    optimizer.load_scalar_state(manifest.state["optimizer"])
    return RunState.from_manifest(manifest)
