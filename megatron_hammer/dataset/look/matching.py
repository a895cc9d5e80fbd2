"""Loads the tokenizer of a dataset, and refuses one that did not make it, as far as the dataset's header says."""

from __future__ import annotations

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer


def load_matching(dataset: IndexedDataset, path: str) -> Tokenizer:
    """The tokenizer at ``path``, which must be the one that made the dataset as far as its header says.

    Raises:
        DataError: as ``load_tokenizer``.
        RefusedError: E510.
    """
    tokenizer = load_tokenizer(path)
    check_matching(dataset, tokenizer)
    return tokenizer


def check_matching(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that did not make the dataset, as far as its header says.

    Raises:
        RefusedError: E510.
    """
    recorded = dataset.header.tokenizer if dataset.header is not None else None
    if recorded is not None and recorded.fingerprint != tokenizer.fingerprint:
        raise RefusedError(
            10,
            f"{dataset.prefix}.meta.json: the tokenizer that made it, {recorded},",
            f"is not {tokenizer.path} of {tokenizer.vocab_size:,} ids "
            f"(fingerprints {recorded.fingerprint} and {tokenizer.fingerprint})",
            "name the tokenizer that prepared this dataset",
        )
