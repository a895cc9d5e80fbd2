"""Tells whether the documents that a run trains on begin with bos and end with eos.

A model has learnt that a text begins so, and its prompts must: exports, generation and evaluation ask for it. The
header of a dataset says it; of one without a header its first and last token do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_hammer.base.errors import DataError
from megatron_hammer.dataset.format import path_of, read_header
from megatron_hammer.dataset.reader import IndexedDataset


def documents_begin_with(config: Mapping[str, Any], token: int | None) -> bool | None:
    """Whether the documents of a run's config begin with a token; None where none of its datasets is there now.

    Of several sources, one that begins so is enough: the model has learnt what the token means. A source whose header
    says it is not opened.

    Args:
        config: as a tree of plain values, as checkpoints have it.
    """
    return _documents_have(config, token, "prepend_bos", 0)


def documents_end_with(config: Mapping[str, Any], token: int | None) -> bool | None:
    """Whether they end with a token, as ``documents_begin_with``."""
    return _documents_have(config, token, "append_eod", -1)


def _documents_have(config: Mapping[str, Any], token: int | None, option: str, place: int) -> bool | None:
    """Whether documents have the token at a place: as the datasets' headers say, else by the token that is there."""
    found = []
    data = config.get("data") or {}
    mixes = [data.get("train"), *(phase.get("train") for phase in data.get("phases") or ())]
    for prefix in dict.fromkeys(prefix for mix in mixes for prefix in mix or {}):
        try:
            header = read_header(prefix)
            if not path_of(prefix, ".idx").exists():  # moved, or never on this machine
                continue
            if header is not None and option in header.options:
                found.append(token is not None and bool(header.options[option]))
            elif (dataset := IndexedDataset(prefix)).num_tokens:
                found.append(int(dataset.tokens[place]) == token)
        except (DataError, OSError):  # damaged
            continue
    return any(found) if found else None
