"""The stage between reading and writing: order, errors in turn, bounded memory, and an end on demand."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_hammer.dataset.make import encoding


@dataclass
class Numbered:
    """As much of a block, and of what it becomes, as this stage asks for."""

    number: int
    text_bytes: int = 1

    @property
    def block(self) -> Numbered:
        return self


Blocks = Generator[Numbered, None, None]
Encode = Callable[..., Generator[Any, None, None]]


@pytest.fixture
def encode(monkeypatch: pytest.MonkeyPatch) -> Encode:
    """``encode_blocks`` with another work for a block, and other room for them."""

    def begin(
        blocks: Blocks, work: Callable[[int], int], workers: int, room: int, stop: threading.Event | None = None
    ) -> Generator[Any, None, None]:
        monkeypatch.setattr(encoding, "encode_block", lambda job, block, threads: replaced(block, work))
        monkeypatch.setattr(encoding, "_ROOM_BLOCKS", 0)
        monkeypatch.setattr(encoding.file_blocks, "BLOCK_BYTES", room / workers)
        job: Any = SimpleNamespace(tokenizer=SimpleNamespace(encoder="C++"))
        given: Any = blocks
        return encoding.encode_blocks(job, given, workers, stop)

    def replaced(block: Numbered, work: Callable[[int], int]) -> Numbered:
        return Numbered(work(block.number), block.text_bytes)

    return begin


def blocks_of(count: int) -> Blocks:
    yield from map(Numbered, range(count))


def same(number: int) -> int:
    return number


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize("room", [1, 5, 1000])
def test_results_keep_the_order_of_the_blocks(workers: int, room: int, encode: Encode) -> None:
    rng = random.Random(workers)
    pauses = [rng.random() / 2000 for _ in range(100)]

    def work(number: int) -> int:
        time.sleep(pauses[number])
        return number * number

    found = [item.number for item in encode(blocks_of(100), work, workers, room)]
    assert found == [k * k for k in range(100)]
    assert list(encode(blocks_of(0), work, workers, room)) == []


def test_no_more_is_read_than_there_is_room_for(encode: Encode) -> None:
    read, done, most = 0, 0, 0

    def blocks() -> Blocks:
        nonlocal read, most
        for k in range(200):
            read += 1
            most = max(most, read - done)
            yield Numbered(k, 100 if k == 50 else 3)

    for _ in encode(blocks(), same, 4, 12):
        done += 1
        assert most <= 5  # four of 3, and the one in the reader's hand
    assert done == 200


def test_an_error_comes_in_its_turn_and_ends_everything(encode: Encode) -> None:
    closed = threading.Event()

    def blocks() -> Blocks:
        try:
            yield from blocks_of(10)
            raise KeyError("while reading")
        finally:
            closed.set()

    got = []
    with pytest.raises(KeyError, match="while reading"):
        got.extend(encode(blocks(), same, 3, 4))
    assert closed.is_set()

    def work(number: int) -> int:
        if number in (4, 7):
            raise ValueError(f"block {number}")
        return number

    for _ in range(20):
        found = []
        with pytest.raises(ValueError, match="block 4"):
            for item in encode(blocks_of(10), work, 3, 100):
                found.append(item.number)
        assert found == [0, 1, 2, 3]


def test_it_ends_when_it_is_closed_or_told_to_stop(encode: Encode) -> None:
    def endless() -> Blocks:
        while True:
            yield Numbered(1)

    stream = encode(endless(), same, 2, 3)
    next(stream)
    stream.close()
    stop = threading.Event()
    count = 0
    for _ in encode(endless(), same, 2, 3, stop):
        count += 1
        if count == 5:
            stop.set()
    assert count == 5

    def never() -> Blocks:
        yield Numbered(1)
        time.sleep(0.1)
        stop.set()  # while the caller waits
        ended.wait(5)
        yield Numbered(2)  # too late

    stop.clear()
    ended = threading.Event()
    timer = threading.Timer(0.5, ended.set)
    timer.start()
    assert [item.number for item in encode(never(), same, 1, 9, stop)] in ([1], [])
    timer.join()
