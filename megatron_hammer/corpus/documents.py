"""Documents as the programs of this room and the tokenizer's read them, and the files that the programs write.

``read_texts`` gives the texts of a file, ``read_batches`` those of several files, ``TextCorpus`` them as one stream.
``read_documents`` is slower and gives each document with all its fields and its line, which reformatting and splitting
need.

``LineWriter`` writes a file of documents, one a line, and ``write_corpus_manifest`` the JSON file beside it that says
from which inputs and how it was made. Both appear under their names only when they are complete.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import orjson
import xxhash

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import dump_names, make_durable, open_new, publish, replace_file, sha256_file
from megatron_hammer.base.progress import Progress
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.file_blocks import START, Block, FileRange, Position
from megatron_hammer.corpus.parse import RejectedDocument, judge_lines, judge_rows, note_of, parse_block
from megatron_hammer.corpus.quarantine import RejectedFile
from megatron_hammer.corpus.readers import DEFAULT_TEXT_DOCUMENTS, expand_inputs, read_range

_BUFFER_BYTES = 1 << 20
_BATCH_BYTES = 8 << 20  # of text encoded at once: enough for many threads
_ZSTD_LEVEL = 3  # the library's default; one thread, so that the same text gives the same bytes everywhere


class Document(NamedTuple):
    """One document of a JSON lines or parquet file."""

    text: str
    fields: dict[str, Any]
    """All fields of a JSON object; the columns asked for of a parquet row."""
    line: bytes
    """The JSON line without its LF, as it is in the file; empty for parquet."""
    where: str
    """File and line, for messages."""
    place: Position = START


OnBad = Callable[[RejectedDocument], None]


class Skipped:
    """Counts what is left out: bad documents by the code of their error, and what else the caller names.

    A context manager: the quarantine file gets its name when the ``with`` block ends well.

    Args:
        on_error: what the user asked for.
        quarantine: the file for ``quarantine``; one of an earlier run is replaced, or removed where none is asked for.
    """

    def __init__(self, on_error: OnError = "skip", quarantine: Path | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        """The first message of each code."""
        self.on_bad: OnBad | None = None if on_error == "stop" else self.add
        """For the reading functions."""
        self._file: RejectedFile | None = None
        if quarantine is not None:
            quarantine.unlink(missing_ok=True)
            if on_error == "quarantine":
                quarantine.parent.mkdir(parents=True, exist_ok=True)
                self._file = RejectedFile(quarantine)

    def add(self, rejected: RejectedDocument) -> None:
        self.counts[rejected.code] += 1
        self.first.setdefault(rejected.code, rejected.message)
        if self._file is not None:
            self._file.write(rejected.path, [rejected])

    def lines(self) -> list[str]:
        """For people: a line a cause, sorted."""
        return [
            f"left out for {cause}: {count:,}" + (f" (first: {self.first[cause]})" if cause in self.first else "")
            for cause, count in sorted(self.counts.items())
        ]

    def describe(self) -> dict[str, int]:
        """The counts, as a manifest keeps them."""
        return dict(sorted(self.counts.items()))

    def __enter__(self) -> Skipped:
        if self._file is not None:
            self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.__exit__(kind, error, trace)


def ignore(rejected: RejectedDocument) -> None:
    """An ``OnBad`` that does nothing: for one of two readings of the same documents, of which the other counts."""


class TextCorpus:
    """Several files of any kind as one stream of texts that can say afterwards what it was made of.

    Iterating yields the text of every non-empty document, strictly, in the order of the files. ``describe`` gives name,
    size and SHA-256 of each file (of the bytes on disk) for a manifest.

    Args:
        inputs: files, folders, patterns; one, or several.
        key: field or column that holds the text.
        text_documents: what a document of a ``.txt`` file is, see ``readers.TEXT_DOCUMENTS``.
        on_bad: gets each document that cannot be used, in the first reading; None: it is an error.

    Raises:
        DataError: E301 an input that names no file.
    """

    def __init__(
        self,
        inputs: str | Path | Iterable[str | Path],
        key: str = "text",
        text_documents: str = DEFAULT_TEXT_DOCUMENTS,
        on_bad: OnBad | None = None,
    ) -> None:
        inputs = [inputs] if isinstance(inputs, str | Path) else inputs  # a text is no sequence of one-letter files
        self.paths = expand_inputs(inputs)  # a name that is wrong should not be found out after an hour's reading
        self.key, self.text_documents, self._on_bad = key, text_documents, on_bad

    def __iter__(self) -> Iterator[str]:
        on_bad = self._on_bad
        if on_bad is not None:
            self._on_bad = ignore
        for path in self.paths:
            for texts, _ in read_texts(path, self.key, text_documents=self.text_documents, on_bad=on_bad):
                yield from filter(None, texts)

    def describe(self) -> list[dict[str, Any]]:
        """``[{"name", "bytes", "sha256"}, ...]``; reads every file once."""
        return [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in self.paths]


def read_texts(
    path: Path,
    key: str = "text",
    progress: Progress | None = None,
    hashes: dict[Path, str] | None = None,
    text_documents: str = DEFAULT_TEXT_DOCUMENTS,
    on_bad: OnBad | None = None,
) -> Iterator[tuple[list[str], int]]:
    """The texts of any file, some at once, with the uncompressed bytes that hold them.

    Arguments and errors are those of ``read_documents``; ``text_documents`` says what a document of a ``.txt`` file is.
    """
    for block in read_range(path, FileRange(0), [key], text_documents, lenient=on_bad is not None):
        parsed = parse_block(block, path, [key], strict=on_bad is None)
        yield parsed.texts[0], block.text_bytes
        for rejected in parsed.rejected:
            assert on_bad is not None, "strict parsing raises"
            on_bad(rejected._replace(path=path))
        _note(block, path, progress, hashes)


def read_batches(paths: Iterable[Path], key: str = "text", progress: Progress | None = None) -> Iterator[list[str]]:
    """The texts of several files, some megabytes at once; arguments and errors as for ``read_texts``."""
    texts: list[str] = []
    size = 0
    for path in paths:
        for some, text_bytes in read_texts(path, key, progress):
            texts += some
            size += text_bytes
            if size >= _BATCH_BYTES:
                yield texts
                texts, size = [], 0
    yield texts


def read_documents(
    path: Path,
    key: str,
    columns: Sequence[str] = (),
    on_bad: OnBad | None = None,
    progress: Progress | None = None,
    hashes: dict[Path, str] | None = None,
    text_documents: str = DEFAULT_TEXT_DOCUMENTS,
) -> Iterator[Document]:
    """The documents of a file in order, whose text may be empty.

    Args:
        path: ``.jsonl`` or ``.txt``, also ``.gz`` and ``.zst``, or ``.parquet``.
        key: the field or column that holds the text.
        columns: further columns to read from a parquet file.
        on_bad: gets each document (or rest of a file) that cannot be used. None: its error is raised.
        progress: advanced by the bytes on disk.
        hashes: gets the XXH3-128 of the file (of the bytes on disk) when it has been read to its end.
        text_documents: what a document of a ``.txt`` file is.

    Raises:
        DataError: E301 to E309, E347 as ``readers.py``; those that concern a whole file in any case.
        ConfigError: E276 parquet without its library.
    """

    def bad(error: DataError, place: Position, raw: bytes | bytearray | None) -> None:
        if on_bad is None:
            raise error
        on_bad(note_of(error, place, raw, path))

    names = list(dict.fromkeys([key, *columns]))
    for block in read_range(path, FileRange(0), names, text_documents, lenient=on_bad is not None):
        if block.kind == "parquet":
            yield from _rows(block, path, key, names, bad)
        elif block.kind == "jsonl":
            yield from _objects(block, path, key, bad)
        else:
            yield from _texts(block, path, key, bad)
        if block.trouble is not None:
            bad(*block.trouble, None)
        _note(block, path, progress, hashes)


_Bad = Callable[[DataError, Position, "bytes | bytearray | None"], None]


def _note(block: Block, path: Path, progress: Progress | None, hashes: dict[Path, str] | None) -> None:
    if progress is not None:
        progress.advance(block.raw_bytes)
    if hashes is not None and block.file_hash is not None:
        hashes[path] = block.file_hash


def _objects(block: Block, path: Path, key: str, bad: _Bad) -> Iterator[Document]:
    lines = block.data.split(b"\n")
    if not lines[-1]:
        lines.pop()
    for place, line, fields, found in judge_lines(block, path, [key], lines):
        if isinstance(found, DataError):
            bad(found, place, line)
        else:
            yield Document(found[0], fields, bytes(line), f"{path}:{place.line}", place)


def _texts(block: Block, path: Path, key: str, bad: _Bad) -> Iterator[Document]:
    try:
        texts = parse_block(replace(block, trouble=None), path, [key], strict=True).texts[0]
    except DataError as error:  # not UTF-8: a text file has no lines to leave out one by one
        if error.number == 9:
            raise  # the whole file is something else than its name says
        bad(error, block.start, block.data)
        return
    for text in texts:
        yield Document(text, {key: text}, b"", str(path))


def _rows(block: Block, path: Path, key: str, names: Sequence[str], bad: _Bad) -> Iterator[Document]:
    if block.data is None:
        return
    for place, fields, error in judge_rows(block, path, names, [key]):
        if error is not None:
            bad(error, place, None)
        else:
            yield Document(fields[key], fields, b"", f"{path}:{place.line}", place)


class LineWriter:
    """Writes a file of lines that gets its name only when its ``with`` block ends well.

    Args:
        path: ends in ``.gz`` or ``.zst`` to compress.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ConfigError(88, f"output {path}", "is a folder", "name a file")
        if self.path.suffix.lower() in (".parquet", ".csv", ".tsv", ".json", ".bin", ".idx"):
            meant = self.path.with_suffix(".jsonl")
            raise ConfigError(88, f"output {path}", "gets JSON lines, which are no such file", f"write {meant}")
        self.documents = 0
        self.text_bytes = 0
        self._temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")

    def __enter__(self) -> LineWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _HashedFile(self._temporary)
        self._stream: Any = self._file
        if self.path.suffix.lower() == ".gz":
            # Without name and time: the same text gives the same bytes.
            self._stream = gzip.GzipFile("", "wb", 6, self._file, mtime=0)
        elif self.path.suffix.lower() == ".zst":
            import zstandard

            compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
            self._stream = compressor.stream_writer(self._file, closefd=False)  # type: ignore[arg-type]
        return self

    def write(self, line: bytes, text_bytes: int) -> None:
        """Append one document.

        Args:
            line: without its line break.
            text_bytes: UTF-8 bytes of its text, to be counted.
        """
        self._stream.write(line + b"\n")
        self.documents += 1
        self.text_bytes += text_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._stream is not self._file:
                    self._stream.close()
                self._file.sync()
                self._file.close()
                publish(self._temporary, self.path)
        finally:
            with suppress(OSError):  # after a failure of this block or the user's; it is closed otherwise
                self._file.close()
            self._temporary.unlink(missing_ok=True)  # gone already after the rename

    def describe(self) -> dict[str, Any]:
        """For a manifest, once the file is published."""
        return {
            "name": self.path.name,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "bytes": self.path.stat().st_size,
            "xxh3": self._file.hash.hexdigest(),
        }


class _HashedFile:
    """A new file that hashes what is written to it."""

    def __init__(self, path: Path) -> None:
        self._file = open_new(path, _BUFFER_BYTES)
        self.hash = xxhash.xxh3_128()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def sync(self) -> None:
        make_durable(self._file)

    def close(self) -> None:
        self._file.close()


def text_line(text: str, fields: dict[str, Any] | None = None) -> bytes:
    """``{"text": ...}`` and further fields as JSON; what is no strict JSON stays as Python's own json writes it."""
    content = {"text": text} | (fields or {})
    if not _has_odd_number(fields):
        try:
            return orjson.dumps(content, default=str)  # str: for decimals and their like
        except TypeError:  # integers beyond 64 bits, halves of surrogate pairs
            pass
    return json.dumps(content, default=str, separators=(",", ":")).encode()


def _has_odd_number(value: Any) -> bool:
    """Whether a parsed value holds NaN or an infinity, for which orjson writes null."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, dict):
        return any(map(_has_odd_number, value.values()))
    return isinstance(value, list) and any(map(_has_odd_number, value))


def describe_sources(paths: Sequence[Path], hashes: dict[Path, str]) -> list[dict[str, Any]]:
    """Path, size and hash of each input, for a manifest; no hash for one that was not read to its end."""
    return [{"path": str(path), "bytes": path.stat().st_size, "xxh3": hashes.get(path)} for path in paths]


def write_corpus_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write the JSON file that says how a corpus was made; names that are no UTF-8 keep their bytes, escaped."""
    try:
        written = orjson.dumps(content, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError:  # a name whose bytes are no UTF-8
        written = dump_names(content)
    replace_file(path, written)
