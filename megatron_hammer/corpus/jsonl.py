"""One document a line: the strict reader of JSON lines, and the writer that publishes a file whole or not at all.

Everything that reads text (tokenizer training, preprocessing, statistics) reads it here, so that a bad line has one
name and one message wherever it is met. A bad line is never skipped: it ends the program with its file, line and cause.

    {"text": "first document", "anything": "else"}
    {"text": "second document"}

Plain, gzip (``.gz``) and Zstandard (``.zst``) files are read as streams: memory holds one line and some buffers.
Lines end with LF or CRLF. orjson parses (it refuses invalid UTF-8, NaN and lone surrogates); only after it has refused
a line do slower checks find out which rule was broken. Without torch or any tokenizer library.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import orjson

from megatron_hammer.errors import DataError
from megatron_hammer.files import sync_folder

MAX_LINE_BYTES = 1 << 30
"""Longest line read, line ending included. A document of a gigabyte is a file without line breaks, not a document."""

_BUFFER_BYTES = 1 << 20
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Record(NamedTuple):
    """One document."""

    text: str
    line: int
    """Line number in the file, from 1."""
    raw_bytes: int
    """Bytes of the uncompressed line, line ending included: they add up to the uncompressed file."""


def read_jsonl(path: str | Path, key: str = "text") -> Iterator[Record]:
    """Yield every document of a file, strictly, in order.

    Args:
        path: a JSON lines file; a name that ends in ``.gz`` or ``.zst`` is decompressed on the way.
        key: the field that holds the text. It may be an empty string: what to do with that is the caller's decision.

    Raises:
        DataError: E301 no such file, E302 no document in it, E303 wrong encoding, E304 malformed JSON, E305 blank line,
            E306 not an object, E307 no such key or no string there, E308 lone surrogate, E309 damaged compression.
    """
    path = Path(path)
    line_number = 0
    with _open(path) as stream:
        for line_number, line in enumerate(_lines(stream, path), start=1):
            try:
                text = orjson.loads(line)[key]
            except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
                raise _diagnose(path, line_number, line, key) from None
            if type(text) is not str:
                raise _diagnose(path, line_number, line, key)
            yield Record(text, line_number, len(line))
    if line_number == 0:
        raise DataError(2, str(path), "holds no document", "give a file with one JSON object a line")


class JsonlCorpus:
    """Several JSON lines files as one stream of texts that can say afterwards what it was made of.

    Iterating yields the text of every non-empty document, in the order of the files. ``describe`` gives name, size and
    SHA-256 of each file (of the bytes on disk) for a manifest.
    """

    def __init__(self, paths: Iterable[str | Path], key: str = "text") -> None:
        self.paths = [Path(path) for path in paths]
        self.key = key
        for path in self.paths:  # a name that is wrong should not be found out after an hour's reading
            _check_file(path)

    def __iter__(self) -> Iterator[str]:
        for path in self.paths:
            for record in read_jsonl(path, self.key):
                if record.text:
                    yield record.text

    def describe(self) -> list[dict[str, Any]]:
        """``[{"name", "bytes", "sha256"}, ...]``; reads every file once."""
        described = []
        for path in self.paths:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            described.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
        return described


class JsonlWriter:
    """Write a JSON lines file that appears under its name only when it is complete.

    Lines go to a temporary name beside it; leaving the ``with`` block without an exception flushes it to disk and
    renames it, leaving with one removes it::

        with JsonlWriter("zh.jsonl") as writer:
            writer.write({"text": "..."})
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        assert self.path.suffix not in (".gz", ".zst"), f"{self.path}: the writer does not compress"
        self.documents = 0
        self._temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        self._file: BinaryIO | None = None

    def __enter__(self) -> JsonlWriter:
        self._file = open(self._temporary, "wb", buffering=_BUFFER_BYTES)
        return self

    def write(self, record: Mapping[str, Any]) -> None:
        assert self._file is not None, "JsonlWriter.write needs the with block"
        self._file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
        self.documents += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                os.replace(self._temporary, self.path)
                sync_folder(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)  # gone already after the rename


# ---- opening ----


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(1, str(path), "is a folder, not a JSON lines file", "name the files in it")
    if not path.exists():
        raise DataError(1, str(path), "does not exist", "check the path of the input file")


def _open(path: Path) -> BinaryIO:
    """The uncompressed bytes of ``path`` as a buffered stream."""
    _check_file(path)
    if path.suffix == ".gz":
        import gzip

        return gzip.open(path, "rb")  # type: ignore[return-value]  # a BufferedIOBase with all that we call
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdStream(path), _BUFFER_BYTES)
    return open(path, "rb", buffering=_BUFFER_BYTES)


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of a Zstandard file of one or more frames.

    The library's own reader takes the end of a cut file for the end of the data; this one raises ``EOFError`` there.
    """

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(
                9, str(path), "is compressed with Zstandard, which this Python cannot read",
                "run: pip install zstandard (or decompress the file)",
            ) from None  # fmt: skip
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._file = open(path, "rb")  # noqa: SIM115 (closed by close)
        self._output = memoryview(b"")
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            compressed = self._file.read(_BUFFER_BYTES // 8)
            if not compressed:
                if self._inside_frame:
                    raise EOFError("the last frame is cut off")
                return 0
            self._output = memoryview(self._decompress(compressed))
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _decompress(self, compressed: bytes) -> bytes:
        output = []
        while compressed:
            self._inside_frame = True
            output.append(self._frame.decompress(compressed))
            if not self._frame.eof:
                break
            compressed = self._frame.unused_data  # another frame may follow
            self._frame = self._decompressor.decompressobj()
            self._inside_frame = False
        return b"".join(output)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _lines(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of ``stream`` with their endings; errors of the decompressors become E309."""
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error)
    if path.suffix == ".zst":
        import zstandard

        damage = (*damage, zstandard.ZstdError)
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_LINE_BYTES + 1)
        except damage as error:
            raise _damaged(path, number, error) from None
        except OSError as error:
            if error.errno is not None:
                raise  # the operating system's own, reported as such
            raise _damaged(path, number, error) from None  # gzip.BadGzipFile and its kin carry no errno
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                4, f"{path}:{number}", f"is longer than {MAX_LINE_BYTES:,} bytes", "put one JSON object on each line"
            )
        yield line


def _damaged(path: Path, line_number: int, error: Exception) -> DataError:
    return DataError(9, f"{path}:{line_number}", f"could not be decompressed ({error})", "fetch or compress it again")


# ---- naming what is wrong with a line ----


def _diagnose(path: Path, line_number: int, line: bytes, key: str) -> DataError:
    """Which rule of the format a refused line breaks. Slow, and called once in a program's life."""
    where = f"{path}:{line_number}"
    if line_number == 1:
        for mark, encoding in _BYTE_ORDER_MARKS.items():
            if line.startswith(mark):
                return DataError(3, where, f"begins with a byte order mark ({encoding})", "save it as plain UTF-8")
        if line.startswith((_GZIP_MAGIC, _ZSTD_MAGIC)):
            kind = ".gz" if line.startswith(_GZIP_MAGIC) else ".zst"
            return DataError(9, str(path), "is compressed, but its name does not say so", f"rename it to end in {kind}")
    if not line.strip():
        return DataError(5, where, "is a blank line", "remove it: every line must be one JSON object")
    try:
        decoded = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        return DataError(
            3, where, f"is not valid UTF-8: byte 0x{byte:02x} at offset {error.start} of the line ({error.reason})",
            "convert the file to UTF-8",
        )  # fmt: skip
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as refused:
        try:
            value = json.loads(decoded)  # it lets lone surrogates pass, which orjson does not
        except (ValueError, RecursionError):
            value = None
        if value is not None and (surrogate := _find_surrogate(value)):
            return DataError(
                8, where, f"holds half of a surrogate pair (\\u{ord(surrogate):04x}), which is no character",
                "remove the escape or restore its other half",
            )  # fmt: skip
        return DataError(4, where, f"is not valid JSON: {refused.msg} at column {refused.colno}", "mend the line")
    if not isinstance(value, dict):
        return DataError(6, where, f"holds {_kind(value)}, not a JSON object", f'write it as {{"{key}": "..."}}')
    if key not in value:
        keys = ", ".join(sorted(value)[:8]) or "none"
        return DataError(7, where, f"has no key {key!r} (its keys: {keys})", "name the key that holds the text")
    return DataError(7, where, f"has {_kind(value[key])} under {key!r}", "the text must be a string")


def _find_surrogate(value: Any) -> str | None:
    """The first lone surrogate in any string of a parsed JSON value; nested objects without recursion."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str) and (found := _LONE_SURROGATE.search(item)):
            return found.group()
        if isinstance(item, dict):
            todo.extend(item.keys())
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
    return None


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names[type(value)]
