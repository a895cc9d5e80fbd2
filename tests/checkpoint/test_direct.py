"""Bytes past the page cache: the same as through it, whatever the sizes, the file system and the disk's moods."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from megatron_hammer.checkpoint import direct
from megatron_hammer.checkpoint.direct import ALIGNMENT, DirectReader, DirectWriter
from megatron_hammer.checkpoint.one_pass import OnePass

BLOCK = 4 * ALIGNMENT


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that a test of a few hundred KiB has many blocks."""
    monkeypatch.setattr(direct, "WRITE_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(direct, "READ_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(direct, "SMALL_BYTES", 64)


@pytest.fixture(params=["direct", "without O_DIRECT"])
def either(request, monkeypatch):
    """Both with O_DIRECT and as on a file system that has none."""
    if request.param != "direct":
        monkeypatch.setattr(direct, "set_direct", lambda descriptor, wanted=True: False)
        opening = os.open

        def refuse(path, flags, *mode, **more):
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no O_DIRECT here")
            return opening(path, flags, *mode, **more)

        monkeypatch.setattr(os, "open", refuse)


def write(path: Path, content: bytes, sizes: list[int]) -> None:
    writer, at, whole = DirectWriter(path), 0, False
    try:
        for size in sizes:
            writer.write(content[at : at + size], OnePass())
            at += size
        writer.write(content[at:], OnePass())
        whole = True
    finally:
        writer.close(whole)


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize(
    "size", [0, 1, ALIGNMENT - 1, ALIGNMENT, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 9 * BLOCK + 77]
)
def test_a_file_has_the_bytes_and_the_length_that_were_written(tmp_path, either, size):
    content = random.Random(size).randbytes(size)
    write(tmp_path / "file", content, [1, 100, BLOCK, 3 * BLOCK + 5])
    assert (tmp_path / "file").read_bytes() == content


def test_what_is_written_is_taken_at_once(tmp_path):
    """The caller may change its buffer as soon as ``write`` returns, while the thread is still writing."""
    writer, buffer, expected = DirectWriter(tmp_path / "file"), bytearray(BLOCK), b""
    for k in range(1, 20):
        buffer[:] = bytes([k]) * BLOCK
        writer.write(buffer, OnePass())
        expected += bytes(buffer)
    writer.close(whole=True)
    assert (tmp_path / "file").read_bytes() == expected


def test_an_existing_file_is_not_written_over(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        DirectWriter(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_short_writes_go_on_where_they_stopped(tmp_path, monkeypatch):
    """At a multiple of the alignment, or O_DIRECT would refuse the rest."""
    original, calls = os.pwrite, []

    def short(descriptor, data, offset):
        calls.append(offset)
        part = max(ALIGNMENT + 1, len(data) // 2) if len(calls) % 2 else len(data)
        return original(descriptor, data[: part - part % ALIGNMENT], offset) + (1 if part < len(data) else 0)

    monkeypatch.setattr(os, "pwrite", short)
    content = random.Random(0).randbytes(5 * BLOCK + 9)
    write(tmp_path / "file", content, [])
    assert (tmp_path / "file").read_bytes() == content and all(c % ALIGNMENT == 0 for c in calls) and len(calls) > 6


@pytest.mark.parametrize("call", [1, 3, 6])
def test_an_error_of_the_disk_reaches_the_caller(tmp_path, monkeypatch, call):
    original, calls = os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", bytes(5 * BLOCK + 9), [])


def test_a_disk_that_takes_nothing_is_an_error_and_no_endless_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OSError, match="takes no more bytes"):
        write(tmp_path / "file", bytes(BLOCK), [])


def test_a_disk_of_larger_blocks_is_written_and_read_through_the_cache(tmp_path, monkeypatch):
    """It refuses our alignment with EINVAL."""
    content = random.Random(1).randbytes(4 * BLOCK + 3)
    for name in ("pwrite", "preadv"):
        original = getattr(os, name)

        def refuse(descriptor, *rest, original=original):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            return original(descriptor, *rest)

        monkeypatch.setattr(os, name, refuse)
    write(tmp_path / "file", content, [])
    drop_from_cache(tmp_path / "file")
    assert read(tmp_path / "file", [(0, len(content))]) == [content]


def read(path: Path, ranges: list[tuple[int, int]]) -> list[bytes]:
    with open(path, "rb") as file:
        reader, found = DirectReader(file.fileno(), path.stat().st_size), []
        try:
            for start, size in ranges:
                found.append(b"".join(map(bytes, reader.parts(start, size))))
        finally:
            reader.close()
        return found


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "on disk"])
@pytest.mark.parametrize("order", ["ascending", "with small jumps", "any"])
def test_reads_give_what_is_there_in_any_order(tmp_path, either, cached, order):
    chance = random.Random(order)
    content = chance.randbytes(30 * BLOCK + 1234)
    (tmp_path / "file").write_bytes(content)
    ranges, at = [], 0
    while at < len(content):
        size = chance.choice([1, 60, 500, BLOCK // 3, BLOCK, 4 * BLOCK])
        ranges.append((at, min(size, len(content) - at)))
        at += size + (chance.choice([0, 8, 64, 65]) if order == "with small jumps" else 0)
    if order == "any":
        chance.shuffle(ranges)
    if not cached:
        drop_from_cache(tmp_path / "file")
    assert read(tmp_path / "file", ranges) == [content[a : a + n] for a, n in ranges]


def test_a_file_that_was_read_to_its_end_takes_no_memory_and_can_be_read_again(tmp_path):
    content = random.Random(3).randbytes(5 * BLOCK + 7)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        reader, descriptors = DirectReader(file.fileno(), len(content)), set(os.listdir("/proc/self/fd"))
        for _ in range(2):
            assert b"".join(map(bytes, reader.parts(0, 3 * BLOCK))) == content[: 3 * BLOCK] and reader._blocks
            assert b"".join(map(bytes, reader.parts(3 * BLOCK, 3 * BLOCK))) == content[3 * BLOCK :]
            assert not reader._blocks and not reader._memory and set(os.listdir("/proc/self/fd")) == descriptors
        reader.close()


def test_reads_past_the_end_are_short(tmp_path, either):
    content = random.Random(2).randbytes(BLOCK + 10)
    (tmp_path / "file").write_bytes(content)
    assert read(tmp_path / "file", [(0, 2 * BLOCK), (BLOCK + 4, BLOCK), (3 * BLOCK, BLOCK), (BLOCK + 9, 8)]) == [
        content, content[BLOCK + 4 :], b"", content[-1:],
    ]  # fmt: skip


def test_a_file_cut_while_it_is_read_is_short_and_no_crash(tmp_path):
    """A mapped page beyond the end would end the process with SIGBUS."""
    content = bytes(8 * BLOCK)
    (tmp_path / "file").write_bytes(content)
    with open(tmp_path / "file", "rb") as file:
        reader = DirectReader(file.fileno(), len(content))
        assert sum(map(len, reader.parts(0, BLOCK))) == BLOCK
        os.truncate(tmp_path / "file", BLOCK)
        assert sum(map(len, reader.parts(5 * BLOCK, BLOCK))) == 0
        reader.close()


def test_a_cached_file_is_read_from_the_cache_and_another_past_it(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * BLOCK))
    used = set()
    original = os.preadv
    monkeypatch.setattr(
        os, "preadv",
        lambda d, *rest: used.add(bool(fcntl.fcntl(d, fcntl.F_GETFL) & os.O_DIRECT)) or original(d, *rest),
    )  # fmt: skip
    path.read_bytes()
    read(path, [(0, 4 * BLOCK)])
    assert used == {False}
    drop_from_cache(path)
    with open(path, "rb") as file:
        if direct._is_resident(file.fileno(), 0, BLOCK):
            pytest.skip("this file system keeps its files in memory")
        if not direct.set_direct(file.fileno()):
            pytest.skip("this file system has no O_DIRECT")
    used.clear()
    read(path, [(0, 4 * BLOCK)])
    assert used == {True}
