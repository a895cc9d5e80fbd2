"""Input files as streams of uncompressed bytes: plain, gzip (``.gz``) and Zstandard (``.zst``) files are read alike.

    file --raw bytes--> [XXH3-128, count] --> [decompress] --> readinto

Memory holds some buffers, however far a file expands. A cut or damaged file raises ``StreamDamage`` at the place where
the damage is met, after everything before it has been handed out; the libraries' own readers take a cut Zstandard file
for a whole one.
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from pathlib import Path
from typing import Any

import xxhash

from megatron_hammer.base.errors import DataError, UnfitFile
from megatron_hammer.base.paths import missing_remedy
from megatron_hammer.base.reading import is_own_pipe, open_input

_RAW_BYTES = 128 << 10  # compressed bytes read at once
# A Zstandard block of 128 KiB can be four bytes long, and the library hands out all that a piece of input stands for:
# pieces of this size bound it to 64 MiB, at a cost of 2 us a piece.
_ZSTD_PIECE = 2 << 10
_MOST_AT_ONCE = 1 << 20  # decompressed bytes handed out at once
# A file that stands for so many times its bytes is no text, but made to fill a memory: text takes a fifth to a
# thirtieth of its size. Asked from so many bytes on.
_MOST_EXPANSION, _EXPANSION_FROM = 200, 32 << 20


class StreamDamage(Exception):
    """What is compressed is cut off or damaged; the text says how."""


def check_file(path: Path) -> None:
    """Refuse a path that is not a file: E301."""
    if path.is_dir():
        raise DataError(1, str(path), "is a folder, not a file", "name the files in it")
    if not path.exists():
        raise no_such_file(path)
    if not path.is_file() and not is_own_pipe(path):
        rule = "is a named pipe or a device, not a file"
        raise DataError(1, str(path), rule, "name a file, or let the shell hand on the output of a program: <(zcat X)")


def no_such_file(path: Path) -> DataError:
    """E301: an input that is not there."""
    if path.with_name(f"{path.name}.idx").is_file():
        remedy = "name the text that it was made from"
        return DataError(1, str(path), "is the prefix of an indexed dataset, not a text file", remedy)
    return DataError(1, str(path), "does not exist", missing_remedy(path, "check the path of the input file"))


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in (".gz", ".zst")


def open_stream(path: Path) -> SourceStream:
    """The uncompressed bytes of a file, by what its name ends in, in any case.

    Raises:
        DataError: E301 no such file, E309 Zstandard without its library.
    """
    kind = {".gz": _GzipStream, ".zst": _ZstdStream}.get(path.suffix.lower(), SourceStream)
    try:
        return kind(path)
    except (FileNotFoundError, IsADirectoryError, UnfitFile):
        check_file(path)  # says what is there
        raise


class SourceStream(io.RawIOBase):
    """A plain file. Knows how far it is in the raw bytes, and their hash."""

    def __init__(self, path: Path) -> None:
        self._file = open_input(path)
        self._hash = xxhash.xxh3_128()
        self.raw_bytes = 0
        """Bytes of the file read so far, as they are on disk."""
        self._expanded = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        count = self._file.readinto(view) or 0
        self._hash.update(view[:count])
        self.raw_bytes += count
        return count

    def hash_of_all(self) -> str:
        """XXH3-128 of the whole file: reads what is left of it (behind a damage, say)."""
        while self._read_raw(1 << 20):
            pass
        return self._hash.hexdigest()

    def seek_unhashed(self, offset: int) -> None:
        """Go to a byte of a plain file; the hash is that of what is read from here on."""
        self._file.seek(offset)

    def _read_raw(self, count: int) -> bytes:
        data = self._file.read(count) or b""
        self._hash.update(data)
        self.raw_bytes += len(data)
        return data

    def _check_expansion(self, count: int) -> None:
        """Note ``count`` decompressed bytes; raise ``StreamDamage`` where they are too many for those on disk."""
        self._expanded += count
        if self._expanded > max(_EXPANSION_FROM, _MOST_EXPANSION * self.raw_bytes):
            raise StreamDamage(f"it stands for more than {_MOST_EXPANSION} times its bytes, which no text does")

    def close(self) -> None:
        self._file.close()
        super().close()


class _GzipStream(SourceStream):
    """Members one after the other; zero bytes behind a member are padding, as gzip itself takes them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._member: Any = None
        self._first = True
        self._input = b""
        self._more_inside = False  # the library holds output that did not fit

    def readinto(self, buffer: Any) -> int:
        limit = min(len(buffer), _MOST_AT_ONCE)
        while limit:
            if not self._input and not self._more_inside:
                self._input = self._read_raw(_RAW_BYTES)
                if not self._input:
                    if self._member is not None:
                        raise StreamDamage("the file is cut off")
                    return 0
            if self._member is None:
                if not self._first:
                    self._input = self._input.lstrip(b"\0")
                    if not self._input:
                        continue
                self._member, self._first = zlib.decompressobj(wbits=31), False
            output = self._decompress(limit)
            if output:
                self._check_expansion(len(output))
                buffer[: len(output)] = output
                return len(output)
        return 0

    def _decompress(self, limit: int) -> bytes:
        try:
            output: bytes = self._member.decompress(self._input, limit)
        except zlib.error as error:
            raise StreamDamage(str(error)) from None
        self._input, self._more_inside = self._member.unconsumed_tail, len(output) == limit
        if self._member.eof:
            self._input, self._more_inside, self._member = self._member.unused_data, False, None
        return output


class _ZstdStream(SourceStream):
    """Frames one after the other."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(
                9, str(path), "is compressed with Zstandard, which this Python cannot read",
                "run: pip install zstandard (or decompress the file)",
            ) from None  # fmt: skip
        super().__init__(path)
        self._damage = zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._input = memoryview(b"")
        self._output = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = memoryview(self._read_raw(_RAW_BYTES))
                if not self._input:
                    if self._frame is not None:
                        raise StreamDamage("the last frame is cut off")
                    return 0
            piece, self._input = self._input[:_ZSTD_PIECE], self._input[_ZSTD_PIECE:]
            self._output = memoryview(self._decompress(bytes(piece)))
            self._check_expansion(len(self._output))
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def _decompress(self, piece: bytes) -> bytes:
        output: list[bytes] = []
        while piece:
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                output.append(self._frame.decompress(piece))
            except self._damage as error:
                raise StreamDamage(str(error)) from None
            if not self._frame.eof:
                break
            piece, self._frame = self._frame.unused_data, None  # another frame may follow
        return output[0] if len(output) == 1 else b"".join(output)


def file_identity(path: Path) -> dict[str, Any]:
    """What tells that a file is still the one that was read: size and time of the last change."""
    status = os.stat(path)
    return {"path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def check_unchanged(path: Path, identity: dict[str, Any]) -> None:
    """Raise E349 where a file has changed since its ``file_identity`` was taken. A pipe is never refused."""
    if stat.S_ISREG(os.stat(path).st_mode) and file_identity(path) != identity:
        raise file_changed(path)


def file_changed(path: Path) -> DataError:
    """E349: somebody wrote to a file while it was read."""
    return DataError(49, str(path), "was changed while it was read", "run again when nothing writes to it")
