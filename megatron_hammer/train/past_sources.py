"""Lets a run go on without the files of sources that only its past phases draw from.

The checkpoints record what each source held (``identity.py``). That is enough to go on: the order of the samples to
come, and what was read of each source, follow from it (``sampling/absent.py``). When the inputs are examined it is not
yet known from which checkpoint the run will go on, so there are two checks: the newest checkpoint says which sources
may be absent, and once the run's own checkpoint is chosen, whether it is past them, too. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint.folder import newest_checkpoint
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.config import Config
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.sampling.absent import AbsentSource, is_missing
from megatron_hammer.train.identity import DataIdentity, DatasetIdentity, by_prefix, saved_identity


def past_sources(config: Config) -> dict[str, DatasetIdentity]:
    """Of the sources that are not there, those that by the newest checkpoint only past phases draw from, by prefix."""
    if not any(map(is_missing, config.data.train_prefixes)):
        return {}
    newest = seen_here(config)
    was = None if newest is None else saved_identity(newest)
    return {} if newest is None or was is None else only_past(config, was, newest.state["consumed_samples"])


def seen_here(config: Config) -> Manifest | None:
    """A checkpoint near the one that rank 0 will choose."""
    try:
        return newest_checkpoint(config.train.output, note=lambda text: None)
    except CheckpointError:
        return None


def only_past(config: Config, was: DataIdentity, consumed: int) -> dict[str, DatasetIdentity]:
    """Of the sources that are not there, those that a checkpoint knows and no phase needs after so many samples."""
    known, needed = by_prefix(was.train), _needed(config, consumed)
    return {p: known[p] for p in config.data.train_prefixes if p not in needed and p in known and is_missing(p)}


def _needed(config: Config, consumed: int) -> set[str]:
    """The sources that phases draw from which are not behind ``consumed`` samples."""
    return {p for phase in config.phases if phase.end is None or phase.end > consumed for p in phase.train}


def absent_sources(past: Mapping[str, DatasetIdentity]) -> dict[str, AbsentSource]:
    """The same as the order of samples takes them."""
    return {p: AbsentSource(Path(p), known.fingerprint, known.tokens) for p, known in past.items()}


def check_absent(absent: Mapping[str, AbsentSource], config: Config, consumed: int) -> None:
    """Refuse to go on from so many samples without the files of a source that is still needed.

    Raises:
        DataError: E330.
    """
    for prefix in sorted(absent.keys() & _needed(config, consumed)):
        IndexedDataset(prefix)
        raise absent[prefix].refusal()  # it came back this very moment; the next start takes it
