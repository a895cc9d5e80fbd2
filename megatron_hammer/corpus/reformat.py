"""Rewrites published corpora, each of its own format, as JSON lines ``{"text": ...}``: ``tools/reformat_corpus.py``.

| kind | files | text | a record, as published |
|---|---|---|---|
| chinesewebtext | jsonl | ``text`` | ``{"title", "score", "text", "url", "source_domain"}`` (2.0: ``quality_score``) |
| refinedweb | parquet | ``content`` | ``content, url, timestamp, dump, segment, image_urls`` |
| pile | jsonl | ``text`` | ``{"text", "meta": {"pile_set_name"}}``: an output a set, or chosen sets in one |
| jsonl, parquet | | ``--key``, ``--column`` | any |
| text | txt | what ``--text-documents`` says: a paragraph, a line or all of a file | |

Texts are not changed, and documents keep their order. Empty texts are left out and counted. Nothing is filtered:
fields such as a score can be kept beside the text for a filter of the user's own. One pass, memory for one block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.progress import Progress, size_of
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.documents import (
    Document,
    LineWriter,
    Skipped,
    describe_sources,
    read_documents,
    text_line,
    write_corpus_manifest,
)
from megatron_hammer.corpus.parse import note_of
from megatron_hammer.corpus.readers import DEFAULT_TEXT_DOCUMENTS, expand_inputs, kind_of

KINDS = ("chinesewebtext", "refinedweb", "pile", "jsonl", "parquet", "text")
DEFAULT_KEYS = dict.fromkeys(KINDS, "text") | {"refinedweb": "content"}
_PARQUET_KINDS = ("refinedweb", "parquet")
_FORMATS = {"parquet": "parquet", "jsonl": "jsonl", "text": ".txt or .md"}
MAX_SETS = 256
"""The Pile has 22; far more are a sign that the field is something else."""


@dataclass(frozen=True)
class ReformatSummary:
    """What was written and what was not."""

    outputs: list[dict[str, Any]]
    """``LineWriter.describe`` of each."""
    skipped: Skipped
    full: list[str]
    """Outputs that reached their limit."""

    def lines(self) -> list[str]:
        """For people: a line for each output, then those of what was left out."""
        written = [
            f"{o['name']}: {o['documents']:,} documents, {size_of(o['text_bytes'])} of text"
            + (", full" if o["name"] in self.full else "")
            for o in self.outputs
        ]
        return written + self.skipped.lines()


@dataclass
class _Conversion:
    kind: str
    key: str
    sets: Sequence[str]
    keep: Sequence[str]
    max_bytes: int | None
    output: Path
    text_documents: str
    skipped: Skipped
    writers: dict[str, LineWriter] = field(default_factory=dict)
    """By set; by the empty string where there is one output."""
    full: set[str] = field(default_factory=set)
    hashes: dict[Path, str] = field(default_factory=dict)
    """Of the inputs read to their end."""
    other_sets: set[str] = field(default_factory=set)
    """Of the Pile that are in the inputs and were not asked for."""


def reformat_corpus(
    kind: str,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    key: str | None = None,
    sets: Sequence[str] = (),
    keep: Sequence[str] = (),
    max_bytes: int | None = None,
    on_error: OnError = "stop",
    text_documents: str = DEFAULT_TEXT_DOCUMENTS,
) -> ReformatSummary:
    """Write the documents of a published source as JSON lines, with a manifest beside.

    Args:
        kind: one of ``KINDS``.
        inputs: files; folders stand for all corpora in and below them, sorted; patterns for what they match.
        output: a file, compressed where it ends in ``.gz`` or ``.zst``. For ``pile`` without ``sets``: a folder, which
            gets a file a set.
        key: the field or column that holds the text, where it is not the published one.
        sets: of the Pile, the ``pile_set_name`` of the sets to take, into one file.
        keep: fields that are copied beside the text where a document has them.
        max_bytes: most UTF-8 bytes of text in an output; it ends before the first document that does not fit.
        on_error: ``skip`` leaves bad documents out and counts them by the code of their error; ``quarantine`` writes
            them to a file beside the output too.
        text_documents: what a document of a ``.txt`` file is, see ``readers.TEXT_DOCUMENTS``.

    Raises:
        ConfigError: E287 a limit out of range, E288 a bad output or fields, E276 parquet without its library.
        DataError: E301 to E309, E347 bad input; E302 nothing to write; E364 more sets than the Pile can have.
    """
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(87, f"--max-gb={max_bytes / 1e9:g}", "must be positive", "leave it out to take everything")
    if "text" in keep:
        raise ConfigError(88, "--keep text", "is the name of the text itself", "leave it out")
    by_set, target = kind == "pile" and not sets, Path(output)
    if by_set and target.is_file():
        raise ConfigError(88, f"--output {output}", "is a file, and the sets need a folder", "name a folder, or --set")
    paths = _input_files(kind, inputs)
    rejected = target / "rejected.jsonl" if by_set else target.with_name(f"{target.name}.rejected.jsonl")
    skipped = Skipped(on_error, rejected)
    job = _Conversion(kind, key or DEFAULT_KEYS[kind], sets, keep, max_bytes, target, text_documents, skipped)
    manifest = job.output / "manifest.json" if by_set else job.output.with_name(f"{job.output.name}.manifest.json")
    manifest.unlink(missing_ok=True)  # from here on it would not describe what lies beside it
    with ExitStack() as stack, Progress(f"reformatting {kind}", sum(p.stat().st_size for p in paths)) as progress:
        stack.enter_context(job.skipped)
        _copy(job, paths, by_set, stack, progress)
        if not any(writer.documents for writer in job.writers.values()):
            others = ", ".join(sorted(job.other_sets))
            remedy = f"name sets that are in it: --set with one of {others}" if others else "check inputs and --max-gb"
            raise DataError(2, ", ".join(map(str, inputs)), "holds no document to write", remedy)
    outputs = sorted((writer.describe() for writer in job.writers.values()), key=lambda entry: entry["name"])
    full = sorted(job.writers[name].path.name for name in job.full)
    content = {
        "kind": kind,
        "options": {"key": job.key, "sets": list(sets), "keep": list(keep), "max_bytes": max_bytes,
                    "on_error": on_error} | ({"text_documents": text_documents} if kind == "text" else {}),
        "sources": describe_sources(paths, job.hashes),
        "outputs": outputs,
        "full": full,
        "left_out": job.skipped.describe(),
    }  # fmt: skip
    write_corpus_manifest(manifest, content)
    return ReformatSummary(outputs, job.skipped, full)


def _format_of(kind: str) -> str:
    return "parquet" if kind in _PARQUET_KINDS else "text" if kind == "text" else "jsonl"


def _input_files(kind: str, inputs: Sequence[str | Path]) -> list[Path]:
    """The files, all of the kind's format."""
    paths = expand_inputs(inputs)
    wanted = _format_of(kind)
    folders = [Path(item) for item in inputs if Path(item).is_dir()]
    fitting = []
    for path in paths:
        if kind_of(path, "text") == wanted:
            fitting.append(path)
        elif not any(folder in path.parents for folder in folders):  # a folder may hold a README and the like
            raise ConfigError(88, str(path), f"is no {_FORMATS[wanted]} file, which {kind} consists of",
                              "name files of this format, or another kind")  # fmt: skip
    if not fitting:
        there = {kind_of(path, "text") for path in paths}
        kinds = [other for other in KINDS if other != kind and _format_of(other) in there]
        remedy = (
            f"its files are those of another kind: {', '.join(kinds)}" if kinds else "check the inputs and the kind"
        )
        raise DataError(1, ", ".join(map(str, inputs)), f"holds no {_FORMATS[wanted]} file", remedy)
    return fitting


def _copy(job: _Conversion, paths: list[Path], by_set: bool, stack: ExitStack, progress: Progress) -> None:
    if not by_set:
        job.writers[""] = stack.enter_context(LineWriter(job.output))
    columns = job.keep if job.kind in _PARQUET_KINDS else ()
    for path in paths:
        on_bad, kind = job.skipped.on_bad, job.text_documents
        for document in read_documents(path, job.key, columns, on_bad, progress, job.hashes, kind):
            name = ""
            if job.kind == "pile":
                found = _set_of(document)
                if found is None:
                    error = DataError(7, document.where, "has no string under meta.pile_set_name", "mend the line")
                    if on_bad is None:
                        raise error
                    on_bad(note_of(error, document.place, document.line, path))
                    continue
                if job.sets and found not in job.sets:
                    if len(job.other_sets) < MAX_SETS:
                        job.other_sets.add(found)
                    job.skipped.counts["another set"] += 1
                    continue
                name = found if by_set else ""
            if not document.text:
                job.skipped.counts["empty text"] += 1
                continue
            if by_set and name not in job.writers:
                job.writers[name] = stack.enter_context(_set_writer(job, name))
            if not _write(job, name, document):
                if not by_set:
                    return  # nothing that follows would be written
                job.skipped.counts["output full"] += 1


def _set_of(document: Document) -> str | None:
    meta = document.fields.get("meta")
    name = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) and name else None


def _set_writer(job: _Conversion, name: str) -> LineWriter:
    """A file whose name is the set's, without what file names should not hold."""
    if len(job.writers) == MAX_SETS:
        raise DataError(64, f"{job.output}: the set {name!r}", f"is the {MAX_SETS + 1}th: the Pile has 22",
                        "check meta.pile_set_name, or choose with --set")  # fmt: skip
    stem = re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_-")[:100]
    taken = {writer.path.stem for writer in job.writers.values()}
    if not stem or stem in taken:  # two names that differ only in what was taken out
        stem = f"{stem or 'set'}-{xxhash.xxh3_64_hexdigest(name.encode())[:8]}"
    return LineWriter(job.output / f"{stem}.jsonl")


def _write(job: _Conversion, name: str, document: Document) -> bool:
    """Write a document; False where the output is full, from the first document on that does not fit."""
    writer = job.writers[name]
    size = len(document.text.encode())
    if name in job.full or (job.max_bytes is not None and writer.text_bytes + size > job.max_bytes):
        job.full.add(name)
        return False
    kept = {field: document.fields[field] for field in job.keep if field in document.fields}
    writer.write(text_line(document.text, kept), size)
    return True
