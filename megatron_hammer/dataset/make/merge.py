"""Joins indexed datasets into one: what ``tools/merge_datasets.py`` does.

::

    P1.{bin,idx}  P2.{bin,idx}  ... -> P.{bin,idx,meta.json}     the documents of P1, then those of P2, ...

Tokens and lengths are copied as they are; byte offsets and document boundaries are made anew. So the result is what
Megatron-LM's ``add_index`` gives, byte for byte, in memory that does not grow with the datasets. It is published whole,
or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.base.paths import check_output_prefix
from megatron_hammer.base.progress import Progress
from megatron_hammer.dataset.format import TokenizerRecord, path_of
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter

_TOKENS_TOGETHER = 1 << 22  # converted at once where the token type changes


@dataclass(frozen=True)
class MergeSummary:
    """What became of the datasets."""

    prefix: Path
    datasets: int
    documents: int
    tokens: int
    notes: list[str]
    """For the user: what the merged header cannot say."""

    def __str__(self) -> str:
        return f"{self.prefix}: {self.datasets} datasets, {self.documents:,} documents, {self.tokens:,} tokens"


def merge_datasets(
    prefixes: Sequence[str | Path], output: str | Path, dtype: np.dtype | type | str | None = None
) -> MergeSummary:
    """Join datasets in the order given.

    Args:
        prefixes: P of each ``P.bin`` and ``P.idx``; Megatron-LM's own, without a header of ours, do too.
        output: P of the result; must not be one of them.
        dtype: token type of the result; needed only where the datasets differ in theirs.

    Raises:
        ConfigError: the output is one of the inputs.
        DataError: a dataset is missing or damaged, token types differ, or an id does not fit ``dtype``.
        RefusedError: two datasets were made with different tokenizers.
    """
    assert prefixes, "there is nothing to merge"
    check_output_prefix("--output", output, ".idx")
    for prefix in prefixes:
        if path_of(prefix, ".idx").resolve() == path_of(output, ".idx").resolve():
            raise ConfigError(84, f"--output {output}", "is one of the datasets to merge", "choose another prefix")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    kind = _token_type(datasets, dtype)
    record, notes = _common_tokenizer(datasets)
    places = [path_of(prefix, ".idx").resolve() for prefix in prefixes]
    for prefix, times in Counter(places).items():
        if times > 1:
            notes.append(
                f"{prefix.with_suffix('')} is named {times} times, and its documents are in the result as often"
            )
    headers = [dataset.header for dataset in datasets]
    first = headers[0].options if headers[0] is not None else {}
    same = all(header is not None and header.options == first for header in headers)
    options = {**(first if same else {}), "merged": [str(prefix) for prefix in prefixes]}
    with IndexedWriter(output, dtype=kind, tokenizer=record, options=options) as writer:
        total = sum(dataset.num_tokens for dataset in datasets)
        with Progress(f"merging into {output}", total, "tokens") as progress:
            for dataset in datasets:
                if dataset.dtype == kind:
                    writer.append(dataset)
                else:
                    _append_converted(writer, dataset)
                if dataset.header is not None:
                    writer.sources.extend(dataset.header.sources)
                progress.advance(dataset.num_tokens)
    return MergeSummary(Path(output), len(datasets), writer.num_documents, writer.num_tokens, notes)


def _token_type(datasets: Sequence[IndexedDataset], wanted: np.dtype | type | str | None) -> np.dtype:
    """The token type of the result."""
    first = datasets[0]
    if wanted is None:
        for dataset in datasets:
            if dataset.dtype != first.dtype:
                raise DataError(
                    56,
                    f"{dataset.prefix}: token type {dataset.dtype.name}",
                    f"is not that of {first.prefix}, {first.dtype.name}",
                    "choose one for the result with --dtype",
                )
        return first.dtype
    kind = np.dtype(wanted).newbyteorder("<")
    for dataset in datasets:
        if dataset.dtype != kind and "f" in (dataset.dtype.kind, kind.kind):
            raise DataError(
                56,
                f"{dataset.prefix}: token type {dataset.dtype.name}",
                f"cannot become {kind.name}: only integers are converted",
                "leave this dataset out, or choose its own type",
            )
    return kind


def _common_tokenizer(datasets: Sequence[IndexedDataset]) -> tuple[TokenizerRecord | None, list[str]]:
    """The tokenizer of all datasets, or None and a note where one of them does not say."""
    known = [d for d in datasets if d.header is not None and d.header.tokenizer is not None]
    silent = [str(d.prefix) for d in datasets if d not in known]
    records = [d.header.tokenizer for d in known if d.header is not None and d.header.tokenizer is not None]
    for dataset, record in zip(known, records):
        if record.fingerprint != records[0].fingerprint:
            raise RefusedError(
                36,
                f"{dataset.prefix}: the tokenizer that made it, {record} (fingerprint {record.fingerprint}),",
                f"is not that of {known[0].prefix}, {records[0]} (fingerprint {records[0].fingerprint})",
                "merge only datasets of one tokenizer",
            )
    if not silent:
        return records[0], []
    if not known:
        return None, []
    return None, [f"{', '.join(silent)}: not known which tokenizer made it, so the merged header names none"]


def _append_converted(writer: IndexedWriter, dataset: IndexedDataset) -> None:
    """Append documents whose token type changes, some millions of tokens at a time."""
    starts = np.append(dataset.pointers // dataset.dtype.itemsize, dataset.num_tokens)[dataset.document_indices]
    document = 0
    while document < dataset.num_documents:
        last = max(int(np.searchsorted(starts, starts[document] + _TOKENS_TOGETHER, side="right")) - 1, document + 1)
        boundaries = dataset.document_indices[document : last + 1]
        tokens = dataset.tokens[starts[document] : starts[last]]
        writer.add(tokens, dataset.lengths[boundaries[0] : boundaries[-1]], np.diff(boundaries))
        dataset.forget()
        document = last
    dataset.check_unchanged()
