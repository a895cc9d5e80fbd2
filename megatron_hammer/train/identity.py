"""The identity of a run's data, as its checkpoints record it: the content of every dataset, and the mix.

A path says nothing about what lies there: a dataset may be made again behind it, and may be moved. So the state of a
checkpoint holds, for each training source and each validation set, its fingerprint (``IndexedDataset.fingerprint``),
a digest of the block hashes of its header where it has one, its tokens, and a source's share of the samples. The
fingerprint samples the tokens; the header's hashes cover all of them. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.files import hash_bytes
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.dataset.reader import IndexedDataset

IDENTITY = "data"  # in the state of a checkpoint: all of this


@dataclass(frozen=True)
class DatasetIdentity:
    """One dataset: where it lay, and what it held."""

    prefix: str
    """As given in the config; not part of the identity."""
    fingerprint: str
    tokens: int
    blocks: str | None = None
    """Digest of all block hashes in its header; None where it has no header."""
    share: float | None = None
    """Of the training samples; None for a validation set."""

    def has_content_of(self, other: DatasetIdentity) -> bool:
        """Whether both hold the same tokens; a header that was lost, or added, makes no difference."""
        blocks_differ = None not in (self.blocks, other.blocks) and self.blocks != other.blocks
        return self.fingerprint == other.fingerprint and not blocks_differ

    def __str__(self) -> str:
        """For people: the digest that tells two contents apart, and the tokens."""
        whole = "" if self.blocks is None else f", blocks {self.blocks[:12]}"
        return f"fingerprint {self.fingerprint}{whole} ({self.tokens:,} tokens)"


@dataclass(frozen=True)
class MixIdentity:
    """Samples of the run and the mix that they were, or will be, drawn from."""

    first: int
    end: int | None
    """Number of the sample behind the last; None: the mix goes on."""
    seq_length: int
    shares: tuple[float, ...]
    """Of each of ``DataIdentity.train``; 0: not in this mix."""


@dataclass(frozen=True)
class DataIdentity:
    """All datasets of a run."""

    train: tuple[DatasetIdentity, ...] = ()
    """The sources in the order of the config, over all phases."""
    valid: Mapping[str, DatasetIdentity] = field(default_factory=dict)
    """Name -> validation set."""
    mixes: tuple[MixIdentity, ...] = ()
    """One for each phase; empty where there is one, whose shares the sources have."""

    def to_tree(self) -> dict[str, Any]:
        """As JSON values, for the state of a checkpoint."""
        valid = {name: asdict(dataset) for name, dataset in self.valid.items()}
        tree = {"train": [asdict(dataset) for dataset in self.train], "valid": valid}
        return tree | ({"mixes": [asdict(mix) for mix in self.mixes]} if self.mixes else {})

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> DataIdentity:
        """The inverse of ``to_tree``; a wrong form is a ``TypeError``, ``KeyError`` or ``AttributeError``."""
        train = tuple(DatasetIdentity(**entry) for entry in tree["train"])
        valid = {name: DatasetIdentity(**entry) for name, entry in tree["valid"].items()}
        mixes = [MixIdentity(**mix | {"shares": tuple(mix["shares"])}) for mix in tree.get("mixes", ())]
        return cls(train, valid, tuple(mixes))

    def all_mixes(self, seq_length: int) -> tuple[MixIdentity, ...]:
        """The mixes; ``seq_length`` is that of the one phase where there are no more."""
        return self.mixes or (MixIdentity(0, None, seq_length, tuple(s.share or 0.0 for s in self.train)),)


def identify(dataset: IndexedDataset, prefix: str) -> DatasetIdentity:
    """The identity of a dataset that is open; reads its index and at most 1 MiB of its tokens."""
    header = dataset.header
    blocks = None if header is None else hash_bytes(" ".join(header.block_hashes).encode())
    return DatasetIdentity(prefix, dataset.fingerprint, dataset.num_tokens, blocks)


def by_prefix(datasets: Iterable[DatasetIdentity]) -> dict[str, DatasetIdentity]:
    """Each under its prefix, whatever its share was."""
    return {dataset.prefix: replace(dataset, share=None) for dataset in datasets}


@dataclass(frozen=True)
class SourcePair:
    """A dataset as it was and as it is; one of the two is None where it was added or removed."""

    old: DatasetIdentity | None
    new: DatasetIdentity | None


_Placed = tuple[int, DatasetIdentity]  # with its place in the config


def pair_up(old: Sequence[DatasetIdentity], new: Sequence[DatasetIdentity]) -> list[SourcePair]:
    """Match sources by content, wherever they lie; what is left by path, then by place; the rest came or went."""
    before: list[DatasetIdentity | None] = [None] * len(new)
    left = list(enumerate(old))
    rules: tuple[Callable[[_Placed, _Placed], bool], ...] = (
        lambda was, now: was[1].has_content_of(now[1]) and was[1].prefix == now[1].prefix,
        lambda was, now: was[1].has_content_of(now[1]),
        lambda was, now: was[1].prefix == now[1].prefix,
        lambda was, now: was[0] == now[0],
    )
    for is_match in rules:
        for now in enumerate(new):
            found = None if before[now[0]] else next((was for was in left if is_match(was, now)), None)
            if found is not None:
                left.remove(found)
                before[now[0]] = found[1]
    pairs = [SourcePair(was, now) for was, now in zip(before, new, strict=True)]
    return pairs + [SourcePair(was, None) for _, was in left]


def saved_identity(manifest: Manifest) -> DataIdentity | None:
    """What a checkpoint was trained on; None where it does not say."""
    tree = manifest.state.get(IDENTITY)
    if tree is None:
        return None
    try:
        return DataIdentity.from_tree(tree)
    except (TypeError, KeyError, AttributeError) as error:
        rule = f"has a state whose {IDENTITY} is of the wrong form ({error})"
        remedy = "read it with the version of the program that wrote it"
        raise CheckpointError(6, str(manifest.folder), rule, remedy) from None
