"""A uniform sample of a corpus, to train a tokenizer on and to judge it by: ``tools/sample_corpus.py``.

Every distinct text has a hash of (seed, text). In the order of these hashes, ``valid`` is the first texts that reach
its size, ``train`` the following that reach theirs. So the sample is uniform over distinct texts, the two parts share
none, and the result depends on the set of texts alone: not on files, order or copies, and ``valid`` not on the size of
``train``.

One pass. A text is kept while it may still be wanted, that is while the kept texts before it do not fill both parts;
kept texts lie in a temporary file, memory holds some 200 bytes for each. As more texts are read, fewer are kept: of n
texts about k (1 + ln(n / k)) are ever written for a sample of k.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import nameless_file
from megatron_hammer.base.progress import Progress, size_of
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.documents import (
    LineWriter,
    OnBad,
    Skipped,
    describe_sources,
    read_texts,
    text_line,
    write_corpus_manifest,
)
from megatron_hammer.corpus.readers import expand_inputs
from megatron_hammer.corpus.seeds import hash_seed


class _Kept(NamedTuple):
    """A text in the temporary file; the order of tuples is that of a heap with the largest hash first."""

    negative_hash: int
    offset: int
    size: int


@dataclass(frozen=True)
class SampleSummary:
    """What was written into the two parts."""

    train: dict[str, Any]
    """``LineWriter.describe`` of each part."""
    valid: dict[str, Any]
    documents: int
    """Read, copies and empty ones included."""
    whole: bool
    """The corpus ended before ``train`` was full."""
    skipped: Skipped = field(default_factory=Skipped)

    def __str__(self) -> str:
        parts = [f"{p['name']}: {p['documents']:,} documents, {size_of(p['text_bytes'])} of text"
                 for p in (self.train, self.valid)]  # fmt: skip
        note = ", which hold less than asked for: all of it was taken" if self.whole else ""
        return "\n".join([*parts, f"from {self.documents:,} documents{note}", *self.skipped.lines()])


def sample_corpus(
    inputs: Sequence[str | Path],
    output: str | Path,
    train_bytes: int,
    valid_bytes: int,
    seed: int,
    *,
    key: str = "text",
    on_error: OnError = "stop",
) -> SampleSummary:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``manifest.json`` into the folder ``output``, texts by their hashes.

    Args:
        inputs: files of any kind that ``readers.py`` reads, folders and patterns.
        train_bytes: UTF-8 bytes of text; each part ends with the document that reaches its size.
        valid_bytes: the same; 0 for none.
        key: the field or column that holds the text.
        on_error: a document that cannot be used is an error, or left out and counted, or written to
            ``rejected.jsonl`` too.

    Raises:
        ConfigError: E287 a size out of range, E288 a bad output.
        DataError: E301 to E309, E347 bad input; E365 too little text for a training part beside the valid one.
    """
    if train_bytes < 1 or valid_bytes < 0:
        raise ConfigError(87, f"--train-mb={train_bytes / 1e6:g} --valid-mb={valid_bytes / 1e6:g}",
                          "must be positive (valid: or 0)", "give sizes of text in MB")  # fmt: skip
    folder = Path(output)
    if folder.is_file():
        raise ConfigError(88, f"--output {output}", "is a file, and two are to be written", "name a folder")
    paths = expand_inputs(inputs)
    folder.mkdir(parents=True, exist_ok=True)
    hashes: dict[Path, str] = {}
    skipped, size = Skipped(on_error, folder / "rejected.jsonl"), sum(p.stat().st_size for p in paths)
    with nameless_file(folder) as spool, skipped, Progress("sampling", size) as bar:
        documents, kept = _collect(paths, key, seed, train_bytes + valid_bytes, spool, bar, hashes, skipped.on_bad)
        valid = _cut(kept, valid_bytes)
        train = _cut(kept[len(valid) :], train_bytes)
        if not train or (valid_bytes and not valid):
            raise DataError(65, ", ".join(map(str, inputs)), "has too little text for both parts",
                            "lower --valid-mb, or give more text")  # fmt: skip
        (folder / "manifest.json").unlink(missing_ok=True)  # it would not describe what lies beside it
        written = [_write(folder / f"{name}.jsonl", part, spool) for name, part in (("train", train), ("valid", valid))]
    summary = SampleSummary(written[0], written[1], documents, sum(k.size for k in train) < train_bytes, skipped)
    content = {
        "seed": seed,
        "key": key,
        "train_bytes": train_bytes,
        "valid_bytes": valid_bytes,
        "documents_read": documents,
        "sources": describe_sources(paths, hashes),
        "outputs": written,
    } | ({"left_out": skipped.describe()} if skipped.counts else {})
    write_corpus_manifest(folder / "manifest.json", content)
    return summary


def _collect(
    paths: Sequence[Path],
    key: str,
    seed: int,
    wanted: int,
    spool: IO[bytes],
    progress: Progress,
    hashes: dict[Path, str],
    on_bad: OnBad | None,
) -> tuple[int, list[_Kept]]:
    """How many documents there are, and those with the smallest hashes, in the order of their hashes."""
    hashing = hash_seed(seed, "sample")
    heap: list[_Kept] = []
    held: set[int] = set()
    documents = total = longest = written = 0
    for path in paths:
        read = read_texts(path, key, progress, hashes, on_bad=on_bad)
        for text in (text for texts, _ in read for text in texts):
            documents += 1
            content = text.encode()
            # 128 bits: here an accidental equality would lose a text.
            found = xxhash.xxh3_128_intdigest(content, hashing)
            full = total >= wanted + longest
            if not content or found in held or (full and found > -heap[0].negative_hash):
                continue
            spool.write(content)
            heapq.heappush(heap, _Kept(-found, written, len(content)))
            held.add(found)
            written += len(content)
            total += len(content)
            longest = max(longest, len(content))
            # valid may be longer than asked by nearly its last document; what stays must fill train after that.
            while total - heap[0].size >= wanted + longest:
                dropped = heapq.heappop(heap)
                held.remove(-dropped.negative_hash)
                total -= dropped.size
    return documents, sorted(heap, reverse=True)


def _cut(kept: list[_Kept], size: int) -> list[_Kept]:
    """The first ones, up to the one that reaches ``size`` bytes."""
    total = 0
    for count, item in enumerate(kept):
        if total >= size:
            return kept[:count]
        total += item.size
    return kept


def _write(path: Path, part: list[_Kept], spool: IO[bytes]) -> dict[str, Any]:
    with LineWriter(path) as writer:
        for item in part:
            spool.seek(item.offset)
            writer.write(text_line(spool.read(item.size).decode()), item.size)
    return writer.describe()
