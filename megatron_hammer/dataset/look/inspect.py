"""Describes an indexed dataset for people: counts and lengths (``stats``), and documents as text (``show``).

Memory does not grow with the number of documents (``places.py``). Text is what the pieces of the ids spell, byte for
byte, not what a decoder makes of them: nothing is stripped, joined or mended, and bytes that are no character are
written ``\\xe4``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.dataset.look.places import document_source, document_starts, iterate_starts
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.tokenizer.spelling import Speller, special_names

SHOWN_TOKENS = 400
"""Of a document, where the user does not say which: a screen of text."""

_COUNTED_LENGTH = 1 << 20  # lengths below it are counted one by one, longer ones are few and kept
_BAR_CHARACTERS = 40


# ---- stats ----


def describe_dataset(dataset: IndexedDataset) -> dict[str, Any]:
    """``IndexedDataset.describe`` with the tokens of each source and the lengths of the documents, as plain values."""
    facts = dataset.describe()
    sources = facts["sources"]
    if sources and sum(source["documents"] for source in sources) == dataset.num_documents:
        first = 0
        for source in sources:
            ends = [int(document_starts(dataset, d, 0)[0]) for d in (first, first + source["documents"])]
            source["tokens"] = ends[1] - ends[0]
            first += source["documents"]
    return facts | {"lengths": describe_lengths(dataset)}


def describe_lengths(dataset: IndexedDataset) -> dict[str, Any]:
    """Tokens a document: mean, median, p99 (exact, of all documents), longest, empty ones, and a histogram.

    The histogram counts lengths 0, 1, 2 to 3, 4 to 7, and so on: [first, last, documents] each.
    """
    counts, kept = np.zeros(_COUNTED_LENGTH, np.int64), []
    for _, starts in iterate_starts(dataset):
        lengths = np.diff(starts)
        counts += np.bincount(lengths[lengths < _COUNTED_LENGTH], minlength=_COUNTED_LENGTH)
        kept.append(lengths[lengths >= _COUNTED_LENGTH])
    values, numbers = np.unique(np.concatenate([np.empty(0, np.int64), *kept]), return_counts=True)
    values = np.concatenate([np.flatnonzero(counts), values])  # every length that occurs, in order
    numbers = np.concatenate([counts[counts > 0], numbers])  # documents of that length
    if len(values) == 0:
        return {"mean": 0.0, "median": 0, "p99": 0, "longest": 0, "empty": 0, "histogram": []}
    below = np.cumsum(numbers)
    bins = np.ceil(np.log2(values + 1)).astype(np.int64)  # 0, 1, 2 3, 4 .. 7, ...: exact for any int32 length
    histogram = [
        [0 if b == 0 else 1 << (b - 1), (1 << b) - 1, int(numbers[bins == b].sum())] for b in range(int(bins[-1]) + 1)
    ]
    return {
        "mean": dataset.num_tokens / dataset.num_documents,
        "median": int(values[np.searchsorted(below, 0.50 * below[-1])]),
        "p99": int(values[np.searchsorted(below, 0.99 * below[-1])]),
        "longest": int(values[-1]),
        "empty": int(counts[0]),
        "histogram": histogram,
    }


def format_stats(facts: dict[str, Any]) -> str:
    """``describe_dataset`` as lines of a name and what it is, the histogram drawn."""
    lines = []
    for name, value in facts.items():
        if name == "lengths":
            lines += _format_lengths(value)
        elif isinstance(value, list):
            lines += [f"{name:17} {_pairs(entry)}" for entry in value]
        else:
            lines.append(f"{name:17} {(_pairs(value) or 'none') if isinstance(value, dict) else plain(value)}")
    return "\n".join(lines)


def _format_lengths(lengths: dict[str, Any]) -> list[str]:
    lines = [
        f"{'document length':17} mean {lengths['mean']:,.1f}, median {lengths['median']:,}, p99 {lengths['p99']:,}, "
        f"longest {lengths['longest']:,}, empty {lengths['empty']:,}"
    ]
    histogram = lengths["histogram"]
    most = max((count for *_, count in histogram), default=1)
    ranges = [f"{first:,}" if first == last else f"{first:,}-{last:,}" for first, last, _ in histogram]
    width = max(map(len, ranges), default=0)
    for text, (*_, count) in zip(ranges, histogram):
        bar = "#" * (-(-count * _BAR_CHARACTERS // most))
        lines.append(f"{'':17} {text:>{width}} {bar:{_BAR_CHARACTERS}} {count:,}")
    return lines


def _pairs(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name} {plain(value)}" for name, value in entry.items() if value != {})


def plain(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "not recorded"
    if isinstance(value, dict):
        return f"({_pairs(value)})"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# ---- show ----


def describe_document(
    dataset: IndexedDataset, document: int, span: tuple[int, int], speller: Speller | None, pieces: bool = False
) -> dict[str, Any]:
    """One document as plain values: where it came from, the ids of ``span`` and what they spell.

    Args:
        document: its number, from 0.
        span: tokens [first, last) of it; what lies outside the document is left out.
        speller: None: ids only.
        pieces: spell the pieces one by one.

    Raises:
        ConfigError: E295 there is no such document, or no such span.
    """
    if not 0 <= document < dataset.num_documents:
        raise ConfigError(
            95,
            f"document {document} of {dataset.prefix}",
            f"must lie in 0 to {dataset.num_documents} minus 1",
            "count documents from 0, empty ones included",
        )
    if not 0 <= span[0] < span[1]:
        raise ConfigError(
            95, f"--tokens {span[0]}:{span[1]}", "must be A:B with 0 <= A < B", "count the document's tokens from 0"
        )
    start, end = document_starts(dataset, document, 1).tolist()
    first, last = start + span[0], min(start + span[1], end)
    ids = dataset.tokens[first:last].tolist()
    source = document_source(dataset, document)
    record = dataset.header.tokenizer if dataset.header is not None else None
    names = speller.names if speller is not None else special_names(record) if record is not None else {}
    return {
        "document": document,
        "source": None if source is None else {"path": source[0], "document": source[1]},
        "sequences": int(dataset.document_indices[document + 1] - dataset.document_indices[document]),
        "tokens": end - start,
        "first": span[0],
        "ids": ids,
        "special": {names[token]: ids.count(token) for token in names if token in ids},
        "text": None if speller is None else speller.marked(ids) if pieces else speller.text(ids),
    }


def format_document(prefix: str, facts: dict[str, Any]) -> str:
    """``describe_document`` for people."""
    source = facts["source"]
    came_from = f", document {source['document']} of {source['path']}" if source is not None else ""
    sequences = "" if facts["sequences"] == 1 else f" in {facts['sequences']:,} sequences"
    lines = [f"document {facts['document']} of {prefix}: {facts['tokens']:,} tokens{sequences}{came_from}"]
    shown = facts["first"] + len(facts["ids"])
    if facts["ids"]:
        special = ", ".join(f"{name} {count}" for name, count in facts["special"].items())
        lines.append(f"ids {facts['first']} to {shown - 1}{f' ({special})' if special else ''}:")
        lines.append(" ".join(map(str, facts["ids"])))
    if facts["text"]:
        lines += ["text:", facts["text"]]
    if shown < facts["tokens"]:
        more = facts["tokens"] - shown
        lines.append(
            f"note: {more:,} more tokens; --tokens {shown}:{min(shown + SHOWN_TOKENS, facts['tokens'])} goes on"
        )
    return "\n".join(lines)
