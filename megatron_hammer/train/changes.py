"""Compares a resumed run with its checkpoint: settings, data and tokenizer; refuses changes that are not accepted.

::

    saved config, saved identity of data and tokenizer --+
                                                         +--> [Change, ...] --> judge --> E580, E582, or a table
    config, data and tokenizer of this start ------------+           ^
                                                         --accept NAME ...

A change of a setting is named by the setting, one of the datasets' content by ``data`` and one of the tokenizer by
``tokenizer``. What a setting's change means stands in its type (``config/effects.py``). Values are compared as they
take effect: a descent whose end is absent ends at ``train.num_steps``. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_hammer.base.errors import ConfigError, RefusedError
from megatron_hammer.config import Config, Effect, config_to_tree, setting_effects
from megatron_hammer.optim.schedule import learning_rate, schedule_lengths
from megatron_hammer.train.identity import DataIdentity, DatasetIdentity, pair_up
from megatron_hammer.train.past import SAME_SHARE, Pasts, phases_to_paste

DATA, TOKENIZER = "data", "tokenizer"
ACCEPTED = "accepted"  # in the state of a checkpoint: the changes that were accepted
FRESH = "fresh"  # a new run in a folder where a run has been whose checkpoints are gone or damaged: train/output.py


@dataclass(frozen=True)
class Change:
    """Something that is not as the checkpoint has it."""

    what: str
    """The setting, dataset or tokenizer: ``optimizer.lr``, ``data.train[/p/zh]``."""
    old: str
    new: str
    accepted_by: tuple[str, ...] = ()
    """Names of which ``--accept`` takes any; the first is proposed. None: it may change freely."""

    def is_open(self, accepted: Collection[str]) -> bool:
        """Whether it must be accepted and is not."""
        return bool(self.accepted_by) and not set(self.accepted_by) & set(accepted)

    @property
    def is_of_content(self) -> bool:
        """Whether datasets or the tokenizer hold something else."""
        return self.accepted_by[:1] in ((DATA,), (TOKENIZER,))


def check_accepted_names(accepted: Iterable[str]) -> None:
    """Refuse what ``--accept`` cannot name; the error names the nearest one.

    Raises:
        ConfigError: no setting, or one that no checkpoint can go on without.
    """
    effects = setting_effects()
    for name in accepted:
        if name in (DATA, TOKENIZER, FRESH):
            continue
        if name not in effects:
            known = [DATA, TOKENIZER, FRESH, *(n for n, effect in effects.items() if effect.must_be_accepted)]
            last = [n for n in effects if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]  # in the wrong group
            nearest = (last or difflib.get_close_matches(name, [*known, *effects], n=1, cutoff=0.0))[0]
            rule = "is neither a setting nor data, tokenizer or fresh"
            raise ConfigError(20, f"--accept {name}", rule, f"did you mean --accept {nearest}?")
        if effects[name] is Effect.MODEL:
            raise ConfigError(
                20,
                f"--accept {name}",
                "cannot be accepted: the weights would be those of another model",
                f"leave {name} as it is, or start a new run",
            )


# ---- what is different ----------------------------------------------------------------------------------------------


def hold_horizon(config: Config, saved: Config) -> tuple[Config, list[str]]:
    """Keep the end of the descent where the run was planned to have it, if the config leaves it to train.num_steps.

    Otherwise a run that is extended would jump back up its schedule.

    Returns:
        the config with ``schedule.decay_steps`` filled in where it is held, and remarks.
    """
    if config.schedule.decay_steps is not None or "constant" in (config.schedule.style, saved.schedule.style):
        return config, []
    horizon, warmup = schedule_lengths(saved).horizon, config.schedule.warmup_steps
    if schedule_lengths(saved).warmup == horizon < warmup:  # the warm-up was cut to the length of the run
        warmup = horizon
    schedule = dataclasses.replace(config.schedule, decay_steps=horizon, warmup_steps=warmup)
    held = dataclasses.replace(config, schedule=schedule)
    if config.train.num_steps == saved.train.num_steps:
        return held, []
    steps = config.train.num_steps
    note = (
        f"train.num_steps was {saved.train.num_steps} and is {steps} now: the learning rate keeps its schedule, which "
        f"ends at step {horizon}; to plan it anew, add schedule.decay_steps={steps} --accept schedule.decay_steps"
    )
    return held, [note]


def changed_settings(saved: Config, config: Config) -> list[Change]:
    """The settings that take effect with another value; of the datasets and the model, see elsewhere."""
    old, new = _in_effect(saved), _in_effect(config)
    if "constant" in (saved.schedule.style, config.schedule.style) and saved.schedule.style != config.schedule.style:
        for name in ("optimizer.min_lr", "schedule.decay_steps"):  # one of the two schedules has none
            del old[name]
    changes = []
    for name, effect in setting_effects().items():
        elsewhere = effect in (Effect.MODEL, Effect.CONTENT) or name == "data.weights"
        elsewhere = elsewhere or (name == "data.seq_length" and bool(saved.data.phases or config.data.phases))
        if elsewhere or name not in old or old[name] == new[name]:
            continue
        # Megatron-LM's order is built for the length of the run.
        decides = effect is Effect.LENGTH and saved.data.order == config.data.order == "megatron"
        names = (name,) if effect.must_be_accepted or decides else ()
        changes.append(Change(name, _plain(old[name]), _plain(new[name]), names))
    return changes


def _in_effect(config: Config) -> dict[str, Any]:
    """Setting -> the value that a step uses: defaults filled in, None for what is not used."""
    tree = config_to_tree(config)
    values = {f"{group}.{name}": value for group, fields in tree.items() for name, value in fields.items()}
    lengths, style = schedule_lengths(config), config.schedule.style
    values["schedule.warmup_steps"] = lengths.warmup
    values["schedule.decay_steps"] = None if style == "constant" else lengths.horizon
    values["schedule.anneal_steps"] = lengths.anneal if style == "wsd" else None
    if style == "constant":
        values["optimizer.min_lr"] = None
    if config.train.precision != "fp16":
        values["optimizer.loss_scale_window"] = None
    return values


def changed_data(
    saved: DataIdentity | None, ours: DataIdentity, saved_config: Config, config: Config, consumed: int
) -> tuple[list[Change], list[str]]:
    """How datasets and mix differ, and remarks; ``saved`` is None where an older version wrote the checkpoint.

    Args:
        consumed: samples that are behind the run.
    """
    if saved is None:
        note = (
            "the checkpoint is of a version that recorded no fingerprints of datasets: that they are the same could "
            "not be checked; the next checkpoint records them"
        )
        return _changed_paths(saved_config, config), [note]
    if saved_config.data.phases or config.data.phases:
        return _changed_phases(saved, ours, saved_config, config, consumed) + _changed_valid(saved, ours), []
    changes = _changed_sources(saved, ours)
    if not any(change.accepted_by for change in changes):
        changes += _changed_mix(saved, ours, saved_config, config)
    return changes + _changed_valid(saved, ours), []


def _changed_paths(saved: Config, config: Config) -> list[Change]:
    """All that can be said without fingerprints."""
    changes = []
    for name in ("train", "weights", "valid"):
        old, new = getattr(saved.data, name), getattr(config.data, name)
        if old != new:
            changes.append(Change(f"data.{name}", _plain(old), _plain(new), (DATA, f"data.{name}")))
    return changes


def _changed_sources(saved: DataIdentity, ours: DataIdentity) -> list[Change]:
    return [
        change
        for pair in pair_up(saved.train, ours.train)
        if (change := _content_change("data.train", pair.old, pair.new)) is not None
    ]


def _changed_phases(
    saved: DataIdentity, ours: DataIdentity, saved_config: Config, config: Config, consumed: int
) -> list[Change]:
    """What was consumed must be drawn as it was; what is to come may change, and is said.

    Raises:
        RefusedError: E580 ``data.phases`` name another past.
    """
    pasts = Pasts(saved, ours, saved_config, config)
    pairs = [pair for pair in pasts.pairs if pair.old is not None and pair.new is not None]
    changes = [c for pair in pairs if (c := _content_change("data.train", pair.old, pair.new)) is not None]
    if (differs := pasts.difference(consumed)) is None:
        coming = pasts.difference()
        return changes + ([] if coming is None else [Change("data.phases", *coming)])
    if config.data.phases is None:
        return [*changes, Change("data.train", *differs, ("data.train", DATA))]
    past = dataclasses.replace(config.data, phases=pasts.saved_phases(config, consumed))
    block = phases_to_paste(dataclasses.replace(config, data=past))
    raise RefusedError(
        80,
        f"data.phases: {differs[1]} (was {differs[0]})",
        f"would change the samples that are consumed: the first {consumed:,}",
        f"write these as they were, and what is to come behind them: {block[:-1]}, {{train: ...}}]",
    )


def _changed_valid(saved: DataIdentity, ours: DataIdentity) -> list[Change]:
    """By name, since it is under their names that losses are reported."""
    names = list(dict.fromkeys([*saved.valid, *ours.valid]))
    pairs = ((name, saved.valid.get(name), ours.valid.get(name)) for name in names)
    found = (_content_change("data.valid", old, new, name) for name, old, new in pairs)
    return [change for change in found if change is not None]


def _content_change(
    setting: str, old: DatasetIdentity | None, new: DatasetIdentity | None, name: str | None = None
) -> Change | None:
    """One dataset that was made again, moved, added, removed or replaced by another."""
    there = new or old
    assert there is not None
    what = f"{setting}[{there.prefix if name is None else name}]"
    if old is None or new is None:
        absent = "not there"
        told = (absent if old is None else str(old), absent if new is None else str(new))
        return Change(what, *told, (DATA, setting))
    if not new.has_content_of(old):
        if old.prefix == new.prefix:  # the config says nothing of it
            return Change(what, str(old), str(new), (DATA,))
        return Change(what, f"{old.prefix}: {old}", f"{new.prefix}: {new}", (DATA, setting))
    return None if old.prefix == new.prefix else Change(what, old.prefix, new.prefix)


def _changed_mix(saved: DataIdentity, ours: DataIdentity, saved_config: Config, config: Config) -> list[Change]:
    """Other shares of the same sources, and in Megatron-LM's order another order of them."""
    names: tuple[str, ...] = ("data.train", DATA)
    changes: list[Change] = []
    units = saved_config.data.weights, config.data.weights
    if units[0] != units[1]:
        names = ("data.weights", *names)
        changes.append(Change("data.weights", *units))  # what it does to the shares comes next
    for pair in pair_up(saved.train, ours.train):
        old, new = pair.old, pair.new
        assert old is not None and new is not None and old.share is not None and new.share is not None
        if abs(old.share - new.share) > SAME_SHARE * max(old.share, new.share):
            told = (f"{old.share:.6g} of the samples", f"{new.share:.6g} of the samples")
            changes.append(Change(f"data.train[{new.prefix}]", *told, names))
    orders = [[dataset.fingerprint for dataset in identity.train] for identity in (saved, ours)]
    if config.data.order == "megatron" and orders[0] != orders[1]:
        was, now = (", ".join(dataset.prefix for dataset in identity.train) for identity in (saved, ours))
        changes.append(Change("data.train", was, now, names))
    return changes


def changed_tokenizer(saved: str | None, ours: str | None, paths: tuple[str | None, str | None]) -> list[Change]:
    """Whether the tokenizer, by its fingerprint, is another one; ``paths``: what the two configs call it."""
    if saved == ours:
        return []
    told = [
        "no tokenizer" if fingerprint is None else f"{path or 'a tokenizer'} (fingerprint {fingerprint})"
        for path, fingerprint in zip(paths, (saved, ours))
    ]
    return [Change(TOKENIZER, told[0], told[1], (TOKENIZER,))]


def _plain(value: Any) -> str:
    """As the config file would have it."""
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- what becomes of it ---------------------------------------------------------------------------------------------


def settle_changes(
    changes: Sequence[Change],
    accepted: Collection[str],
    where: str,
    saved: Config,
    config: Config,
    step: int,
    hint: str = "",
) -> list[str]:
    """Refuse what must be accepted and is not; return what to print of the rest.

    Args:
        changes: all of them.
        accepted: names given by ``--accept``.
        where: the checkpoint.
        step: the first one that the changes take part in.
        hint: what else the user can do than accept them.

    Raises:
        RefusedError: E582 where datasets or the tokenizer are among it, else E580.
    """
    rates = learning_rate(saved, step), learning_rate(config, step)
    rate = "" if rates[0] == rates[1] else f"learning rate of step {step}: {rates[0]:.6g} -> {rates[1]:.6g}"
    refused = [change for change in changes if change.is_open(accepted)]
    if refused:
        what = ", ".join(f"{c.what}={c.new} (was {c.old})" for c in refused)
        names = dict.fromkeys(c.accepted_by[0] for c in refused)
        rule = f"would change the run of {where} from step {step} on" + (f" ({rate})" if rate else "")
        remedy = "set back what has changed, or accept it: " + " ".join(f"--accept {name}" for name in names) + hint
        if any(change.is_of_content for change in refused):
            raise RefusedError(82, what, rule, remedy)
        raise RefusedError(80, what, rule, remedy)
    lines = [f"changed against {where}, from step {step} on:"] if changes else []
    for change in changes:
        accepted_here = "   (accepted)" if change.accepted_by else ""
        lines.append(f"  {change.what}: {change.old} -> {change.new}{accepted_here}")
    return lines + ([rate] if rate else []) + _needless(changes, accepted)


def _needless(changes: Sequence[Change], accepted: Collection[str]) -> list[str]:
    """Remarks on accepted names that accept nothing; they are no mistake, because the same command resumes."""
    effects, used = setting_effects(), {name for change in changes for name in change.accepted_by}
    remarks = []
    for name in (name for name in dict.fromkeys(accepted) if name not in used and name != FRESH):
        effect = effects.get(name)
        if effect is None or effect.must_be_accepted or effect is Effect.CONTENT:
            hint = {"tokenizer.path": " (--accept tokenizer is about what lies there)"}.get(name, "")
            remarks.append(f"note: --accept {name} accepts nothing: it is as in the checkpoint{hint}")
        else:
            remarks.append(f"note: --accept {name} is not needed: it may change freely")
    return remarks


def accepted_entries(changes: Sequence[Change], step: int) -> list[dict[str, Any]]:
    """What was accepted, for the state of the checkpoints that follow."""
    return [{"from_step": step} | _told(change) for change in changes if change.accepted_by]


def _told(change: Change) -> dict[str, Any]:
    return {key: value for key, value in asdict(change).items() if key != "accepted_by"}
