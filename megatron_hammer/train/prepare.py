"""Everything that can be found wrong before a rank starts is found here: config, tokenizer, data, checkpoint.

Imports no torch and communicates nothing. The launcher calls it once; each rank calls it again to get the resolved
config and the tokenizer (with ``check_data=False`` where the launcher has read ids already).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.checkpoint.fit import check_fits
from megatron_hammer.checkpoint.folder import newest_checkpoint, open_checkpoint
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.dataset.reader import IndexedDataset, check_prefix
from megatron_hammer.kernels.libraries.te import check_before_start
from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.plan import Plan, make_plan
from megatron_hammer.sampling.samples import check_tokenizer, open_train_data
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer

# A change of these makes the samples already consumed other samples than the checkpoint says. A sample is its tokens
# and what each of them may attend to.
ORDER_FIELDS = ("train.seed", "data.seq_length", "data.order", "data.attention_mask")
STATE_KINDS = {"weight", "exp_avg", "exp_avg_sq"}  # what a run goes on from; a new one takes weights only


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have been looked at."""

    config: Config
    """Resolved: model.vocab_size is set."""
    tokenizer: Tokenizer | None
    resume: Manifest | None
    """Newest checkpoint of this run, or None for a new one."""
    init_from: Manifest | None
    """Checkpoint whose weights a new run starts from."""
    notes: list[str]
    """Remarks on the config and on resuming."""
    data_notes: list[str]
    """Remarks on the datasets; empty where ``check_data`` was False."""
    plan: Plan | None = None
    """What the run draws from each source; None where ``check_data`` was False, it is printed once, before the ranks
    start; and for a dry run without data."""

    @property
    def is_finished(self) -> bool:
        """Whether the run has done all its steps."""
        return self.resume is not None and self.resume.step >= self.config.train.num_steps


def checkpoints_folder(config: Config) -> Path:
    """Where the run's checkpoints lie."""
    return Path(config.train.output) / "checkpoints"


def prepare(config: Config, world_size: int, check_data: bool = True) -> Prepared:
    """Check all inputs of a run on ``world_size`` ranks; ``check_data=False`` opens the datasets without reading ids.

    Raises:
        ConfigError, DataError, CheckpointError, RefusedError: the first thing found wrong.
    """
    config.validate(world_size)
    notes = config.notes()
    if index.BACKEND != "C++":
        notes.append(f"index builder: {index.BACKEND}")
    if not config.train.dry_run:  # which may describe a run whose data is elsewhere
        for prefix in [*(config.data.train or {}), *(config.data.valid or {}).values()]:
            check_prefix(prefix)  # before a tokenizer or its absence is spoken of: text as data is named first
    tokenizer = None if config.tokenizer.path is None else load_tokenizer(config.tokenizer.path)
    config = _with_vocab_size(config, tokenizer)
    if config.train.dry_run:
        return Prepared(config, tokenizer, None, None, notes, *_look_at_data(config, tokenizer))
    if check_data:
        check_before_start(config)
    if not config.data.train:
        raise ConfigError(
            7, "data.train", "is not set", "name the prefix of an indexed dataset: data.train=P_text_document"
        )
    data_notes, plan = _check_data(config, tokenizer, check_data)
    resume = newest_checkpoint(checkpoints_folder(config), note=notes.append)
    init_from = None
    if resume is not None:
        check_fits(resume, config.model, STATE_KINDS)
        notes += _check_same_run(config, resume)
    elif config.checkpoint.init_from is not None:
        init_from = open_checkpoint(config.checkpoint.init_from)
        check_fits(init_from, config.model, {"weight"})
    if check_data:
        _build_indices(config, resume, data_notes)
    return Prepared(config, tokenizer, resume, init_from, notes, data_notes, plan if check_data else None)


def _look_at_data(config: Config, tokenizer: Tokenizer | None) -> tuple[list[str], Plan | None]:
    """Remarks and plan for a dry run, which goes through without data, too: a layout may be looked at anywhere."""
    if not config.data.train:
        return ["data.train is not set: no plan of the data"], None
    try:
        return _check_data(config, tokenizer, read_ids=True)
    except (DataError, ConfigError, RefusedError) as error:
        return [f"a run would stop here: {error}"], None


def _with_vocab_size(config: Config, tokenizer: Tokenizer | None) -> Config:
    vocab_size = config.model.vocab_size
    if tokenizer is None and vocab_size is None:
        raise ConfigError(
            7,
            "model.vocab_size",
            "is not set and there is no tokenizer to take it from",
            "set tokenizer.path or model.vocab_size",
        )
    if tokenizer is not None and vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            5,
            f"model.vocab_size={vocab_size}",
            f"is less than the {tokenizer.vocab_size} ids of {tokenizer.path}",
            "leave model.vocab_size out to take the tokenizer's",
        )
    if vocab_size is not None:
        return config
    assert tokenizer is not None
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))


def _check_data(config: Config, tokenizer: Tokenizer | None, read_ids: bool) -> tuple[list[str], Plan]:
    """Open every dataset and hold it against tokenizer and vocabulary; return remarks, and the plan of the mix.

    A rank of the launcher opens them too (a file may be missing on its node alone), but reads no ids: a header says the
    largest.
    """
    assert config.model.vocab_size is not None
    train = config.data.train or {}
    notes, tokens = [], {}
    for prefix in [*train, *(config.data.valid or {}).values()]:
        fingerprint = None if tokenizer is None else tokenizer.fingerprint
        dataset = IndexedDataset(prefix)
        tokens[prefix] = dataset.num_tokens
        if read_ids and config.data.attention_mask == "document" and dataset.num_documents == 1:
            notes.append(f"{prefix} is a single document: data.attention_mask=document changes nothing in it")
        if dataset.header is None and not read_ids:
            continue
        named = "" if tokenizer is None else f"{tokenizer.path} of {tokenizer.vocab_size:,} ids"
        note = check_tokenizer(dataset, fingerprint, config.model.vocab_size, named)
        if note and read_ids:
            notes.append(note)
    return notes, make_plan(
        train, config.data.weights, tokens, config.train.num_steps, config.tokens_per_step, config.data.max_epochs
    )


def _build_indices(config: Config, resume: Manifest | None, notes: list[str]) -> None:
    """Have the indices of large datasets built and kept before the ranks start, which then only open them."""
    data = open_train_data(config, note=notes.append)
    consumed = 0 if resume is None else resume.state["consumed_samples"]
    data.prepare(consumed, config.train.global_batch_size)


def _check_same_run(config: Config, manifest: Manifest) -> list[str]:
    """Refuse to resume with another order of samples; remark on a changed mix."""
    saved = config_from_tree(manifest.config)
    for name in ORDER_FIELDS:
        group, field = name.split(".")
        ours, theirs = (getattr(getattr(c, group), field) for c in (config, saved))
        if ours != theirs:
            raise RefusedError(
                80,
                f"{name}={ours}",
                f"differs from {theirs} in {manifest.folder}: the samples already consumed would be others",
                f"set {name}={theirs} or start a new train.output",
            )
    notes = []
    for name in ("train", "weights"):
        if getattr(config.data, name) != getattr(saved.data, name):
            notes.append(
                f"data.{name} differs from that of {manifest.folder}: the order of samples changes from now on"
            )
    if config.data.order == "megatron" and config.train.num_steps != saved.train.num_steps:
        notes.append(
            "data.order=megatron depends on train.num_steps, which has changed: samples may repeat or be left out"
        )
    return notes
