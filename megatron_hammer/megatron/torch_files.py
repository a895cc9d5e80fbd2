"""The files of ``torch.save``: a zip archive that holds a pickle and the bytes of tensors, which stay where they are.

::

    NAME/data.pkl      a pickle; a tensor is a call that names a storage, a shape and strides
    NAME/data/N        the bytes of storage N, uncompressed, so that they can be mapped
    NAME/byteorder     "little"
    central directory  where each of them lies

torch's own reader is not used: it unpacks compressed records, however large they become, and calls functions of torch
with arguments from the file (``bytearray`` of a number makes so many bytes). Here the directory is read by the few
fields that count, nothing compressed is accepted, and the pickle (``pickles.py``) can make tensors of the file's own
bytes only, at most as many elements as there are bytes for.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import warnings
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.reading import open_descriptor
from megatron_hammer.megatron.pickles import Damage, Guarded, PickleLimits, Record, check_operations, damage, reading

_END, _END_64, _LOCATOR_64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_END_BYTES, _LOCATOR_BYTES = 22, 20
_STORED, _WIDE = 0, 0xFFFFFFFF
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_TYPES = {f"torch.{name}": found for name in dir(torch) if isinstance(found := getattr(torch, name), torch.dtype)}


@dataclass(frozen=True)
class _Record:
    """A record of the archive."""

    header: int
    size: int


def load_pt(path: Path) -> Any:
    """The content of a file of ``torch.save``; tensors stay in the file, mapped, until they are read.

    Raises:
        CheckpointError: E431 it names what is not on our list; E433 it cannot be read.
    """
    with reading(path):
        descriptor = open_descriptor(path, follow=False)
    try:
        if os.pread(descriptor, 4, 0) != b"PK\x03\x04":
            rule = "is not a zip file of torch.save; the pickles of torch before 1.6 are not read"
            raise CheckpointError(33, str(path), rule, "load it in its own program, and save it with a newer torch")
        with damage(path):
            return _load(mmap(descriptor, 0, access=ACCESS_READ), path, PickleLimits.beside([os.fstat(descriptor)]))
    finally:
        os.close(descriptor)


def load_part(content: bytearray, path: Path) -> Any:
    """What a part of a file of a distributed checkpoint holds: such a file by itself, whose bytes a tensor takes.

    Errors as for ``load_pt``.
    """
    with damage(path):
        return _load(content, path, PickleLimits.least())


def _load(content: mmap | bytearray, path: Path, room: PickleLimits) -> Any:
    archive = _Archive(content, room.bytes)
    if archive.bytes_of("byteorder", 16) not in (b"", b"little"):
        raise Damage("its numbers are of a big-endian machine")
    pickled = archive.bytes_of("data.pkl", room.bytes)
    check_operations(pickled, room.operations)
    return _TorchPickle(path, pickled, archive).load()


class _Archive:
    """Where the records of an archive lie. As torch writes it: nothing behind the directory, and no name twice.

    Args:
        most: bytes of the directory.
    """

    def __init__(self, content: mmap | bytearray, most: int) -> None:
        self.content = content
        start, size, count = self._directory()
        if not 0 <= start <= start + size <= len(content) or size > most or count * 46 > size:
            raise Damage("its directory is not where it should be, or too large")
        self._entries = self._read(start, size, count)
        first = next(iter(self._entries), "")
        self._root = first.partition("/")[0]

    def _directory(self) -> tuple[int, int, int]:
        """Its place, its bytes, and how many entries it has."""
        content, end = self.content, len(self.content) - _END_BYTES
        if end < 0 or content[end : end + 4] != _END:
            raise Damage("its end is missing")
        count, size, start = struct.unpack_from("<HII", content, end + 10)
        locator = end - _LOCATOR_BYTES
        if locator >= 0 and content[locator : locator + 4] == _LOCATOR_64:
            (wide,) = struct.unpack_from("<Q", content, locator + 8)
            if not 0 <= wide <= locator - 56 or content[wide : wide + 4] != _END_64:
                raise Damage("its end is missing")
            count, size, start = struct.unpack_from("<QQQ", content, wide + 32)
        return start, size, count

    def _read(self, start: int, size: int, count: int) -> dict[str, _Record]:
        entries: dict[str, _Record] = {}
        directory, at = bytes(self.content[start : start + size]), 0
        for _ in range(count):
            fields = struct.unpack_from("<4s6xHHHIIIHHH8xI", directory, at)
            magic, method, _, _, _, packed, unpacked, name_size, extra_size, comment_size, header = fields
            name = directory[at + 46 : at + 46 + name_size].decode("utf-8")
            extra = directory[at + 46 + name_size : at + 46 + name_size + extra_size]
            unpacked, packed, header = _widened(extra, (unpacked, packed, header))
            if magic != b"PK\1\2" or name in entries:
                raise Damage("its directory is not one of torch.save")
            if method != _STORED or packed != unpacked:
                raise Damage(f"{name[:80]!r} is compressed, as torch.save never does")
            entries[name] = _Record(header, unpacked)
            at += 46 + name_size + extra_size + comment_size
        return entries

    def find(self, name: str) -> tuple[int, int] | None:
        """Place and bytes of a record; None where there is none."""
        entry = self._entries.get(f"{self._root}/{name}")
        if entry is None:
            return None
        if self.content[entry.header : entry.header + 4] != b"PK\3\4":
            raise Damage(f"{name[:80]!r} is not where its directory says")
        start = entry.header + 30 + sum(struct.unpack_from("<HH", self.content, entry.header + 26))
        if start + entry.size > len(self.content):
            raise Damage(f"{name[:80]!r} ends beyond the file")
        return start, entry.size

    def bytes_of(self, name: str, most: int) -> bytes:
        """A small record; empty where there is none."""
        start, size = self.find(name) or (0, 0)
        if size > most:
            raise Damage(f"{name!r} has {size:,} bytes, more than the {most:,} that go with its tensors")
        return bytes(self.content[start : start + size])


def _widened(extra: bytes, values: tuple[int, ...]) -> list[int]:
    """Sizes and place of an entry; those that do not fit stand in its extra field 1, in this order."""
    found, wide, at = list(values), b"", 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + size]
        at += 4 + size
    for number, value in enumerate(found):
        if value == _WIDE:
            (found[number],), wide = struct.unpack_from("<Q", wide), wide[8:]
    return found


class _TorchPickle(Guarded):
    """The pickle of an archive: what ``Guarded`` makes, and tensors of the archive's bytes."""

    def __init__(self, path: Path, pickled: bytes, archive: _Archive) -> None:
        super().__init__(path, pickled)
        self._archive = archive
        self._made: dict[str, Any] = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._tensor,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
        }
        self._made["torch._tensor._rebuild_from_type_v2"] = self._of_type

    def find_class(self, module: str, name: str) -> Any:
        """As in ``Guarded``, and what makes tensors."""
        full = f"{module}.{name}"
        if full in self._made:
            return self._made[full]
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if full in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
            return torch.uint8
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Tensor:
        """A storage, as a flat tensor: ("storage", type, number, device, elements)."""
        if not isinstance(pid, tuple) or len(pid) != 5 or not isinstance(pid[1], torch.dtype):
            raise pickle.UnpicklingError("a reference to something that is no storage")
        _, dtype, key, _, numel = pid
        place = self._archive.find(f"data/{key}") if isinstance(key, str) and len(key) < 100 else None
        if place is None or type(numel) is not int or numel < 0:
            raise Damage("it refers to a storage that is missing")
        if numel * dtype.itemsize > place[1]:
            raise Damage(f"storage {key} has {place[1]:,} bytes, too few for {numel:,} elements")
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a file that is mapped cannot be written to; nobody does
            return torch.frombuffer(self._archive.content, dtype=dtype, offset=place[0], count=numel)

    def _tensor(self, flat: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Tensor:
        """A view of a storage: (storage, offset, shape, strides, needs gradient, hooks, type where the third form)."""
        kind = more[2] if len(more) > 2 and isinstance(more[2], str) else ""
        if kind:
            flat = flat.view(_TYPES[kind])
        numbers = (offset, *shape, *stride)
        if len(shape) > 8 or any(type(n) is not int or n < 0 for n in numbers):
            raise Damage("it has a tensor of an impossible shape")
        if math.prod(shape) > flat.numel():
            raise Damage(f"it has a tensor of {math.prod(shape):,} elements in a storage of {flat.numel():,}")
        return torch.as_strided(flat, tuple(shape), tuple(stride), offset)

    def _of_type(self, function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """A tensor that has attributes, without them."""
        made = function in self._made.values() and isinstance(arguments, tuple) and len(arguments) < 10
        return function(*arguments) if made else Record()


def _first(value: Any, *more: Any) -> Any:
    return value
