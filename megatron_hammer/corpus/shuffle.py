r"""Put the lines of text files of any size into random order, with bounded memory: ``tools/shuffle_corpus.py``.

::

    F1 F2 ...  --scatter-->  2^b buckets on disk, by the first b bits of each line's key  --gather-->  OUT
               read, write                                                 read, sort by key, write

Every line gets a random 64-bit key, and the output is the lines in the order of their keys (the same key: in the order
of the input). A bucket is a range of keys that fits into memory, so sorting each bucket and writing one after the other
sorts everything. Both passes are sequential: two reads and two writes of the text in all, one of each where the text
fits into memory.

*Uniform.* Let the keys be independent and uniform. Then they are exchangeable: any assignment of n distinct keys to the
n lines is as likely as any other, so each of the n! orders has the same probability, and each can occur. How the range
of keys is cut into buckets changes nothing, because the result is the sorted order whatever the buckets are. Equal keys
keep the input's order; a billion lines hold a pair of them with a probability of 3 % (n^2 / 2^65), and then only that
pair is not shuffled. The keys are the stream of NumPy's Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC'11), a keyed counter-based generator: line i of the input gets its word i. Its 128-bit key is hashed
from the seed, so what seeds can draw in practice are 2^128 orders, as with every pseudo-random shuffle.

*Reproducible.* The key of a line depends on the seed and on its number in the input, and on nothing else. So the output
is the same bytes for any memory size, and for compressed input the same as for plain.

*A merge in proportion.* Shuffling several files together is the merge of them at random in proportion to their lines:
among any k consecutive output lines, each input is expected with its share of all lines. Other proportions are the
business of the blend at training time (``sampling/blend.py``), which repeats and cuts sources without another copy.

Lines are bytes and are never parsed. They must not be empty and must end in a line break.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError, DiskError
from megatron_hammer.base.files import open_alone, sync_folder
from megatron_hammer.base.progress import Progress
from megatron_hammer.corpus.jsonl import MAX_LINE_BYTES
from megatron_hammer.corpus.stream import SourceStream, StreamDamage, check_file, is_compressed, open_stream

MIN_MEMORY_BYTES = 16 << 20
"""Below this the interpreter and NumPy need more than the shuffle does."""
DEFAULT_MEMORY_BYTES = 1_000_000_000
MAX_BUCKET_BITS = 12
"""4,096 buckets: beyond it the pieces written at once get small. A bucket that is too large is scattered once more."""

_LINE_OVERHEAD = 64  # bytes of memory for a line beside its text: key, start, end, order, their copies while sorting
_EXPECTED_COMPRESSION = 4  # only chooses the number of buckets: what is too large is scattered again
_SCAN_BYTES = 1 << 20  # searched for line breaks at once: stays in the cache
_LINES_BETWEEN_FLUSHES = 1 << 14  # of documents of 3 KB: 50 MB
_VIEWS_AT_ONCE = 1024  # Linux's limit for one writev
_CHUNK = struct.Struct("<QQ")  # of a bucket file: lines, bytes of text; then u64 keys, u32 lengths, the text
_LINE_BREAK, _CARRIAGE_RETURN = 10, 13


@dataclass(frozen=True)
class ShuffleSummary:
    """What was done."""

    output: Path
    lines: int
    bytes: int
    seed: int
    buckets: int
    """0: all was held in memory, without temporary files."""
    seconds: float

    def __str__(self) -> str:
        way = f"{self.buckets:,} buckets on disk" if self.buckets else "in memory"
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        return (
            f"{self.output}: {self.lines:,} lines, {self.bytes / 1e6:,.1f} MB, seed {self.seed}, {way}, "
            f"{self.seconds:,.1f} s: {rate:,.0f} MB/s"
        )


def shuffle_lines(
    inputs: Sequence[str | Path],
    output: str | Path,
    seed: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    temporary: str | Path | None = None,
) -> ShuffleSummary:
    """Write the lines of all inputs in random order.

    Args:
        inputs: plain, .gz or .zst files; each may be named once.
        output: a plain file, which appears under its name when it is complete. It may be one of the inputs.
        seed: any integer; the order is a function of the seed and of the lines' numbers.
        memory_bytes: what the process may use, a few times the longest line on top; the result does not depend on it.
        temporary: a folder for the buckets, which take as much disk as the uncompressed text (default: the output's).

    Raises:
        ConfigError: E287 too little memory, E288 bad output or an input named twice.
        DataError: E301, E302, E305, E309 as ``jsonl.py``; E304 a line beyond its limit; E362 a last line without a line
            break; E363 another process writes this output.
        DiskError: E601 the disk has too little room.
    """
    with Shuffle(inputs, output, seed, memory_bytes, temporary) as shuffle:
        shuffle.scatter()
        return shuffle.gather()


class Shuffle:
    """The two passes, apart, for those who measure them; ``shuffle_lines`` has the arguments and errors."""

    def __init__(
        self,
        inputs: Sequence[str | Path],
        output: str | Path,
        seed: int,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        temporary: str | Path | None = None,
    ) -> None:
        self.inputs = [Path(path) for path in inputs]
        self.output, self.seed = Path(output), seed
        if memory_bytes < MIN_MEMORY_BYTES:
            raise ConfigError(87, f"--memory-mb={memory_bytes / 1e6:g}", "is too little to work with",
                              f"give {MIN_MEMORY_BYTES / 1e6:.0f} or more")  # fmt: skip
        _check_names(self.inputs, self.output)
        sizes = _check_inputs(self.inputs)
        self.plain = not any(map(is_compressed, self.inputs))
        self.total_bytes = sum(sizes)  # of text; an estimate where compressed
        if not self.plain:
            self.total_bytes *= _EXPECTED_COMPRESSION
        # At its peak a pass holds two blocks (or buckets): one that is read, one that is written.
        self.block_bytes = memory_bytes // 4
        self.bucket_weight = memory_bytes * 3 // 8
        self.segment_lines = max(memory_bytes // 8 // _LINE_OVERHEAD, 1)
        if self.plain and self.total_bytes <= memory_bytes // 2:
            self.block_bytes = self.total_bytes + 1  # one block, held until it is written
        self.buckets = 0
        """Bucket files made."""
        self.lines = self.bytes = 0
        self._keys = np.random.Philox(key=int.from_bytes(_digest(seed), "little"))
        self._lines_before = 0  # in the blocks before, of the file with which the block begins
        self._published = False
        self._whole: _Lines | None = None
        self._top: list[_Bucket] = []
        parent = self.output.parent if temporary is None else Path(temporary)
        # The names are the output's own, so that the next run finds what a killed one left.
        place = hashlib.blake2b(os.fsencode(self.output.absolute()), digest_size=4).hexdigest()
        self.folder = parent / f"{self.output.name}.{place}.buckets"
        self._result = self.output.with_name(f"{self.output.name}.shuffle.tmp")
        self._started = time.monotonic()
        self._reading = ThreadPoolExecutor(1, "reader")
        self._progress = Progress(f"shuffling into {self.output.name}", 2 * self.total_bytes if self.plain else None)

    def __enter__(self) -> Shuffle:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = _open_locked(self._result)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.iterdir():  # of a run that was killed
                left.unlink()
            self._check_room()
        except BaseException:
            self._clean_up()
            raise
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        self._clean_up()

    def _clean_up(self) -> None:
        self._reading.shutdown(cancel_futures=True)
        self._whole = None
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self._published:  # else the name may be another run's already
            self._result.unlink(missing_ok=True)
        os.close(self._descriptor)  # gives up the lock

    def _check_room(self) -> None:
        if not self.plain:
            return  # what is needed is not known
        places = [(self.output.parent, "the output")]
        if self.block_bytes <= self.total_bytes:
            places.append((self.folder, "the buckets"))
        for folder, what in places:
            free = shutil.disk_usage(folder).free
            # Buckets are removed as the output grows: one disk for both has to hold the text little more than once.
            if free < self.total_bytes * 1.02:
                raise DiskError(
                    1, str(folder), f"has {free / 1e9:,.1f} GB free, and {what} need {self.total_bytes / 1e9:,.1f} GB",
                    "free space, or name another disk (--temporary for the buckets)",
                )  # fmt: skip

    # ---- first pass ----

    def scatter(self) -> None:
        """Read everything once; afterwards all lines are in buckets, or in memory."""
        bits = 0
        while bits < MAX_BUCKET_BITS and self.total_bytes > 0.7 * self.bucket_weight * (1 << bits):
            bits += 1  # 0.7: buckets differ in size, few of them should need another pass
        reader = _BlockReader(self.inputs)
        buckets = _Buckets(self.folder, "", bits)
        ahead = self._reading.submit(reader.fill, bytearray(self.block_bytes))
        try:
            spare = bytearray(0)
            while True:
                block = ahead.result()
                if not reader.finished:
                    spare = spare if len(spare) == self.block_bytes else bytearray(self.block_bytes)
                    ahead = self._reading.submit(reader.fill, spare)
                for lines in self._lines_of(block):
                    if reader.finished and self.lines == 0 and lines.bytes == block.used:
                        self._whole = lines
                    else:
                        buckets.add(lines)
                    self.lines += len(lines.keys)
                    self.bytes += lines.bytes
                    self._progress.advance(lines.bytes)
                if block.last:
                    break
                spare = block.buffer
        finally:
            if not ahead.cancel():
                ahead.exception()  # waits until it has ended, well or not
            reader.close_stream()
        if self.lines == 0:
            raise DataError(2, ", ".join(map(str, self.inputs)), "holds no line", "give files with a document a line")
        self._top = buckets.finish()
        self.buckets += len(self._top)

    def _lines_of(self, block: _Block) -> Iterator[_Lines]:
        """The lines of a block with their keys, so many at once that their arrays stay small."""
        start = of_last_file = 0
        last = block.files[-1]
        for ends in _line_ends(block.buffer, block.used, self.segment_lines):
            starts = np.concatenate([[start], ends[:-1]])
            _check_lines(block, starts, ends, self._lines_before)
            start = int(ends[-1])
            of_last_file += len(ends) - int(np.searchsorted(ends, last.offset, side="right"))
            yield _Lines(block.buffer, starts, ends, self._keys.random_raw(len(ends)))
        self._lines_before = of_last_file + (self._lines_before if last.continued else 0)

    # ---- second pass ----

    def gather(self) -> ShuffleSummary:
        """Write the output and publish it."""
        descriptor, written = self._descriptor, 0
        for lines in self._sorted_parts():
            order = np.argsort(lines.keys, kind="stable")
            for first in range(0, len(order), _LINES_BETWEEN_FLUSHES):
                count = lines.write(descriptor, order[first : first + _LINES_BETWEEN_FLUSHES])
                # Linux then begins to write these pages out, instead of letting gigabytes wait for the fsync.
                os.posix_fadvise(descriptor, written, count, os.POSIX_FADV_DONTNEED)
                written += count
                self._progress.advance(count)
        os.fsync(descriptor)
        os.replace(self._result, self.output)
        self._published = True
        sync_folder(self.output.parent)
        seconds = time.monotonic() - self._started
        return ShuffleSummary(self.output, self.lines, self.bytes, self.seed, self.buckets, seconds)

    def _sorted_parts(self) -> Iterator[_Lines]:
        """Parts of the corpus by rising ranges of keys; the next is read while one is in use."""
        if self._whole is not None:
            yield self._whole
            return
        fitting = self._fitting(self._top)
        spare = bytearray(0)
        ahead = self._reading.submit(next(fitting).read, spare)
        for following in fitting:
            lines = ahead.result()
            ahead = self._reading.submit(following.read, spare)
            yield lines
            spare = lines.buffer  # memory that is mapped already is quicker than fresh memory
            del lines
        yield ahead.result()

    def _fitting(self, buckets: list[_Bucket]) -> Iterator[_Bucket]:
        """The buckets in order, those that do not fit into memory replaced by smaller ones."""
        for bucket in buckets:
            if bucket.weight <= self.bucket_weight or bucket.lines == 1 or bucket.bits >= 64 - 1:
                yield bucket
                continue
            bits = 1
            while bits < MAX_BUCKET_BITS and bucket.weight > 0.7 * self.bucket_weight * (1 << bits):
                bits += 1
            parts = _Buckets(self.folder, f"{bucket.path.name}-", min(bits, 64 - bucket.bits), bucket.bits)
            for lines in bucket.chunks():
                parts.add(lines)
            bucket.path.unlink()
            made = parts.finish()
            self.buckets += len(made) - 1
            yield from self._fitting(made)


def _open_locked(path: Path) -> int:
    """A new file that only one process may write, in place of what a killed one left."""
    descriptor = open_alone(path)
    if descriptor is None:
        raise DataError(63, str(path), "is being written by another process", "wait for it, or name another output")
    os.ftruncate(descriptor, 0)
    return descriptor


def _digest(seed: int) -> bytes:
    """16 bytes for the generator's key."""
    return hashlib.blake2b(f"megatron_hammer shuffle {seed}".encode(), digest_size=16).digest()


def _check_names(inputs: list[Path], output: Path) -> None:
    if is_compressed(output):
        raise ConfigError(88, f"--output {output}", "must be a plain file", "compress it afterwards")
    if output.is_dir():
        raise ConfigError(88, f"--output {output}", "is a folder", "name a file")
    seen = set()
    for path in inputs:
        if path in seen:
            raise ConfigError(88, str(path), "is named twice", "name every input once")
        seen.add(path)


def _check_inputs(inputs: list[Path]) -> list[int]:
    """Their sizes; what is wrong with a plain file's end is found here, not after an hour."""
    sizes = []
    for path in inputs:
        check_file(path)
        sizes.append(os.stat(path).st_size)
        if sizes[-1] and not is_compressed(path):
            with open(path, "rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    raise _no_line_break(path)
    return sizes


def _no_line_break(path: Path) -> DataError:
    return DataError(
        62, str(path), "does not end in a line break: its last line may be cut off",
        f"look at the line (tail -n 1), and if it is whole: echo >> {path.name}",
    )  # fmt: skip


# ---- lines in memory ----


class _Lines(NamedTuple):
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


def _line_ends(buffer: bytearray, used: int, limit: int) -> Iterator[np.ndarray]:
    """int64 positions behind the line breaks in ``buffer[:used]``, in arrays of about ``limit``."""
    found, count = [], 0
    content = np.frombuffer(buffer, np.uint8, used)
    for first in range(0, used, _SCAN_BYTES):
        ends = np.flatnonzero(content[first : first + _SCAN_BYTES] == _LINE_BREAK) + (first + 1)
        found.append(ends)
        count += len(ends)
        if count >= limit:
            yield np.concatenate(found)
            found, count = [], 0
    if count:
        yield np.concatenate(found)


def _check_lines(block: _Block, starts: np.ndarray, ends: np.ndarray, lines_before: int) -> None:
    """Refuse empty lines."""
    lengths = ends - starts
    if int(lengths.min()) > 2:
        return
    content = np.frombuffer(block.buffer, np.uint8)
    empty = (lengths == 1) | ((lengths == 2) & (content[starts] == _CARRIAGE_RETURN))
    if empty.any():
        where = block.locate(int(starts[np.argmax(empty)]), lines_before)
        raise DataError(5, where, "is a blank line", "remove it: every line must be a document")


# ---- reading the input ----


class _FileStart(NamedTuple):
    offset: int
    """In the block."""
    path: Path
    continued: bool
    """Whether the file began in a block before."""


class _Block(NamedTuple):
    """Whole lines, of one file or several."""

    buffer: bytearray
    used: int
    files: list[_FileStart]
    last: bool

    def locate(self, offset: int, lines_before: int) -> str:
        """``file:line`` of the line that begins at ``offset``."""
        file = [start for start in self.files if start.offset <= offset][-1]
        before = lines_before if file.continued else 0
        return f"{file.path}:{before + self.buffer.count(_LINE_BREAK, file.offset, offset) + 1}"


class _BlockReader:
    """Fills buffers with whole lines of the inputs, one after the other. Its ``fill`` runs in a thread."""

    def __init__(self, paths: list[Path]) -> None:
        self.finished = False
        self._waiting = list(reversed(paths))
        self._carry = b""  # the beginning of a line that did not fit into the buffer before
        self._stream: SourceStream | None = None
        self._path = Path()
        self._read_bytes = 0  # of the uncompressed file

    def fill(self, buffer: bytearray) -> _Block:
        """Fill ``buffer``, or a larger one where a line does not fit."""
        used = len(self._carry)
        if used > len(buffer):
            buffer = bytearray(2 * used)
        buffer[:used] = self._carry
        files = [_FileStart(0, self._path, True)] if self._stream is not None else []
        searched = used  # no line break before
        while True:
            if self._stream is None:
                if not self._waiting:
                    self.finished = True
                    return _Block(buffer, used, files, last=True)
                self._open_next()
                files.append(_FileStart(used, self._path, False))
            if used == len(buffer):
                if end := buffer.rfind(b"\n", searched) + 1:
                    self._carry = bytes(memoryview(buffer)[end:])
                    return _Block(buffer, end, files, last=False)
                searched = used
                buffer = self._grown(buffer)
            if (count := self._read_into(buffer, used)) == 0:
                if used and buffer[used - 1] != _LINE_BREAK:
                    raise _no_line_break(self._path)
                self.close_stream()
            used += count

    def _grown(self, buffer: bytearray) -> bytearray:
        """Twice the room, for a line that is longer than a block."""
        if len(buffer) > MAX_LINE_BYTES:
            raise DataError(4, f"{self._path}: the line before byte {self._read_bytes:,}",
                            f"is longer than {MAX_LINE_BYTES:,} bytes", "put one document on each line")  # fmt: skip
        larger = bytearray(2 * len(buffer))
        larger[: len(buffer)] = buffer
        return larger

    def _read_into(self, buffer: bytearray, used: int) -> int:
        assert self._stream is not None
        try:
            count = self._stream.readinto(memoryview(buffer)[used:])
        except StreamDamage as error:
            raise DataError(9, f"{self._path}: byte {self._read_bytes:,} of its text",
                            f"could not be decompressed ({error})", "fetch or compress it again") from None  # fmt: skip
        self._read_bytes += count
        return count

    def _open_next(self) -> None:
        self._path = self._waiting.pop()
        self._stream = open_stream(self._path)
        self._read_bytes = 0

    def close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None


# ---- buckets on disk ----


@dataclass
class _Bucket:
    """A file with the lines of one range of keys, in chunks."""

    path: Path
    bits: int
    """Leading bits of the key that all its lines share."""
    lines: int = 0
    bytes: int = 0

    @property
    def weight(self) -> int:
        """Memory that it takes to sort it."""
        return self.bytes + _LINE_OVERHEAD * self.lines

    def read(self, buffer: bytearray) -> _Lines:
        """All of it, in the order of the input, in ``buffer`` if that is large enough; the file is removed."""
        keys = np.empty(self.lines, np.uint64)
        lengths = np.empty(self.lines, np.uint32)
        if len(buffer) < self.bytes:
            buffer = bytearray(self.bytes * 9 // 8)  # room for the next ones, of about the same size
        lines = used = 0
        with open(self.path, "rb", buffering=0) as file:
            while lines < self.lines:
                count, size = _CHUNK.unpack(file.read(_CHUNK.size))
                _read_exactly(file, keys[lines : lines + count])
                _read_exactly(file, lengths[lines : lines + count])
                _read_exactly(file, memoryview(buffer)[used : used + size])
                lines += count
                used += size
        self.path.unlink()
        ends = np.cumsum(lengths, dtype=np.int64)
        return _Lines(buffer, ends - lengths, ends, keys)

    def chunks(self) -> Iterator[_Lines]:
        """One chunk after the other, as they were written."""
        with open(self.path, "rb", buffering=0) as file:
            while header := file.read(_CHUNK.size):
                count, size = _CHUNK.unpack(header)
                keys, lengths, buffer = np.empty(count, np.uint64), np.empty(count, np.uint32), bytearray(size)
                for part in (keys, lengths, buffer):
                    _read_exactly(file, part)
                ends = np.cumsum(lengths, dtype=np.int64)
                yield _Lines(buffer, ends - lengths, ends, keys)


def _read_exactly(file: BinaryIO, target: Any) -> None:
    """Fill an array or buffer."""
    view = memoryview(target).cast("B")
    while len(view):
        count = file.readinto(view)  # type: ignore[attr-defined]
        assert count, f"{file.name} is shorter than it was when it was written"
        view = view[count:]


class _Buckets:
    """Distributes lines over the buckets of the next ``bits`` bits of their keys."""

    def __init__(self, folder: Path, prefix: str, bits: int, used_bits: int = 0) -> None:
        self._shift = np.uint64(64 - used_bits - bits)
        self._mask = np.uint64((1 << bits) - 1)
        self._buckets = [_Bucket(folder / f"{prefix}{n:04d}", used_bits + bits) for n in range(1 << bits)]

    def add(self, lines: _Lines) -> None:
        """Append lines to their buckets, in the order they have."""
        if len(self._buckets) == 1:  # a shift by 64 bits is not defined
            numbers = np.zeros(len(lines.keys), np.uint16)
        else:
            numbers = ((lines.keys >> self._shift) & self._mask).astype(np.uint16)
        order = np.argsort(numbers, kind="stable")  # of 16 bits: a radix sort
        bounds = np.cumsum(np.bincount(numbers, minlength=len(self._buckets))).tolist()
        start = 0
        for bucket, end in zip(self._buckets, bounds):
            if end > start:
                self._append(bucket, lines, order[start:end])
            start = end

    def _append(self, bucket: _Bucket, lines: _Lines, order: np.ndarray) -> None:
        lengths = lines.ends[order] - lines.starts[order]
        size = int(lengths.sum())
        # Opened each time: there may be more buckets than a process may have files open.
        descriptor = os.open(bucket.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            header = _CHUNK.pack(len(order), size) + lines.keys[order].tobytes() + lengths.astype(np.uint32).tobytes()
            _write_all(descriptor, [memoryview(header)])
            lines.write(descriptor, order)
        finally:
            os.close(descriptor)
        bucket.lines += len(order)
        bucket.bytes += size

    def finish(self) -> list[_Bucket]:
        """Those that hold something, by rising keys."""
        return [bucket for bucket in self._buckets if bucket.lines]
