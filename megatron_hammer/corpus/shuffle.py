"""Shuffles the lines of text files of any size with bounded memory: what ``tools/shuffle_corpus.py`` does.

::

    F1 F2 ...  --scatter-->  2^b partitions on disk, by the first b bits of each line's key  --gather-->  OUT
               read, write                                                    read, sort by key, write
               shuffle_input.py, shuffle_partitions.py                        this file

Every line gets a random 64-bit key, and the output is the lines in the order of their keys (the same key: in the order
of the input). A partition is a range of keys that fits into memory, so sorting each partition and writing one after the
other sorts everything. Both passes are sequential: two reads and two writes of the text in all, one of each where the
text fits into memory.

*Uniform.* Let the keys be independent and uniform. Then they are exchangeable: any assignment of n distinct keys to the
n lines is as likely as any other, so each of the n! orders has the same probability, and each can occur. How the range
of keys is cut into partitions changes nothing, because the result is the sorted order whatever the partitions are.
Equal keys keep the input's order; a billion lines hold a pair of them with a probability of 3 % (n^2 / 2^65), and then
only that pair is not shuffled. The keys are the stream of NumPy's Philox4x64-10 (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC'11), a keyed counter-based generator: line i of the input gets its word i. Its 128-bit
key is hashed from the seed, so what seeds can draw in practice are 2^128 orders, as with every pseudo-random shuffle.

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
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError, DiskError
from megatron_hammer.base.files import publish, writing
from megatron_hammer.base.locks import open_alone
from megatron_hammer.base.progress import Progress, size_of
from megatron_hammer.base.reading import open_regular
from megatron_hammer.base.system import begin_to_write_out, sync
from megatron_hammer.corpus.arguments import OnError
from megatron_hammer.corpus.documents import Skipped
from megatron_hammer.corpus.readers import kind_of
from megatron_hammer.corpus.seeds import hash_seed
from megatron_hammer.corpus.shuffle_input import LineBlock, LineReader, check_lines, line_ends, no_line_break
from megatron_hammer.corpus.shuffle_partitions import LINE_OVERHEAD, Lines, Partition, Partitions
from megatron_hammer.corpus.stream import check_file, is_compressed

MIN_MEMORY_BYTES = 16 << 20
"""Below this the interpreter and NumPy need more than the shuffle does."""
DEFAULT_MEMORY_BYTES = 1_000_000_000
MAX_PARTITION_BITS = 12
"""4,096 partitions: beyond it the pieces written at once get small. One that is too large is scattered once more."""

_EXPECTED_COMPRESSION = 4  # only chooses the number of partitions: what is too large is scattered again
_LINES_BETWEEN_FLUSHES = 1 << 14  # of documents of 3 KB: 50 MB


@dataclass(frozen=True)
class ShuffleSummary:
    """What a shuffle has read and written."""

    output: Path
    lines: int
    bytes: int
    seed: int
    partitions: int
    """0: all was held in memory, without temporary files."""
    seconds: float
    skipped: Skipped = field(default_factory=Skipped)

    def __str__(self) -> str:
        way = f"{self.partitions:,} partitions on disk" if self.partitions else "in memory"
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        return (
            f"{self.output}: {self.lines:,} lines, {size_of(self.bytes)}, seed {self.seed}, {way}, "
            f"{self.seconds:,.1f} s: {rate:,.0f} MB/s"
        ) + "".join(f"\n{line}" for line in self.skipped.lines())


def shuffle_lines(
    inputs: Sequence[str | Path],
    output: str | Path,
    seed: int,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    temporary: str | Path | None = None,
    on_error: OnError = "stop",
) -> ShuffleSummary:
    """Write the lines of all inputs in random order.

    Args:
        inputs: plain, .gz or .zst files; each may be named once.
        output: a plain file, which appears under its name when it is complete. It may be one of the inputs.
        seed: any integer; the order is a function of the seed and of the lines' numbers.
        memory_bytes: what the process may use, a few times the longest line on top; the result does not depend on it.
        temporary: a folder for the partitions, which take as much disk as the uncompressed text (default: the
            output's).
        on_error: an empty line, and a last line without a line break, is an error, or left out and counted, or written
            to ``OUT.rejected.jsonl`` too.

    Raises:
        ConfigError: E287 too little memory, E288 bad output or an input named twice.
        DataError: E301, E302, E305, E309 as ``jsonl.py``; E304 a line beyond its limit; E362 a last line without a line
            break; E363 another process writes this output.
        DiskError: E601 the disk has too little room.
    """
    with Shuffle(inputs, output, seed, memory_bytes, temporary, on_error) as shuffle, shuffle.skipped:
        shuffle.scatter()
        return shuffle.gather()


class Shuffle:
    """A shuffle as two passes, ``scatter`` and ``gather``. Arguments and errors are those of ``shuffle_lines``."""

    def __init__(
        self,
        inputs: Sequence[str | Path],
        output: str | Path,
        seed: int,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        temporary: str | Path | None = None,
        on_error: OnError = "stop",
    ) -> None:
        self.inputs = [Path(path) for path in inputs]
        self.output, self.seed = Path(output), seed
        if memory_bytes < MIN_MEMORY_BYTES:
            raise ConfigError(87, f"--memory-mb={memory_bytes / 1e6:g}", "is too little to work with",
                              f"give {MIN_MEMORY_BYTES / 1e6:.0f} or more")  # fmt: skip
        _check_names(self.inputs, self.output)
        sizes = _check_inputs(self.inputs, on_error != "stop")
        self.skipped = Skipped(on_error, self.output.with_name(f"{self.output.name}.rejected.jsonl"))
        self.plain = not any(map(is_compressed, self.inputs))
        self.total_bytes = sum(sizes)  # of text; an estimate where compressed
        if not self.plain:
            self.total_bytes *= _EXPECTED_COMPRESSION
        # At its peak a pass holds two blocks (or partitions): one that is read, one that is written.
        self.block_bytes = memory_bytes // 4
        self.partition_weight = memory_bytes * 3 // 8
        self.segment_lines = max(memory_bytes // 8 // LINE_OVERHEAD, 1)
        if self.plain and self.total_bytes <= memory_bytes // 2:
            self.block_bytes = self.total_bytes + 1  # one block, held until it is written
        self.partitions = 0
        """Partition files made."""
        self.lines = self.bytes = 0
        self._keys = np.random.Philox(key=hash_seed(seed, "shuffle", 16))
        self._lines_before = 0  # in the blocks before, of the file with which the block begins
        self._published = False
        self._whole: Lines | None = None
        self._top: list[Partition] = []
        parent = self.output.parent if temporary is None else Path(temporary)
        # The names are the output's own, so that the next run finds what a killed one left.
        place = hashlib.blake2b(os.fsencode(self.output.absolute()), digest_size=4).hexdigest()
        self.folder = parent / f"{self.output.name}.{place}.partitions"
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
            places.append((self.folder, "the partitions"))
        for folder, what in places:
            free = shutil.disk_usage(folder).free
            # Partitions are removed as the output grows: one disk for both has to hold the text little more than once.
            if free < self.total_bytes * 1.02:
                raise DiskError(
                    1, str(folder), f"has {free / 1e9:,.1f} GB free, and {what} need {self.total_bytes / 1e9:,.1f} GB",
                    "free space, or name another disk (--temporary for the partitions)",
                )  # fmt: skip

    # ---- first pass ----

    def scatter(self) -> None:
        """Read everything once; afterwards all lines are in partitions, or in memory."""
        bits = 0
        while bits < MAX_PARTITION_BITS and self.total_bytes > 0.7 * self.partition_weight * (1 << bits):
            bits += 1  # 0.7: partitions differ in size, few of them should need another pass
        reader = LineReader(self.inputs, self.skipped.on_bad is not None)
        partitions = Partitions(self.folder, "", bits)
        ahead = self._reading.submit(reader.fill, bytearray(self.block_bytes))
        try:
            spare = bytearray(0)
            while True:
                block = ahead.result()
                if not reader.finished:
                    spare = spare if len(spare) == self.block_bytes else bytearray(self.block_bytes)
                    ahead = self._reading.submit(reader.fill, spare)
                for lines in self._lines_of(block):
                    if block.last and self.lines == 0 and lines.bytes == block.used:
                        self._whole = lines
                    else:
                        partitions.add(lines)
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
        self._top = partitions.finish()
        self.partitions += len(self._top)

    def _lines_of(self, block: LineBlock) -> Iterator[Lines]:
        """The lines of a block with their keys, so many at once that their arrays stay small."""
        start = of_last_file = 0
        last = block.files[-1]
        for ends in line_ends(block.buffer, block.used, self.segment_lines):
            starts = np.concatenate([[start], ends[:-1]])
            start = int(ends[-1])
            of_last_file += len(ends) - int(np.searchsorted(ends, last.offset, side="right"))
            starts, ends = check_lines(block, starts, ends, self._lines_before, self.skipped.on_bad)
            if len(ends):
                yield Lines(block.buffer, starts, ends, self._keys.random_raw(len(ends)))
        for rejected in block.cut_off:
            self.skipped.add(rejected)
        self._lines_before = of_last_file + (self._lines_before if last.continued else 0)

    # ---- second pass ----

    def gather(self) -> ShuffleSummary:
        """Write the output and publish it."""
        descriptor, written = self._descriptor, 0
        for lines in self._sorted_parts():
            order = np.argsort(lines.keys, kind="stable")
            for first in range(0, len(order), _LINES_BETWEEN_FLUSHES):
                with writing(self._result, self.bytes):
                    count = lines.write(descriptor, order[first : first + _LINES_BETWEEN_FLUSHES])
                # Linux then begins to write these pages out, instead of letting gigabytes wait for the fsync.
                begin_to_write_out(descriptor, written, count)
                written += count
                self._progress.advance(count)
        with writing(self._result, self.bytes):
            sync(descriptor)
        publish(self._result, self.output)
        self._published = True
        seconds = time.monotonic() - self._started
        return ShuffleSummary(self.output, self.lines, self.bytes, self.seed, self.partitions, seconds, self.skipped)

    def _sorted_parts(self) -> Iterator[Lines]:
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

    def _fitting(self, partitions: list[Partition]) -> Iterator[Partition]:
        """The partitions in order, those that do not fit into memory replaced by smaller ones."""
        for partition in partitions:
            if partition.weight <= self.partition_weight or partition.lines == 1 or partition.bits >= 64 - 1:
                yield partition
                continue
            bits = 1
            while bits < MAX_PARTITION_BITS and partition.weight > 0.7 * self.partition_weight * (1 << bits):
                bits += 1
            parts = Partitions(self.folder, f"{partition.path.name}-", min(bits, 64 - partition.bits), partition.bits)
            for lines in partition.chunks():
                parts.add(lines)
            partition.path.unlink()
            made = parts.finish()
            self.partitions += len(made) - 1
            yield from self._fitting(made)


def _open_locked(path: Path) -> int:
    """A new file that only one process may write, in place of what a killed one left."""
    descriptor = open_alone(path)
    if descriptor is None:
        raise DataError(63, str(path), "is being written by another process", "wait for it, or name another output")
    os.ftruncate(descriptor, 0)
    return descriptor


_NOT_LINES = {"text": "plain text, whose lines are no documents", "parquet": "parquet, whose rows are no lines"}


def _check_names(inputs: list[Path], output: Path) -> None:
    if is_compressed(output):
        raise ConfigError(88, f"--output {output}", "must be a plain file", "compress it afterwards")
    if output.is_dir():
        raise ConfigError(88, f"--output {output}", "is a folder", "name a file")
    seen = set()
    for path in inputs:
        kind = kind_of(path, "text")
        if kind != "jsonl" and kind_of(output, "text") != kind:
            made = f"python tools/reformat_corpus.py {kind} {shlex.quote(str(path))} --output "
            made += shlex.quote(str(path.with_suffix(".jsonl")))
            raise ConfigError(88, str(path), f"is {_NOT_LINES[kind]}", f"turn it into lines first: {made}")
        if path in seen:
            raise ConfigError(88, str(path), "is named twice", "name every input once")
        seen.add(path)


def _check_inputs(inputs: list[Path], lenient: bool) -> list[int]:
    """Their sizes; what is wrong with a plain file's end is found here, not after an hour."""
    sizes = []
    for path in inputs:
        check_file(path)
        sizes.append(os.stat(path).st_size)
        if sizes[-1] and not is_compressed(path) and not lenient:
            with open_regular(path) as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    raise no_line_break(path)
    return sizes
