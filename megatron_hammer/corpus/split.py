"""Splits a corpus into training and held-out documents by a hash of their text: ``tools/split_corpus.py``.

    F.jsonl or F.txt --> P.train.jsonl, P.valid.jsonl, P.split.json

The side of a document is a function of (seed, text, fraction) alone: the same text falls on the same side in every file
and every run, so copies of a held-out text never stay in the training set, and a corpus that grows keeps its held-out
set. Lines are copied as they are, with all their fields, in their order; a document of plain text becomes a line that
holds it under ``text``. One pass, memory for one block.

With a number of documents instead of a fraction, the threshold is the hash of the N-th text in the order of the hashes;
finding it takes a pass of its own and memory for N hashes. Copies still fall on one side, but the threshold depends on
the corpus: it is written to the manifest as a fraction, which gives the same sides elsewhere.
"""

from __future__ import annotations

import heapq
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash

from megatron_hammer.base.characters import share_meant
from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.paths import check_output_prefix
from megatron_hammer.base.progress import Progress, size_of
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.documents import (
    Document,
    LineWriter,
    OnBad,
    Skipped,
    describe_sources,
    ignore,
    read_documents,
    write_corpus_manifest,
)
from megatron_hammer.corpus.readers import DEFAULT_TEXT_DOCUMENTS, expand_inputs, kind_of
from megatron_hammer.corpus.seeds import hash_seed

HASH_BITS = 53
"""A fraction with this many bits is a floating-point number exactly: what the manifest says can be given again."""


def content_hash(text: bytes, seed: int) -> int:
    """Of XXH3-64 with a seed of ``hash_seed``: uniform in [0, 2^53), equal for equal texts."""
    return xxhash.xxh3_64_intdigest(text, seed) >> (64 - HASH_BITS)


@dataclass(frozen=True)
class SplitSummary:
    """What was written on the two sides."""

    train: dict[str, Any]
    """``LineWriter.describe`` of the training set."""
    valid: dict[str, Any]
    threshold: int
    """Held out are the texts whose hash is below it."""
    skipped: Skipped = field(default_factory=Skipped)

    @property
    def fraction(self) -> float:
        """Share of all hashes below the threshold."""
        return self.threshold / float(1 << HASH_BITS)

    def __str__(self) -> str:
        parts = [f"{p['name']}: {p['documents']:,} documents, {size_of(p['text_bytes'])} of text"
                 for p in (self.train, self.valid)]  # fmt: skip
        return "\n".join(parts + self.skipped.lines())


def split_corpus(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    seed: int,
    *,
    valid_fraction: float | None = None,
    valid_documents: int | None = None,
    key: str = "text",
    on_error: OnError = "stop",
    text_documents: str = DEFAULT_TEXT_DOCUMENTS,
) -> SplitSummary:
    """Write ``P.train.jsonl``, ``P.valid.jsonl`` and the manifest ``P.split.json``.

    Args:
        inputs: files of JSON lines or plain text, folders or patterns.
        output_prefix: P.
        valid_fraction: expected share of the distinct texts that is held out.
        valid_documents: exactly this many distinct texts instead; copies of them are held out too.
        key: the field that holds the text.
        on_error: a document that cannot be used is an error, or left out and counted, or written to
            ``P.rejected.jsonl`` too.
        text_documents: what a document of plain text is, see ``readers.TEXT_DOCUMENTS``.

    Raises:
        ConfigError: E287 fraction or number out of range, E288 a file that is neither JSON lines nor text.
        DataError: E301 to E309 bad input; E365 fewer distinct texts than shall be held out, or a side without any.
    """
    assert (valid_fraction is None) != (valid_documents is None), "one of fraction and number"
    if valid_fraction is not None and not 0 < valid_fraction < 1:
        raise ConfigError(
            87, f"--valid-fraction={valid_fraction}", "must be between 0 and 1", share_meant(valid_fraction, "0.001")
        )
    if valid_documents is not None and valid_documents < 1:
        raise ConfigError(
            87, f"--valid-documents={valid_documents}", "must be at least 1", "give a number of documents"
        )
    prefix = check_output_prefix("--output-prefix", output_prefix, ".train.jsonl")
    paths = _files(inputs)
    hashing = hash_seed(seed, "split")
    size = sum(path.stat().st_size for path in paths)
    if valid_documents is not None:
        on_bad = None if on_error == "stop" else ignore  # the pass that writes counts them
        reading = _Reading(key, text_documents, on_bad, Progress("choosing", size))
        threshold = _threshold(paths, reading, hashing, valid_documents)
    else:
        assert valid_fraction is not None
        threshold = math.floor(valid_fraction * 2**HASH_BITS)
    train = LineWriter(prefix.with_name(f"{prefix.name}.train.jsonl"))
    valid = LineWriter(prefix.with_name(f"{prefix.name}.valid.jsonl"))
    manifest = prefix.with_name(f"{prefix.name}.split.json")
    manifest.unlink(missing_ok=True)  # from here on it would not describe what lies beside it
    hashes: dict[Path, str] = {}
    skipped = Skipped(on_error, prefix.with_name(f"{prefix.name}.rejected.jsonl"))
    reading = _Reading(key, text_documents, skipped.on_bad, Progress("splitting", size), hashes)
    with train, valid, skipped, reading.progress:
        for path in paths:
            for document in reading.documents(path):
                content = document.text.encode()
                held_out = content_hash(content, hashing) < threshold
                line = document.line or orjson.dumps({key: document.text})  # of plain text there is no line
                (valid if held_out else train).write(line, len(content))
        for writer, side in ((train, "to train on"), (valid, "to hold out")):
            if writer.documents == 0:
                raise DataError(65, ", ".join(map(str, inputs)), f"has no document {side} at this share",
                                "change --valid-fraction or --valid-documents, or give more text")  # fmt: skip
    summary = SplitSummary(train.describe(), valid.describe(), threshold, skipped)
    content_of_manifest = {
        "seed": seed,
        "key": key,
        "valid_fraction": summary.fraction,
        "valid_documents": valid_documents,
        "sources": describe_sources(paths, hashes),
        "outputs": [summary.train, summary.valid],
    } | ({"left_out": skipped.describe()} if skipped.counts else {})
    write_corpus_manifest(manifest, content_of_manifest)
    return summary


class _Reading(NamedTuple):
    """How the documents of all files are read."""

    key: str
    text_documents: str
    on_bad: OnBad | None
    progress: Progress
    hashes: dict[Path, str] | None = None

    def documents(self, path: Path) -> Iterator[Document]:
        return read_documents(path, self.key, (), self.on_bad, self.progress, self.hashes, self.text_documents)


def _files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files that the inputs name, all of JSON lines or plain text.

    Raises:
        ConfigError: E288 a file of another format, or one that is named twice.
        DataError: E301.
    """
    paths = expand_inputs(inputs)
    seen = set()
    for path in paths:
        if kind_of(path, "text") == "parquet":
            raise ConfigError(
                88, str(path), "is parquet, whose rows are no lines",
                "turn it into lines: python tools/reformat_corpus.py parquet "
                f"{shlex.quote(str(path))} --output {shlex.quote(str(path.with_suffix('.jsonl')))}",
            )  # fmt: skip
        if path in seen:
            raise ConfigError(88, str(path), "is named twice", "name every input once")
        seen.add(path)
    return paths


def _threshold(paths: Sequence[Path], reading: _Reading, hashing: int, count: int) -> int:
    """The smallest threshold below which ``count`` distinct texts lie."""
    largest: list[int] = []  # of the smallest hashes, negated: a heap whose first is the largest of them
    held: set[int] = set()
    with reading.progress:
        for path in paths:
            for document in reading.documents(path):
                found = content_hash(document.text.encode(), hashing)
                if found in held or (len(largest) == count and found > -largest[0]):
                    continue
                held.add(found)
                if len(largest) == count:
                    held.remove(-heapq.heappushpop(largest, -found))
                else:
                    heapq.heappush(largest, -found)
    if len(largest) < count:
        raise DataError(65, f"--valid-documents={count}", f"is more than the {len(largest):,} distinct texts",
                        "hold out fewer")  # fmt: skip
    return -largest[0] + 1
