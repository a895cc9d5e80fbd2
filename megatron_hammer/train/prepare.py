"""Everything that can be found wrong before a rank starts is found here: config, tokenizer, data, checkpoint.

::

    look_at_inputs        config, tokenizer, datasets -> Inputs
    find_starting_point   the checkpoint to go on from, or whose weights to take -> StartingPoint   (rank 0 decides)
    settle                both together: do they fit, what has changed, is that accepted -> Prepared

Imports no torch and communicates nothing. The launcher calls ``prepare``, all three; each rank calls them one by one,
agreeing with the others in between (``start.py``), with ``check_data=False`` where the launcher has read ids already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError, ConfigError, DataError, RefusedError, require_linux
from megatron_hammer.base.versions import installed_versions
from megatron_hammer.checkpoint import one_pass
from megatron_hammer.checkpoint.fit import check_fits, check_style
from megatron_hammer.checkpoint.folder import Damaged, open_checkpoint, search_checkpoints
from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.manifest import Manifest, check_resumable
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.config.phases import Course
from megatron_hammer.dataset.reader import IndexedDataset, check_prefix
from megatron_hammer.kernels.libraries.te import check_before_start
from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.absent import AbsentSource
from megatron_hammer.sampling.fill_in_the_middle import open_fim
from megatron_hammer.sampling.ledger import LEDGER, Ledger, ledger_from_trees, read_ledger
from megatron_hammer.sampling.phases import Skips
from megatron_hammer.sampling.plan import RunPlan, SourceContent, plan_run
from megatron_hammer.sampling.samples import check_tokenizer, open_train_data
from megatron_hammer.tokenizer.convert import export_note
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer, with_vocab_size
from megatron_hammer.train.changes import (
    ACCEPTED,
    FRESH,
    accepted_entries,
    changed_data,
    changed_settings,
    changed_tokenizer,
    check_accepted_names,
    hold_horizon,
    settle_changes,
)
from megatron_hammer.train.course import course_of
from megatron_hammer.train.identity import (
    IDENTITY,
    DataIdentity,
    DatasetIdentity,
    MixIdentity,
    by_prefix,
    identify,
    saved_identity,
)
from megatron_hammer.train.output import refuse_traces
from megatron_hammer.train.past import Pasts, carried_on, phases_to_paste
from megatron_hammer.train.past_sources import absent_sources, check_absent, only_past, past_sources, seen_here

OWED = "owed_line"  # in the state of a checkpoint: of metrics.jsonl, that of a step whose evaluation was cut short
VERSIONS = "versions"  # in the state of a checkpoint: of the libraries that it was computed with
REWINDS = "rewinds"  # in the state of a checkpoint: the lines of the ledger of its run so far; absent where none


@dataclass(frozen=True)
class Inputs:
    """A run's config, tokenizer and datasets, looked at."""

    config: Config
    """Resolved: model.vocab_size is set."""
    tokenizer: Tokenizer | None
    identity: DataIdentity
    """What is in the datasets."""
    notes: list[str]
    """Remarks on the config."""
    data_notes: list[str]
    """Remarks on the datasets; empty where ``check_data`` was False."""
    plan: RunPlan | None
    """See ``Prepared.plan``."""
    absent: Mapping[str, AbsentSource] = field(default_factory=dict)
    """See ``Prepared.absent``."""


@dataclass(frozen=True)
class StartingPoint:
    """The checkpoint that a run begins from; of a new run with new weights, none."""

    resume: Manifest | None = None
    """Newest checkpoint of this run."""
    init_from: Manifest | None = None
    """Checkpoint whose weights a new run starts from."""
    damaged: tuple[Damaged, ...] = ()
    """Newer checkpoints of this run that are passed over; known to rank 0."""
    taken_back: tuple[Damaged, ...] = ()
    """Newer checkpoints of steps that a rewind has taken back; known to rank 0."""
    rewinds: Ledger = ()
    """What the run leaves out."""


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have been looked at."""

    config: Config
    """Resolved: model.vocab_size is set, and of a run that goes on the end of its schedule."""
    tokenizer: Tokenizer | None
    resume: Manifest | None
    """Newest checkpoint of this run, or None for a new one."""
    init_from: Manifest | None
    """Checkpoint whose weights a new run starts from."""
    notes: list[str]
    """Remarks on the config and on resuming."""
    data_notes: list[str]
    """Remarks on the datasets; empty where ``check_data`` was False."""
    plan: RunPlan | None = None
    """What the run draws from each source; None where ``check_data`` was False, it is printed once, before the ranks
    start; and for a dry run without data."""
    identity: DataIdentity = field(default_factory=DataIdentity)
    """What is in the datasets, for the checkpoints."""
    changes: tuple[str, ...] = ()
    """What is not as in ``resume``, in lines."""
    accepted_changes: tuple[dict[str, Any], ...] = ()
    """All changes that were accepted in the course of the run, for the checkpoints."""
    damaged: tuple[Damaged, ...] = ()
    """Newer checkpoints of this run that are passed over; known to rank 0."""
    new_samples: bool = False
    """Whether the samples to come are others than the checkpoint foresaw, because ``data.phases`` say so."""
    is_fresh: bool = False
    """Whether a new run may take the place of one whose checkpoints are lost (``--accept fresh``)."""
    taken_back: tuple[Damaged, ...] = ()
    """Newer checkpoints of steps that a rewind has taken back; known to rank 0."""
    rewinds: Ledger = ()
    """The run's ledger: what it leaves out of the order of its samples."""
    absent: Mapping[str, AbsentSource] = field(default_factory=dict)
    """Sources that are not there, and that only phases behind the run draw from; by prefix."""
    inputs: Inputs | None = None
    """What all this was made of, with ``accepted``: a run that goes back begins again with these."""
    accepted: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the run has done all its steps and evaluations."""
        resume = self.resume
        return resume is not None and resume.step >= self.config.train.num_steps and OWED not in resume.state

    @property
    def begins_anew(self) -> bool:
        """Whether the run starts with weights that its seed defines, and not with those of a checkpoint."""
        return self.resume is None and self.init_from is None

    def to_state(self) -> dict[str, Any]:
        """What every checkpoint of the run says of its datasets and of accepted changes, as JSON values."""
        state = {
            IDENTITY: self.identity.to_tree(),
            ACCEPTED: list(self.accepted_changes),
            VERSIONS: installed_versions(),
        }
        return state | ({REWINDS: [rewind.to_tree() for rewind in self.rewinds]} if self.rewinds else {})


def checkpoints_folder(config: Config) -> Path:
    """Where the run's checkpoints lie."""
    return Path(config.train.output) / "checkpoints"


def prepare(
    config: Config, world_size: int, check_data: bool = True, accepted: Collection[str] = (), first_node: bool = True
) -> Prepared:
    """Check all inputs of a run on ``world_size`` ranks, as far as one process can.

    Args:
        check_data: False to open the datasets without reading ids.
        accepted: names of what may differ from the checkpoint that the run resumes from (``--accept``).
        first_node: False on the others of several nodes: which checkpoint the run goes on from is for rank 0 to see,
            and nothing is judged by what this node sees.

    Raises:
        ConfigError, DataError, CheckpointError, RefusedError: the first thing found wrong.
    """
    inputs = look_at_inputs(config, world_size, check_data, accepted)
    if config.train.dry_run:
        return _unjudged(inputs, StartingPoint())
    if not first_node:
        prepared = _unjudged(inputs, StartingPoint())
        build_large_indices(dataclasses.replace(prepared, resume=seen_here(inputs.config)))
        return prepared
    prepared = settle(inputs, find_starting_point(inputs.config, accepted), accepted)
    if check_data:
        build_large_indices(prepared)
    return prepared


def look_at_inputs(config: Config, world_size: int, check_data: bool = True, accepted: Collection[str] = ()) -> Inputs:
    """Check what does not depend on any checkpoint. A dry run goes through without data, too."""
    config.validate(world_size)
    check_system(config, world_size)
    check_accepted_names(accepted)
    notes = config.notes()
    if index.BACKEND != "C++":
        notes.append(f"index builder: {index.BACKEND}")
    if one_pass.BACKEND != "C++":
        notes.append(f"digest of the state: {one_pass.BACKEND}, 0.2 GB/s a rank at each save and start (C++: 20)")
    past = past_sources(config)
    if not config.train.dry_run:  # which may describe a run whose data is elsewhere
        for prefix in [*config.data.train_prefixes, *(config.data.valid or {}).values()]:
            if prefix not in past:
                check_prefix(prefix)  # before a tokenizer or its absence is spoken of: text as data is named first
    tokenizer = None if config.tokenizer.path is None else load_tokenizer(config.tokenizer.path)
    if tokenizer is not None and (note := export_note(tokenizer, config.model.family)):
        notes.append(note)
    config = with_vocab_size(config, tokenizer)
    open_fim(config, tokenizer)
    if config.train.dry_run:
        return Inputs(config, tokenizer, DataIdentity(), notes, *_look_at_data(config, tokenizer, past))
    if check_data:
        check_before_start(config)
    if not config.data.mixes:
        raise ConfigError(
            7, "data.train", "is not set", "name the prefix of an indexed dataset: data.train=P_text_document"
        )
    identity, data_notes, plan = _check_data(config, tokenizer, check_data, past)
    notes += [f"{prefix} is not there; only phases that are past draw from it" for prefix in past]
    return Inputs(config, tokenizer, identity, notes, data_notes, plan if check_data else None, absent_sources(past))


def check_system(config: Config, world_size: int) -> None:
    """Refuse what this operating system cannot do. A dry run may describe a run on other machines.

    Raises:
        ConfigError: E292.
    """
    if config.train.dry_run:
        return
    if world_size > 1:
        why = "the parent-death signal, without which ranks of a killed run would write into the next one's folder"
        require_linux(f"{world_size} ranks", why, "train with one process, or on Linux (Windows: WSL2)")
    if config.checkpoint.mode == "background":
        why = "memory that a process beside the rank shares, and the parent-death signal (memfd_create, prctl)"
        require_linux("checkpoint.mode=background", why, "use checkpoint.mode=blocking: the files have the same bytes")


def find_starting_point(
    config: Config, accepted: Collection[str] = (), known_damage: Mapping[str, str] | None = None
) -> StartingPoint:
    """Look for the checkpoint that the run begins from; nothing is changed.

    Args:
        known_damage: name -> error of those that were found damaged when they were loaded.

    Raises:
        CheckpointError: all are damaged, or the newest is and may not be passed over.
        RefusedError: there has been a run, and its checkpoints are gone.
    """
    folder, output = checkpoints_folder(config), Path(config.train.output)
    recorded, taken_back = read_ledger(output / LEDGER), dict[str, str]()
    while True:
        found = search_checkpoints(folder, {**(known_damage or {}), **taken_back})
        rewinds = None if found.newest is None else rewinds_with(found.newest, recorded)
        if found.newest is None or rewinds is not None:
            break
        taken_back[found.newest.folder.name] = f"{output / LEDGER} takes back steps that are in it"
    stale = tuple(d for d in found.damaged if d.path.name in taken_back)
    damaged = tuple(d for d in found.damaged if d.path.name not in taken_back)
    is_fresh = FRESH in accepted
    judged = damaged if found.newest is not None else found.damaged
    if judged and not (is_fresh and found.newest is None):
        _judge_damage(folder, judged, found.newest, config.checkpoint.fallback)
    if found.newest is not None:
        return StartingPoint(found.newest, damaged=damaged, taken_back=stale, rewinds=rewinds or ())
    refuse_traces(output, config.checkpoint.save_interval_steps, accepted)
    init_from = config.checkpoint.init_from
    first = None if init_from is None else open_checkpoint(init_from)
    if recorded is None or is_fresh:
        recorded = replayed(config)
    return StartingPoint(init_from=first, damaged=damaged, taken_back=stale, rewinds=recorded)


def replayed(config: Config) -> Ledger:
    """The ledger that a new run begins with: that of ``train.replay``.

    Raises:
        ConfigError: E223: there is none.
        CheckpointError: E436: it is no ledger.
    """
    if config.train.replay is None:
        return ()
    path = Path(config.train.replay)
    path = path / LEDGER if path.is_dir() else path
    if (ledger := read_ledger(path)) is None:
        rule, remedy = f"is not there, nor a folder with a {LEDGER}", "name the ledger of a run that has gone back"
        raise ConfigError(23, f"train.replay={config.train.replay}", rule, remedy)
    return ledger


def rewinds_with(manifest: Manifest, recorded: Ledger | None) -> Ledger | None:
    """The ledger that a run goes on with from a checkpoint; None where that holds steps which were taken back.

    Args:
        recorded: the one in the run's folder; None where there is none: then that of the checkpoint counts.

    Raises:
        RefusedError: E589: the two tell of different rewinds.
    """
    own = ledger_from_trees(manifest.state.get(REWINDS, []), f"{manifest.folder}: state.{REWINDS}")
    common = len(own) if recorded is None else min(len(own), len(recorded))
    if recorded is not None and own[:common] != recorded[:common]:
        raise RefusedError(
            89,
            f"{manifest.folder.parents[1] / LEDGER}",
            f"records other rewinds than {manifest.folder}, which the run would go on from",
            "bring back the ledger that belongs to this run; without the file, that of the checkpoint counts",
        )
    if recorded is None or common == len(recorded):
        return own
    place = Skips.of(own).place(manifest.state.get("consumed_samples", 0))
    return recorded if all(rewind.skipped[0][0] >= place for rewind in recorded[common:]) else None


def _judge_damage(folder: Path, damaged: Sequence[Damaged], newest: Manifest | None, fallback: bool) -> None:
    """Refuse to go on past damaged checkpoints where no intact one is left, or where the config forbids it."""
    named = "; ".join(f"{d.path.name}: {d.reason}" for d in damaged)
    if newest is None:
        remedy = "restore one of them from a copy; to begin anew in this folder, --accept fresh"
        raise CheckpointError(18, str(folder), f"holds {len(damaged)} checkpoints, all damaged ({named})", remedy)
    if not fallback:
        steps = damaged[0].step - newest.step
        raise CheckpointError(
            19,
            "checkpoint.fallback=false",
            f"forbids to go on from {newest.folder.name}, the newest that is not damaged ({named})",
            f"restore {damaged[0].path}; or set checkpoint.fallback=true: it costs {steps} of the steps that were done",
        )


def _unjudged(inputs: Inputs, start: StartingPoint, accepted: Collection[str] = ()) -> Prepared:
    """Inputs and start as they are, not held against each other."""
    return Prepared(
        inputs.config,
        inputs.tokenizer,
        start.resume,
        start.init_from,
        inputs.notes,
        inputs.data_notes,
        inputs.plan,
        inputs.identity,
        damaged=start.damaged,
        is_fresh=start.resume is None and FRESH in accepted,
        taken_back=start.taken_back,
        rewinds=start.rewinds,
        absent=inputs.absent,
        inputs=inputs,
        accepted=tuple(accepted),
    )


def settle(inputs: Inputs, start: StartingPoint, accepted: Collection[str] = ()) -> Prepared:
    """Hold the inputs against the checkpoint that the run begins from.

    Raises:
        CheckpointError: the model is not the checkpoint's.
        RefusedError: settings, datasets or the tokenizer have changed in a way that is not accepted.
    """
    config, resume = inputs.config, start.resume
    prepared = _unjudged(inputs, start, accepted)
    if start.init_from is not None:
        check_fits(start.init_from, config.after_samples(0).model, {"weight"})
    check_absent(inputs.absent, inputs.config, 0 if resume is None else resume.state["consumed_samples"])
    if resume is None:
        config.check_phase_ends()
        inputs = _planned(inputs, config.course())
        remarks = [
            f"--accept {name} accepts nothing: no checkpoint is resumed"
            for name in dict.fromkeys(accepted)
            if name != FRESH
        ]
        return dataclasses.replace(prepared, plan=inputs.plan, notes=inputs.notes + remarks)
    check_resumable(resume)
    saved, step, consumed = config_from_tree(resume.config), resume.step + 1, resume.state["consumed_samples"]
    config, notes = hold_horizon(config, saved)
    was = saved_identity(resume)
    inputs, held, further = _carry_on_phases(dataclasses.replace(inputs, config=config), was, saved, consumed)
    config, notes = inputs.config, notes + held
    check_style(resume, config.optimizer.style)
    check_fits(resume, config.after_samples(consumed).model, STATE_KINDS)
    ours = None if inputs.tokenizer is None else inputs.tokenizer.fingerprint
    changes = changed_settings(saved, config)
    theirs = None if resume.tokenizer is None else resume.tokenizer.fingerprint
    changes += changed_tokenizer(theirs, ours, (saved.tokenizer.path, config.tokenizer.path))
    of_data, remarks = changed_data(was, inputs.identity, saved, config, consumed)
    changes += of_data
    block = "" if further is None else f"; as data it is the same to write {phases_to_paste(further)}"
    lines = settle_changes(changes, accepted, str(resume.folder), saved, config, step, block)
    entries = (*resume.state.get(ACCEPTED, ()), *accepted_entries(changes, step))
    if further is not None:
        notes.append(f"each source goes on where it stands at sample {consumed:,}: {phases_to_paste(further)}")
        inputs = _with_config(inputs, further, was, consumed)
    inputs.config.check_phase_ends(consumed)
    shown = inputs.plan is not None
    inputs = _planned(inputs, course_of(inputs.config, resume) if shown else inputs.config.course(step - 1, consumed))
    new_samples = was is not None and Pasts(was, inputs.identity, saved, inputs.config).difference() is not None
    return dataclasses.replace(
        prepared,
        config=inputs.config,
        identity=inputs.identity,
        plan=inputs.plan,
        notes=inputs.notes + notes + remarks,
        changes=tuple(lines),
        accepted_changes=entries,
        new_samples=new_samples,
        absent=inputs.absent,
    )


def _carry_on_phases(
    inputs: Inputs, was: DataIdentity | None, saved: Config, consumed: int
) -> tuple[Inputs, list[str], Config | None]:
    """As ``carried_on``, with the datasets that the phases of the checkpoint name.

    Args:
        was: what the checkpoint was trained on.

    Returns:
        the inputs, with the phases of the checkpoint where the mix is that of the last of them; remarks; and where the
        mix is another one, the config with it as a further phase, for whoever accepts that.
    """
    config, is_another = carried_on(inputs.config, was, inputs.identity, saved, consumed)
    if is_another:
        return inputs, [], config
    if config is inputs.config:
        return inputs, [], None
    inputs = _with_config(inputs, config, was, consumed)
    return inputs, [f"the phases are those of the checkpoint: {phases_to_paste(config)}"], None


def in_progress(config: Config) -> tuple[Config, Course]:
    """What a start would make of a config that names data: with the mixes that its run has drawn from; and its course.

    A mix that would have to be accepted is taken to be.

    Raises:
        DataError: a dataset is missing or damaged.
    """
    newest = seen_here(config)
    if newest is None:
        return config, config.course()
    held = _held(config)
    plan = plan_run(config, _contents(held.values()))
    return _in_progress(config, _identity(config, held, plan), newest)


def plan_in_progress(config: Config) -> tuple[Config, RunPlan]:
    """The config of ``in_progress``, and what its run draws from each source.

    Raises:
        ConfigError: E293 a source would be read more often than ``data.max_epochs``.
        DataError: a dataset is missing or damaged.
    """
    config, course = in_progress(config)
    return config, plan_run(config, _contents(_held(config).values()), course, config.data.max_epochs)


def _held(config: Config) -> dict[str, DatasetIdentity]:
    """The sources of ``data.train``; those that only past phases draw from as the newest checkpoint knows them."""
    past = past_sources(config)
    return {p: past[p] if p in past else identify(IndexedDataset(p), p) for p in config.data.train_prefixes}


def _in_progress(config: Config, ours: DataIdentity, newest: Manifest | None) -> tuple[Config, Course]:
    """As ``in_progress``; ``ours``: what the config names."""
    if newest is None:
        return config, config.course()
    saved, consumed = config_from_tree(newest.config), newest.state["consumed_samples"]
    config, _ = carried_on(config, saved_identity(newest), ours, saved, consumed)
    return config, course_of(config, newest)


def _planned(inputs: Inputs, course: Course) -> Inputs:
    """The same with the plan of a run whose steps hold these samples.

    Raises:
        ConfigError: E293 a source would be read more often than ``data.max_epochs``.
    """
    plan = plan_run(inputs.config, _contents(inputs.identity.train), course, inputs.config.data.max_epochs)
    return dataclasses.replace(inputs, plan=None if inputs.plan is None else plan)


def _contents(sources: Iterable[DatasetIdentity]) -> list[SourceContent]:
    return [SourceContent(source.prefix, source.tokens, source.fingerprint) for source in sources]


def _with_config(inputs: Inputs, config: Config, was: DataIdentity | None, consumed: int) -> Inputs:
    """The same with a config that names other phases."""
    looked_at = (*inputs.identity.train, *inputs.identity.valid.values())
    past = {} if was is None else only_past(config, was, consumed)
    known = past | by_prefix(looked_at)
    identity, _, plan = _check_data(config, inputs.tokenizer, read_ids=False, known=known)
    absent = {**inputs.absent, **absent_sources(past)}
    plan_told = None if inputs.plan is None else plan
    return dataclasses.replace(inputs, config=config, identity=identity, plan=plan_told, absent=absent)


def _look_at_data(
    config: Config, tokenizer: Tokenizer | None, past: Mapping[str, DatasetIdentity]
) -> tuple[list[str], RunPlan | None]:
    """Remarks and plan for a dry run, which goes through without data, too: a layout may be looked at anywhere."""
    if not config.data.mixes:
        return ["data.train is not set: no plan of the data"], None
    try:
        identity, notes, _ = _check_data(config, tokenizer, read_ids=True, known=past)
        there, course = _in_progress(config, identity, seen_here(config))
        if there is not config:
            known = past_sources(there) | by_prefix([*identity.train, *identity.valid.values()])
            identity, _, _ = _check_data(there, tokenizer, read_ids=False, known=known)
        return notes, plan_run(there, _contents(identity.train), course, config.data.max_epochs)
    except (DataError, ConfigError, RefusedError) as error:
        return [f"a run would stop here: {error}"], None


def _check_data(
    config: Config, tokenizer: Tokenizer | None, read_ids: bool, known: Mapping[str, DatasetIdentity] | None = None
) -> tuple[DataIdentity, list[str], RunPlan]:
    """Open every dataset and hold it against tokenizer and vocabulary; what they hold, remarks, the plan of the mix.

    A rank of the launcher opens them too (a file may be missing on its node alone), but reads no ids: a header says the
    largest.

    Args:
        known: prefix -> what is there, of those that were looked at before.
    """
    assert config.model.vocab_size is not None
    train, valid, phases = config.data.train_prefixes, config.data.valid or {}, config.phases
    notes, found = [], dict[str, DatasetIdentity]()
    for prefix in dict.fromkeys([*train, *valid.values()]):
        if known is not None and prefix in known:
            found[prefix] = known[prefix]
            continue
        fingerprint = None if tokenizer is None else tokenizer.fingerprint
        dataset = IndexedDataset(prefix)
        found[prefix] = identify(dataset, prefix)
        if read_ids and config.data.attention_mask == "document" and dataset.num_documents == 1:
            notes.append(f"{prefix} is a single document: data.attention_mask=document changes nothing in it")
        longest = max((phase.seq_length for phase in phases if prefix in phase.train), default=0)
        if read_ids and 0 < found[prefix].tokens <= longest:
            notes.append(
                f"data.seq_length={longest:,} is longer than all of {prefix} "
                f"({found[prefix].tokens:,} tokens): each of its samples repeats it; shorten it, or add data"
            )
        if dataset.header is None and not read_ids:
            continue
        named = "" if tokenizer is None else f"{tokenizer.path} of {tokenizer.vocab_size:,} ids"
        note = check_tokenizer(dataset, fingerprint, config.model.vocab_size, named)
        if note and read_ids:
            notes.append(note)
    plan = plan_run(config, _contents(found[prefix] for prefix in train))
    return _identity(config, found, plan), notes, plan


def _identity(config: Config, found: Mapping[str, DatasetIdentity], plan: RunPlan) -> DataIdentity:
    """What the datasets that a config names hold, and the mixes."""
    train, valid = config.data.train_prefixes, config.data.valid or {}
    sets = {name: found[prefix] for name, prefix in valid.items() if prefix in found}
    shares = [{source.prefix: source.share for source in phase.sources} for phase in plan.phases]
    if len(shares) == 1:
        (only,) = shares
        return DataIdentity(tuple(dataclasses.replace(found[p], share=only[p]) for p in train), sets)
    mixes = tuple(
        MixIdentity(phase.first, phase.end, phase.seq_length, tuple(of.get(prefix, 0.0) for prefix in train))
        for phase, of in zip(config.phases, shares, strict=True)
    )
    return DataIdentity(tuple(found[prefix] for prefix in train), sets, mixes)


def build_large_indices(prepared: Prepared) -> None:
    """Have the indices of large datasets built and kept before the ranks start, which then only open them."""
    config, resume = prepared.config, prepared.resume
    told = prepared.data_notes.append
    step, consumed = (0, 0) if resume is None else (resume.step, resume.state["consumed_samples"])
    course = config.course(step, consumed)
    data = open_train_data(config, told, prepared.rewinds, prepared.tokenizer, prepared.absent, course)
    data.prepare(consumed, config.batch_sizes.at(consumed))
