"""The state of a run: how far it is, and what a checkpoint keeps of that.

The optimizer's shards, a few scalars of it, and the values here are the whole state of a run. Everything else
(learning rate, order of samples, initial weights) is a pure function of the config, so that a run which is stopped and
started again computes what it would have computed, bit for bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.live_state import LiveSums, check_live_state
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.config import Config
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.ledger import ledger_from_trees
from megatron_hammer.sampling.loader import chain_digest
from megatron_hammer.sampling.order import SampleId
from megatron_hammer.sampling.phases import Skips
from megatron_hammer.sampling.samples import TrainData
from megatron_hammer.train.prepare import OWED, REWINDS, Prepared

UPCOMING, HEALTH, CONSUMED = "next", "health", "source_tokens"  # in the state of a checkpoint


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
    upcoming: Mapping[str, Any] | None = None
    """What the next step will read and with which learning rate, where that is to be saved: see ``upcoming``."""
    health: Mapping[str, Any] | None = None
    """What is remembered of the last steps (``Health.to_tree``), where that is to be saved or was loaded."""
    consumed: Mapping[str, int] = field(default_factory=dict)
    """Targets that the run has read from each source: by the source's content (``TrainData.keys``), so that a source
    keeps its count where it is moved, and where the mix is changed."""

    def after_step(self, ids: Sequence[SampleId], data: TrainData) -> RunState:
        """The state one step later, which has consumed these samples of the data."""
        digest = chain_digest(self.samples_digest, ids, data.fingerprints)
        consumed, seq_length = dict(self.consumed), data.seq_length_at(self.consumed_samples)
        for source, samples in Counter(sample.source for sample in ids).items():
            consumed[data.keys[source]] = consumed.get(data.keys[source], 0) + samples * seq_length
        return RunState(self.step + 1, self.consumed_samples + len(ids), digest, consumed=consumed)

    def counted(self, data: TrainData) -> RunState:
        """The state with its counts of the sources: those of a version that kept none follow from the mix."""
        if self.consumed or not self.consumed_samples:
            return self
        tokens = zip(data.keys, data.tokens_of_sources(self.consumed_samples), strict=True)
        return replace(self, consumed={key: number for key, number in tokens if number})

    def to_manifest(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the manifest of a checkpoint keeps of it, with the optimizer's scalars, as JSON values."""
        values = {
            "consumed_samples": self.consumed_samples,
            "samples_digest": self.samples_digest,
            "optimizer": optimizer.scalar_state(),
        }
        values |= {CONSUMED: dict(self.consumed)} if self.consumed else {}
        values |= {OWED: self.owed} if self.owed else {}
        values |= {HEALTH: dict(self.health)} if self.health is not None else {}
        return values | ({UPCOMING: dict(self.upcoming)} if self.upcoming is not None else {})

    @classmethod
    def from_manifest(cls, manifest: Manifest) -> RunState:
        """The inverse, for the optimizer's scalars see ``load_state``."""
        state = manifest.state
        position = manifest.step, state["consumed_samples"], state["samples_digest"]
        return cls(*position, state.get(OWED, ""), health=state.get(HEALTH), consumed=state.get(CONSUMED, {}))


def upcoming(state: RunState, data: TrainData, config: Config) -> dict[str, Any] | None:
    """What the step after ``state`` reads, and with which learning rate; None after the last step.

    Both are functions of config and datasets, so nothing is loaded of them. But a function may become another one with
    a new version of this program or of a library, and a run that goes on would not notice.
    """
    if state.step >= config.train.num_steps:
        return None
    ids = data.sample_ids(state.consumed_samples, config.batch_sizes.at(state.consumed_samples))
    after = state.after_step(ids, data)
    return {"samples_digest": after.samples_digest, "lr": learning_rate(config, after.step)}


def check_state(
    prepared: Prepared,
    state: RunState,
    data: TrainData,
    optimizer: Optimizer,
    ctx: ParallelContext,
    sums: LiveSums | None,
    note: Callable[[str], None],
) -> None:
    """Compare the live state with what was saved, before the first step, and that step with what it was to be; a new
    run has nothing to compare.

    Args:
        sums: what ``load_state`` has begun.

    Raises:
        CheckpointError: on all ranks, E417: tensors, scalars or the position are not those that were saved.
        RefusedError: on all ranks, E588: the next step would not be the one that the run had before it.
    """
    resume = prepared.resume
    if resume is None:
        return
    line = check_live_state(resume, optimizer.shards(), state.step, state.to_manifest(optimizer), ctx, sums)
    if line is not None and ctx.world.rank == 0:
        note(line)
    saved = resume.state.get(UPCOMING)
    # Since then the run may have gone back here: its next step was to be that of the ledger in the checkpoint.
    then = Skips.of(ledger_from_trees(resume.state.get(REWINDS, []), str(resume.folder)))
    ours = upcoming(state, data.with_skips(then), prepared.config)
    if saved is None or ours is None:
        return
    accepted = prepared.new_samples or any(
        entry.get("from_step") == state.step + 1 for entry in prepared.accepted_changes
    )
    may_differ = {"samples_digest": accepted, "lr": accepted or bool(prepared.changes)}  # which are said by themselves
    for name, value in ours.items():
        if saved.get(name) != value and not may_differ[name]:
            raise RefusedError(
                88,
                f"step {state.step + 1}: {name}={value}",
                f"would have been {saved.get(name)} in the run of {resume.folder}, though nothing else has changed",
                "go on with the versions of this program and of its libraries that wrote the checkpoint",
            )


def load_state(prepared: Prepared, optimizer: Optimizer, ctx: ParallelContext) -> tuple[RunState, LiveSums | None]:
    """Fill the optimizer and the model's weights from where the run begins; the state there.

    That is the newest checkpoint of this run, else the weights of ``checkpoint.init_from``, else a new model. Of a
    checkpoint every weight is loaded, or none and all ranks raise: a model that was built for it has no other values.
    """
    if prepared.begins_anew:
        return RunState(), None
    manifest, shards = prepared.resume or prepared.init_from, optimizer.shards()
    assert manifest is not None
    model, resumed = prepared.config.model, manifest is prepared.resume
    kinds = STATE_KINDS if resumed else ("weight",)
    if sums := LiveSums(manifest, shards) if resumed and manifest.state_digest is not None else None:
        try:
            load_shards(manifest, shards, model=model, kinds=kinds, ctx=ctx, filled=sums.begin)
        except BaseException:
            sums.close()
            raise
    else:
        load_shards(manifest, shards, model=model, kinds=kinds, ctx=ctx)
    optimizer.copy_params_from_masters()
    if not resumed:
        return RunState(), None
    optimizer.load_scalar_state(manifest.state["optimizer"])
    return RunState.from_manifest(manifest), sums
