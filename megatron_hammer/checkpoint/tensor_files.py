"""Safetensors files, written tensor by tensor and read with distrust.

::

    u64 header length N | N bytes of JSON: name -> dtype, shape, [start, stop) | the tensors' bytes, back to back
    '------------- hashed as the header ---------------------'   '---- each tensor hashed on its own ----'

The format itself has no checksum: 997 of 1,000 flipped bits load silently. So the writer hashes each tensor's bytes
where they come from, not what goes to the file, and the reader hashes what it read into private memory, not a mapped
page that may change afterwards or end the process with SIGBUS; both while they copy (``one_pass.py``). The bytes go
past the page cache (``direct.py``).

Needs neither torch nor the ``safetensors`` package, which reads these files too. No pickle anywhere.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_hammer.base import reading
from megatron_hammer.base.errors import CheckpointError, UnfitFile
from megatron_hammer.base.files import hash_bytes, writing
from megatron_hammer.base.reading import parse_json
from megatron_hammer.checkpoint.direct import DirectReader, DirectWriter
from megatron_hammer.checkpoint.one_pass import OnePass

CHUNK_BYTES = 4 * 2**20  # hashed, converted and copied at a time: enough for full disk speed, small beside a tensor
MAX_HEADER_BYTES = 8 * 2**20  # parsing JSON costs ten times its size in memory
MAX_HEADER_VALUES = 500_000  # 30,000 tensors in one file, with 16 each as ``parse_json`` counts: a second
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_RESTORE = "restore the file or use another checkpoint"
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CODE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


def open_checkpoint_file(path: Path) -> IO[bytes]:
    """Open a file for reading, but no symbolic link (it may point out of the folder), pipe or device.

    Raises:
        CheckpointError: there is no such regular file.
    """
    try:
        return reading.open_regular(path, follow=False)
    except FileNotFoundError:
        raise CheckpointError(8, str(path), "is missing", _RESTORE) from None
    except UnfitFile as error:
        remedy = error.remedy if path.is_symlink() else _RESTORE
        raise CheckpointError(8, str(path), f"is not a file of this folder ({error})", remedy) from None
    except IsADirectoryError:
        raise CheckpointError(8, str(path), "is not a regular file", _RESTORE) from None


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    dtype: str
    """``float32``, ``bfloat16`` or ``float16``; another type's code as the file has it."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""
    num_bytes: int


class TensorFileWriter(AbstractContextManager["TensorFileWriter"]):
    """Writes the header first, then the tensors one by one in the order announced.

    Args:
        path: a file that does not exist yet.
        tensors: (name, dtype, shape) of everything that will be written.
        metadata: text for the header's ``__metadata__``.
    """

    def __init__(
        self, path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str] | None = None
    ) -> None:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        position = 0
        for name, dtype, shape in tensors:
            assert position % ITEM_BYTES[dtype] == 0, f"{path}: {name} would begin within an element of a file's block"
            end = position + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        head = len(text).to_bytes(8, "little") + text
        self.path, self.header_hash, self.size = path, hash_bytes(head), len(head) + position
        self._left = [(name, math.prod(shape) * ITEM_BYTES[dtype]) for name, dtype, shape in reversed(tensors)]
        self._file = DirectWriter(path)
        self._file.write(head, OnePass())

    def write(self, name: str, chunks: Iterable[Any], through: OnePass | None = None) -> str:
        """Append the next tensor from buffers; returns the XXH3-128 of its bytes as they are in memory.

        Args:
            through: which hashes them, and adds them up as well.
        """
        expected, size = self._left.pop()
        assert name == expected, f"{self.path}: {name} written where {expected} was announced"
        through = OnePass(size) if through is None else through
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            with writing(self.path, self.size):
                self._file.write(view, through)
            size -= len(view)
        assert size == 0, f"{self.path}: {name} is {-size} bytes longer than announced"
        return through.hexdigest()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with writing(self.path, self.size):
            self._file.close(whole=kind is None)
        assert kind is not None or not self._left, f"{self.path}: {self._left[-1][0]} was announced but not written"


class TensorFileReader(AbstractContextManager["TensorFileReader"]):
    """A safetensors file whose header has been checked: every tensor inside the file, no overlap, no gap.

    Args:
        path: a regular file.
        size, header_hash: what a manifest says of it; None where there is no manifest.

    Raises:
        CheckpointError: missing, of another size, malformed, or another header than the manifest's.
    """

    def __init__(self, path: Path, size: int | None = None, header_hash: str | None = None) -> None:
        self.path = path
        self._file = open_checkpoint_file(path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            if size is not None and size != self.size:
                rule = f"must have {size} bytes as its manifest says"
                raise CheckpointError(9, f"{path} of {self.size} bytes", rule, _RESTORE)
            self.tensors = self._read_header(header_hash)
            self._data = DirectReader(self._file.fileno(), self.size)
        except BaseException:
            self._file.close()
            raise

    def _read_header(self, header_hash: str | None) -> dict[str, TensorEntry]:
        start = self._file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > self.size - 8:
            raise self._malformed("is too short for its header")
        if length > MAX_HEADER_BYTES:
            raise self._malformed(f"announces a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
        text = self._file.read(length)
        if header_hash is not None and hash_bytes(start + text) != header_hash:
            rule = "has another header than its manifest says (damaged or swapped)"
            raise CheckpointError(10, str(self.path), rule, _RESTORE)
        try:
            header = parse_json(text, MAX_HEADER_VALUES, _no_duplicates)
        except ValueError as error:
            reason = type(error).__name__ if isinstance(error, json.JSONDecodeError) else str(error)
            raise self._malformed(f"has a header that is not JSON ({reason})") from None
        if not isinstance(header, dict):
            raise self._malformed("has a header that is not a mapping")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, fields, 8 + length) for name, fields in header.items()}
        position = 8 + length
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
            if entry.offset != position:
                raise self._malformed(f"has a gap or an overlap before tensor {name!r}")
            position += entry.num_bytes
        if position != self.size:
            raise self._malformed(f"has {self.size} bytes where its header accounts for {position}")
        return entries

    def _entry(self, name: str, fields: Any, data_start: int) -> TensorEntry:
        what = f"has a malformed entry for tensor {name!r}"
        if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
            raise self._malformed(what)
        code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not (isinstance(code, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise self._malformed(what)
        if code not in _CODE_BYTES:
            raise self._malformed(f"has tensor {name!r} of the unknown type {code!r}")
        num_bytes = offsets[1] - offsets[0]
        if math.prod(shape) * _CODE_BYTES[code] != num_bytes or offsets[1] > self.size:
            raise self._malformed(f"has tensor {name!r} whose shape and place disagree")
        dtype = next((d for d, c in _CODES.items() if c == code), code)
        return TensorEntry(dtype, tuple(shape), data_start + offsets[0], num_bytes)

    def _malformed(self, rule: str) -> CheckpointError:
        return CheckpointError(10, str(self.path), rule, "restore the file or use another")

    def expect(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """Refuse a file that lacks a tensor, or has another type or shape of it than its manifest says."""
        entry = self.tensors.get(name)
        if entry is None or entry.dtype != dtype or entry.shape != shape:
            rule = "is not there as the manifest describes it"
            raise CheckpointError(10, f"{self.path}: {name}", rule, "use another checkpoint")

    def read_part(self, name: str, start: int, buffer: Any, through: OnePass | None = None) -> None:
        """Fill ``buffer`` (flat bytes) with the tensor's bytes from its byte ``start`` on; nothing is compared.

        Args:
            through: which copies them, and hashes them meanwhile.
        """
        view, through, done = memoryview(buffer), OnePass() if through is None else through, 0
        for part in self._parts(name, start, view.nbytes):
            through.take(part, view[done : done + len(part)])
            done += len(part)

    def _parts(self, name: str, start: int, size: int) -> Iterator[memoryview]:
        """The tensor's bytes from its byte ``start`` on; each part is gone when the next is asked for."""
        entry = self.tensors[name]
        assert start + size <= entry.num_bytes, f"{name}: bytes {start} and {size} of {entry.num_bytes}"
        for part in self._data.parts(entry.offset + start, size):
            yield part
            size -= len(part)
        if size:
            raise CheckpointError(9, str(self.path), "became shorter while it was read", "use another checkpoint")

    def read_into(self, name: str, buffer: Any) -> str:
        """Fill ``buffer`` (flat bytes) with the tensor and return its XXH3-128."""
        entry, view, through = self.tensors[name], memoryview(buffer), OnePass(self.tensors[name].num_bytes)
        assert view.nbytes == entry.num_bytes, f"{name}: {view.nbytes} bytes for a tensor of {entry.num_bytes}"
        self.read_part(name, 0, view, through)
        return through.hexdigest()

    def hash_of(
        self, name: str, through: OnePass | None = None, advance: Callable[[int], None] = lambda count: None
    ) -> str:
        """XXH3-128 of a tensor's bytes, which are not kept.

        Args:
            through: which hashes them, and adds them up as well.
            advance: called with the bytes of each part that was read, one of the file's blocks at most.
        """
        size = self.tensors[name].num_bytes
        through = OnePass(size) if through is None else through
        for part in self._parts(name, 0, size):
            through.take(part)
            advance(len(part))
        return through.hexdigest()

    def chunks(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes in order, ``CHUNK_BYTES`` at a time; each chunk is gone when the next is asked for."""
        size = self.tensors[name].num_bytes
        buffer = memoryview(bytearray(min(size, CHUNK_BYTES)))
        for start in range(0, size, CHUNK_BYTES):
            part = buffer[: size - start]
            self.read_part(name, start, part)
            yield part

    def close(self) -> None:
        """Let the file go."""
        self._data.close()
        self._file.close()

    def __exit__(self, *rest: object) -> None:
        self.close()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def _are_sizes(values: Any) -> bool:
    """A list of plain non-negative integers that cannot overflow anything (True and 1.0 are not)."""
    return isinstance(values, list) and len(values) <= 8 and all(type(v) is int and 0 <= v < 2**62 for v in values)
