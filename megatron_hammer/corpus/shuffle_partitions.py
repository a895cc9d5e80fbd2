"""The second half of a shuffle: lines with their keys, distributed over files on disk by the first bits of the keys.

    lines --Partitions.add--> a file for each range of keys --Partition.read--> lines of one range, in the input's order

A partition file is a sequence of chunks, each the lines that one call of ``add`` brought: their number and bytes, their
keys, their lengths, their text. It lives only while the shuffle runs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_hammer.base.files import writing
from megatron_hammer.base.reading import open_unbuffered

LINE_OVERHEAD = 64
"""Bytes of memory for a line beside its text: key, start, end, order, and their copies while sorting."""
_VIEWS_AT_ONCE = 1024  # Linux's limit for one writev
_CHUNK = struct.Struct("<QQ")  # lines, bytes of text; then u64 keys, u32 lengths, the text


class Lines(NamedTuple):
    """Some lines in a buffer."""

    buffer: bytearray
    starts: np.ndarray
    """int64 [n], in the order of the input."""
    ends: np.ndarray
    """int64 [n], behind each line break."""
    keys: np.ndarray
    """uint64 [n]."""

    @property
    def bytes(self) -> int:
        """Bytes of the lines, their line breaks included."""
        return int((self.ends - self.starts).sum())

    def write(self, descriptor: int, order: np.ndarray) -> int:
        """Append the lines numbered ``order`` to a file; the kernel gathers them, so nothing is copied here."""
        view = memoryview(self.buffer)
        total = 0
        for first in range(0, len(order), _VIEWS_AT_ONCE):
            chosen = order[first : first + _VIEWS_AT_ONCE]
            bounds = zip(self.starts[chosen].tolist(), self.ends[chosen].tolist())
            total += _write_all(descriptor, [view[start:end] for start, end in bounds])
        return total


def _write_all(descriptor: int, parts: list[memoryview]) -> int:
    """Bytes written: all of ``parts``, in order."""
    total = sum(map(len, parts))
    left = total
    while True:
        left -= (written := os.writev(descriptor, parts))
        if left == 0:
            return total
        while written >= len(parts[0]):  # rare: more than 2 GB at once, a signal, or a disk that is nearly full
            written -= len(parts.pop(0))
        parts[0] = parts[0][written:]


@dataclass
class Partition:
    """A file with the lines of one range of keys, in chunks (MapReduce's and Spark's word; a bucket in sorting)."""

    path: Path
    bits: int
    """Leading bits of the key that all its lines share."""
    lines: int = 0
    bytes: int = 0

    @property
    def weight(self) -> int:
        """Memory that it takes to sort it."""
        return self.bytes + LINE_OVERHEAD * self.lines

    def read(self, buffer: bytearray) -> Lines:
        """All of it, in the order of the input, in ``buffer`` if that is large enough; the file is removed."""
        keys = np.empty(self.lines, np.uint64)
        lengths = np.empty(self.lines, np.uint32)
        if len(buffer) < self.bytes:
            buffer = bytearray(self.bytes * 9 // 8)  # room for the next ones, of about the same size
        lines = used = 0
        with open_unbuffered(self.path, follow=False) as file:
            while lines < self.lines:
                count, size = _CHUNK.unpack(file.read(_CHUNK.size))
                _read_exactly(file, keys[lines : lines + count])
                _read_exactly(file, lengths[lines : lines + count])
                _read_exactly(file, memoryview(buffer)[used : used + size])
                lines += count
                used += size
        self.path.unlink()
        ends = np.cumsum(lengths, dtype=np.int64)
        return Lines(buffer, ends - lengths, ends, keys)

    def chunks(self) -> Iterator[Lines]:
        """One chunk after the other, as they were written."""
        with open_unbuffered(self.path, follow=False) as file:
            while header := file.read(_CHUNK.size):
                count, size = _CHUNK.unpack(header)
                keys, lengths, buffer = np.empty(count, np.uint64), np.empty(count, np.uint32), bytearray(size)
                for part in (keys, lengths, buffer):
                    _read_exactly(file, part)
                ends = np.cumsum(lengths, dtype=np.int64)
                yield Lines(buffer, ends - lengths, ends, keys)


def _read_exactly(file: BinaryIO, target: Any) -> None:
    """Fill an array or buffer."""
    view = memoryview(target).cast("B")
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        assert count, f"{file.name} is shorter than it was when it was written"
        view = view[count:]


class Partitions:
    """Distributes lines over the partitions of the next ``bits`` bits of their keys."""

    def __init__(self, folder: Path, prefix: str, bits: int, used_bits: int = 0) -> None:
        self._shift = np.uint64(64 - used_bits - bits)
        self._mask = np.uint64((1 << bits) - 1)
        self._partitions = [Partition(folder / f"{prefix}{n:04d}", used_bits + bits) for n in range(1 << bits)]

    def add(self, lines: Lines) -> None:
        """Append lines to their partitions, in the order they have."""
        if len(self._partitions) == 1:  # a shift by 64 bits is not defined
            numbers = np.zeros(len(lines.keys), np.uint16)
        else:
            numbers = ((lines.keys >> self._shift) & self._mask).astype(np.uint16)
        order = np.argsort(numbers, kind="stable")  # of 16 bits: a radix sort
        bounds = np.cumsum(np.bincount(numbers, minlength=len(self._partitions))).tolist()
        start = 0
        for partition, end in zip(self._partitions, bounds):
            if end > start:
                self._append(partition, lines, order[start:end])
            start = end

    def _append(self, partition: Partition, lines: Lines, order: np.ndarray) -> None:
        lengths = lines.ends[order] - lines.starts[order]
        size = int(lengths.sum())
        # Opened each time: there may be more partitions than a process may have files open.
        descriptor = os.open(partition.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            header = _CHUNK.pack(len(order), size) + lines.keys[order].tobytes() + lengths.astype(np.uint32).tobytes()
            with writing(partition.path, os.fstat(descriptor).st_size + len(header) + size):
                _write_all(descriptor, [memoryview(header)])
                lines.write(descriptor, order)
        finally:
            os.close(descriptor)
        partition.lines += len(order)
        partition.bytes += size

    def finish(self) -> list[Partition]:
        """Those that hold something, by rising keys."""
        return [partition for partition in self._partitions if partition.lines]
