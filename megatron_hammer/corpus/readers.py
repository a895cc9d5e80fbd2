"""From the names of input files to blocks of documents: JSON lines, plain text (both also ``.gz``, ``.zst``), parquet.

::

    folders, globs -> expand_inputs -> files -> plan_ranges -> read_range -> Block -> parse.parse_block -> texts
                                                               one thread, in order   any thread

A block is about a megabyte of whole lines, or one longer line by itself. Reading cuts blocks and hashes; parsing, which
costs ten times as much, is a pure function of one block, so several threads can do it and the result does not depend on
how many. Memory holds a block, and for a long line its bytes once while it is read.

The ending of a file's name, in any case, decides how it is read: ``.parquet``; plain text (``TEXT_SUFFIXES``, see
``TEXT_DOCUMENTS``); everything else is JSON lines.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

import xxhash

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.paths import what_is
from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import open_regular
from megatron_hammer.corpus import file_blocks, jsonl, parquet
from megatron_hammer.corpus.file_blocks import START, Block, FileRange, Position
from megatron_hammer.corpus.stream import SourceStream, StreamDamage, is_compressed, no_such_file, open_stream

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown")
TEXT_DOCUMENTS = ("file", "line", "blank-line")
"""What a document of a file of plain text is: all of it, each line (empty ones are none), or what stands between empty
lines. Nothing is stripped except the line endings that separate documents."""
DEFAULT_TEXT_DOCUMENTS = "blank-line"
"""Of every program, so that a tokenizer is trained on the documents that are preprocessed later."""

# What files of a corpus are called that are not trained on: as a part of the name of its own.
_HELD_OUT = re.compile(r"(?:^|[._-])(?:valid|validation|val|dev|test|eval|heldout|held-out|held_out)(?=[._-]|$)")
_ENDINGS = re.compile(r"(?:\.(?:jsonl|json|ndjson|txt|text|md|markdown|parquet|gz|zst))+$", re.IGNORECASE)
_BLOCK_LINES = 16384  # most in a block: half a kilobyte of notes each, should all be bad
_SUFFIXES = (".jsonl", ".json", ".ndjson", *TEXT_SUFFIXES, ".parquet")  # taken from a folder
_NOTES = ("readme", "license", "licence", "notice", "changelog", "contributing")  # .md and .txt that describe a folder


# ---- which files ----


def expand_inputs(inputs: Iterable[str | Path]) -> list[Path]:
    """The files that the inputs name: a folder means the corpora in and below it, a pattern those that match, sorted.

    Raises:
        DataError: E301 an input that names no file.
    """
    files: list[Path] = []
    for item in map(str, inputs):
        path = Path(item)
        if path.is_dir():
            files += _corpora_in(path)
        elif path.exists():
            files.append(path)
        elif glob.has_magic(item):
            files += _matches_of(item)
        else:
            raise no_such_file(path)
    return files


def _corpora_in(path: Path) -> list[Path]:
    """The corpora in and below a folder; notes name what has a corpus's name and is none, or is held out from one."""
    found: list[Path] = []
    aside: list[Path] = []
    held_out: list[Path] = []
    for folder, folders, names in os.walk(path):
        beside = [*folders, *names]
        held_out += [Path(folder) / name for name in folders if is_held_out(name, beside)]
        folders[:] = [name for name in folders if not is_held_out(name, beside)]
        for name in filter(_is_corpus, names):
            file = Path(folder) / name
            (held_out if is_held_out(name, beside) else aside if _is_about(file) else found).append(file)
    _refuse_what_is_no_corpus(path, found)
    if any(kind_of(path, "text") != "text" for path in found):  # a data set's cards lie beside its .jsonl or parquet
        aside += [path for path in found if _is_markdown(path)]
        found = [path for path in found if not _is_markdown(path)]
    for files, why in ((aside, "describe other files and hold no documents; to read one, name it"),
                       (held_out, "are held out from those beside them; to read them too, name them")):  # fmt: skip
        if files and found:
            shown = ", ".join(map(str, sorted(files)[:5])) + (f" and {len(files) - 5:,} more" if files[5:] else "")
            say(f"note: of {path} left aside, for they {why}: {shown}")
    found.sort()
    if not found:
        raise DataError(1, str(path), f"is a folder without a file that ends in {', '.join(_SUFFIXES)}",
                        "name the files in it")  # fmt: skip
    return found


def _refuse_what_is_no_corpus(folder: Path, found: Sequence[Path]) -> None:
    """E301 for a run's folder, and for a model's, a tokenizer's or datasets' without a corpus beside them."""
    kind = what_is(folder)
    texts = [path for path in found if path.suffix.lower() not in (".json", ".md", ".markdown")]
    if kind and (not texts or folder / "metrics.jsonl" in texts):
        raise DataError(1, str(folder), f"is {kind}, no text", "name files of text, or a folder that holds them alone")


def _matches_of(pattern: str) -> list[Path]:
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if not os.path.isdir(name))
    if not found:
        raise DataError(1, pattern, "matches no file", "check the pattern")
    return found


def is_held_out(name: str, names: Iterable[str]) -> bool:
    """Whether a name says validation or test, and the text to train on is beside it: zh.valid.jsonl by zh.jsonl.

    Args:
        name: of a file or folder.
        names: of all that is in its folder.
    """
    stem = _stem(name)
    marked = _HELD_OUT.search(stem)
    if marked is None:
        return False
    before, behind = stem[: marked.start()], stem[marked.end() :]
    others = {f"{before}{mark}{behind}" for mark in (".train", "-train", "_train", "train", "")} - {""}
    return not others.isdisjoint(map(_stem, names))


def _stem(name: str) -> str:
    return _ENDINGS.sub("", name)


def _is_markdown(path: Path) -> bool:
    return _plain_name(path.name).endswith((".md", ".markdown"))


def _is_about(path: Path) -> bool:
    """Whether a file of a folder is a description: a README, or such as our manifests, one JSON object over lines."""
    name = _plain_name(path.name)
    if name.endswith(TEXT_SUFFIXES) and _stem(name) in _NOTES:
        return True
    if path.name == "rejected.jsonl" or path.name.endswith(
        (".rejected.jsonl", ".journal.json", ".meta.json", ".split.json")
    ):
        return True
    if path.suffix.lower() != ".json":
        return False
    with open_regular(path) as file:
        return file.read(4096).split(b"\n", 1)[0].strip() == b"{"


def _is_corpus(name: str) -> bool:
    return not name.startswith(".") and _plain_name(name).endswith(_SUFFIXES)


def _plain_name(name: str) -> str:
    """In small letters and without what says that it is compressed."""
    return name.lower().removesuffix(".gz").removesuffix(".zst")


def kind_of(path: Path, text_documents: str) -> str:
    """How a file is read: jsonl, parquet, or for text what its documents are."""
    if path.suffix.lower() == ".parquet":
        return "parquet"
    return text_documents if _plain_name(path.name).endswith(TEXT_SUFFIXES) else "jsonl"


def plan_ranges(
    files: Sequence[Path], text_documents: str = DEFAULT_TEXT_DOCUMENTS, range_bytes: int | None = None
) -> Iterator[FileRange]:
    """The files in order, each as one range, or as ranges of about so many bytes where a file can be cut.

    Plain files whose documents are lines are cut behind a line, parquet files between row groups; others stay whole.
    """
    for source, path in enumerate(files):
        kind = kind_of(path, text_documents)
        cuts: list[int] = []
        if range_bytes is not None and kind == "parquet":
            cuts = parquet.row_group_cuts(path, range_bytes)
        elif range_bytes is not None and kind in ("jsonl", "line") and not is_compressed(path):
            cuts = _line_cuts(path, range_bytes)
        starts = [START, *(Position(cut, cut + 1 if kind == "parquet" else 1) for cut in cuts)]
        for start, end in zip(starts, [*cuts, None]):
            yield FileRange(source, start, end)


def _line_cuts(path: Path, range_bytes: int) -> list[int]:
    size, cuts = path.stat().st_size, [0]
    with open_regular(path) as file:
        for place in range(range_bytes, size, range_bytes):
            if place <= cuts[-1]:
                continue  # inside a line longer than a range
            file.seek(place - 1)
            while piece := file.readline(file_blocks.BLOCK_BYTES):
                if piece.endswith(b"\n"):
                    break
            if file.tell() < size:
                cuts.append(file.tell())
    return cuts[1:]


# ---- reading ----


def read_range(
    path: Path,
    file_range: FileRange,
    keys: Sequence[str],
    text_documents: str = DEFAULT_TEXT_DOCUMENTS,
    resume: Position | None = None,
    lenient: bool = False,
) -> Generator[Block, None, None]:
    """The range's documents in blocks, in order; at least one block. The last block of a file has ``Block.last`` set.

    Args:
        keys: the columns to read from a parquet file.
        resume: go on from this place of the range, which a former run reached. What lies before is read again, for
            the hashes and because compressed data has no other way; the first block is empty, ends there and carries
            the hash of what was read again.
        lenient: a line beyond the limit, and a parquet file that cannot be opened, are passed over and noted in
            ``Block.trouble``; else they end the reading.

    Raises:
        DataError: E301, E347 for a parquet file that cannot be opened or lacks a column.
        ConfigError: E276 parquet without its library.
    """
    kind = kind_of(path, text_documents)
    if kind == "parquet":
        yield from parquet.read_parquet(path, file_range, keys, resume, lenient)
        return
    with open_stream(path) as stream:
        cutter = _Cutter(stream, path, file_range, kind, lenient)
        if resume is not None:
            yield cutter.skip_to(resume)
        while not cutter.finished:
            yield cutter.next_block()


class _Cutter:
    """Cuts a stream of bytes into blocks behind a separator."""

    def __init__(self, stream: SourceStream, path: Path, file_range: FileRange, kind: str, lenient: bool) -> None:
        self.stream, self.path, self.file_range, self.kind, self.lenient = stream, path, file_range, kind, lenient
        self.finished = False
        self._place = file_range.start
        self._content = xxhash.xxh3_128()
        self._rest = b""  # read, and not in a block yet
        self._read = file_range.start.offset  # uncompressed bytes read
        self._raw_counted = 0
        self._damage: str | None = None  # how the file is damaged, behind what is read
        self._trouble: tuple[DataError, Position] | None = None
        if file_range.start.offset:
            assert not is_compressed(path), f"{path}: only plain files are cut"
            self.stream.seek_unhashed(file_range.start.offset)

    def skip_to(self, place: Position) -> Block:
        """Read what lies before a place; an empty block."""
        buffer = memoryview(bytearray(file_blocks.BLOCK_BYTES))
        while self._read < place.offset:
            count = self._fill(buffer[: min(file_blocks.BLOCK_BYTES, place.offset - self._read)])
            if count == 0:
                break  # the hash will not be the one that is expected
            self._content.update(buffer[:count])
        self._place = place
        return self._block(b"")

    def next_block(self) -> Block:
        """About a megabyte of whole documents, or one longer document by itself."""
        buffer = bytearray(self._rest)
        self._rest = b""
        while True:
            searched = len(buffer) if len(buffer) >= file_blocks.BLOCK_BYTES else 0  # no separator up to here
            at_end = self._extend(buffer)
            if self._damage is not None:
                return self._end_before_damage(buffer, self._damage)
            # A long document goes into a block of its own; else as many as there are.
            if searched:
                cut = self._first_separator(buffer, searched) or (len(buffer) if at_end else 0)
            else:
                cut = len(buffer) if at_end else self._last_separator(buffer)
            if (cut or len(buffer)) > max(jsonl.MAX_LINE_BYTES, file_blocks.BLOCK_BYTES):
                return self._pass_over(buffer, at_end)
            if cut or at_end:
                cut = self._few_lines(buffer, cut)
                self.finished = at_end and cut == len(buffer)
                return self._cut(buffer, cut)

    def _few_lines(self, buffer: bytearray, cut: int) -> int:
        """A cut with no more lines before it than a block may have: each of them may be bad, and noted."""
        if self.kind in ("jsonl", "line"):
            while buffer.count(b"\n", 0, cut) > _BLOCK_LINES:
                cut = buffer.rfind(b"\n", 0, cut // 2) + 1 or buffer.find(b"\n") + 1
        return cut

    def _extend(self, buffer: bytearray) -> bool:
        """Read up to the block size, or a block more; whether nothing follows.

        The buffer grows in place, its content is never copied.
        """
        filled = len(buffer)
        size = file_blocks.BLOCK_BYTES
        buffer.extend(bytes(size - filled if filled < size else size))
        with memoryview(buffer) as view:
            while count := self._fill(view[filled:]):
                filled += count
            at_end = filled < len(view)
        del buffer[filled:]
        return at_end

    def _end_before_damage(self, buffer: bytearray, damage: str) -> Block:
        """The last block: what stands between the last separator and the damage is a piece of a document."""
        cut = self._last_separator(buffer)
        place = Position(self._place.offset + cut, self._place.line + buffer.count(b"\n", 0, cut))
        self._trouble = jsonl.damaged(self.path, place.line, place.offset, damage), place
        self.finished = True
        return self._cut(buffer, cut)

    def _fill(self, view: memoryview) -> int:
        """Read on; the count, 0 where nothing follows in the range, or nothing before a damage."""
        if self.file_range.end is not None:
            view = view[: max(self.file_range.end - self._read, 0)]
        try:
            count = self.stream.readinto(view) if len(view) else 0
        except StreamDamage as damage:
            self._damage, count = str(damage), 0
        self._read += count
        return count

    def _last_separator(self, buffer: bytearray) -> int:
        """The end of the last whole document, 0 for none."""
        if self.kind == "file":
            return 0
        if self.kind != "blank-line":
            return buffer.rfind(b"\n") + 1
        return max(place + len(gap) if (place := buffer.rfind(gap)) >= 0 else 0 for gap in _GAPS)

    def _first_separator(self, buffer: bytearray, start: int) -> int:
        if self.kind == "file":
            return 0
        if self.kind != "blank-line":
            return buffer.find(b"\n", start) + 1
        ends = [place + len(gap) for gap in _GAPS if (place := buffer.find(gap, max(start - len(gap), 0))) >= 0]
        return min(ends, default=0)

    def _cut(self, buffer: bytearray, cut: int) -> Block:
        self._rest = b"" if self.finished else bytes(memoryview(buffer)[cut:])
        del buffer[cut:]
        return self._block(buffer)

    def _block(self, data: bytes | bytearray) -> Block:
        self._content.update(data)
        start = self._place
        lines = data.count(b"\n") + (1 if data and data[-1] != 0x0A else 0)  # the file's last line may lack its ending
        self._place = Position(start.offset + len(data), start.line + lines)
        last = self.finished and self.file_range.end is None
        if last and self._place.offset == 0 and self._trouble is None:
            self._trouble = DataError(2, str(self.path), "holds no document", _no_document(self.kind)), START
        raw, self._raw_counted = self.stream.raw_bytes - self._raw_counted, self.stream.raw_bytes
        block = Block(
            self.file_range.source,
            self.kind,
            start,
            self._place,
            data,
            text_bytes=len(data),
            raw_bytes=raw,
            content_hash=self._content.hexdigest(),
            last=last,
            file_hash=self.stream.hash_of_all() if last and self.file_range.start.offset == 0 else None,
            trouble=self._trouble,
        )
        self._trouble = None
        return block

    def _pass_over(self, buffer: bytearray, at_end: bool) -> Block:
        """A document beyond the limit, without keeping it."""
        start = self._place
        trouble = jsonl.too_long(self.path, start.line, start.offset), start
        size = 0
        while self.lenient and self._damage is None:
            end = self._first_separator(buffer, 0) or len(buffer)
            with memoryview(buffer) as view:
                self._content.update(view[:end])
                self._rest = bytes(view[end:])
            size += end
            if at_end or self._rest or self._first_separator(buffer, 0):
                break
            buffer = bytearray()
            at_end = self._extend(buffer)
        if self._damage is not None:  # all that follows it is lost, too
            trouble = jsonl.damaged(self.path, start.line, start.offset, self._damage), start
        self.finished = not self.lenient or self._damage is not None or (at_end and not self._rest)
        self._place, self._trouble = Position(start.offset + size, start.line + 1), trouble
        block = self._block(b"")
        block.start, block.text_bytes = start, size
        return block


_GAPS = (b"\n\n", b"\n\r\n")


def _no_document(kind: str) -> str:
    return "give a file with one JSON object a line" if kind == "jsonl" else "give a file with text"
