"""The stage between reading and writing: order, errors in turn, bounded memory, and an end on demand."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Generator, Iterator

import pytest

from megatron_hammer.dataset.make.encoding import in_order


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("workers", [1, 3, 16])
@pytest.mark.parametrize("room", [1, 5, 1000])
def test_results_keep_the_order_of_the_items(workers: int, room: int) -> None:
    rng = random.Random(workers)
    pauses = [rng.random() / 2000 for _ in range(100)]

    def work(item: int) -> int:
        time.sleep(pauses[item])
        return item * item

    assert list(in_order((k for k in range(100)), work, workers, lambda item: 1, room)) == [k * k for k in range(100)]
    assert list(in_order((k for k in ()), work, workers, lambda item: 1, room)) == []


def test_no_more_is_drawn_than_there_is_room_for() -> None:
    drawn, done, most = 0, 0, 0

    def items() -> Generator[int, None, None]:
        nonlocal drawn, most
        for k in range(200):
            drawn += 1
            most = max(most, drawn - done)
            yield 100 if k == 50 else 3

    for _ in in_order(items(), lambda item: item, 4, lambda item: item, 12):
        done += 1
        assert most <= 5  # four of 3, and the one in the reader's hand
    assert done == 200


def test_an_error_comes_in_its_turn_and_ends_everything() -> None:
    closed = threading.Event()

    def items() -> Generator[int, None, None]:
        try:
            yield from range(10)
            raise KeyError("while reading")
        finally:
            closed.set()

    got = []
    with pytest.raises(KeyError, match="while reading"):
        got.extend(in_order(items(), lambda item: item, 3, lambda item: 1, 4))
    assert closed.is_set()

    def work(item: int) -> int:
        if item in (4, 7):
            raise ValueError(f"item {item}")
        return item

    for _ in range(20):
        found = []
        with pytest.raises(ValueError, match="item 4"):
            for result in in_order((k for k in range(10)), work, 3, lambda item: 1, 100):
                found.append(result)
        assert found == [0, 1, 2, 3]


def test_it_ends_when_it_is_closed_or_told_to_stop() -> None:
    def endless() -> Generator[int, None, None]:
        while True:
            yield 1

    stream = in_order(endless(), lambda item: item, 2, lambda item: 1, 3)
    next(stream)
    stream.close()
    stop = threading.Event()
    count = 0
    for _ in in_order(endless(), lambda item: item, 2, lambda item: 1, 3, stop):
        count += 1
        if count == 5:
            stop.set()
    assert count == 5

    def never() -> Generator[int, None, None]:
        yield 1
        time.sleep(0.1)
        stop.set()  # while the caller waits
        ended.wait(5)
        yield 2  # too late

    stop.clear()
    ended = threading.Event()
    timer = threading.Timer(0.5, ended.set)
    timer.start()
    assert list(in_order(never(), lambda item: item, 1, lambda item: 1, 9, stop)) in ([1], [])
    timer.join()
