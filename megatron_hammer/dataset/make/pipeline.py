"""Work on a stream of items in several threads, with the results in the order of the items and memory bounded.

::

    items --one thread--> [waiting] --workers--> [results] --> the caller, in order
                 ^                                                 |
                 +----------- room: bytes not yet done with -------+

Threads and not processes: what the workers call (a parser and an encoder in C) gives up the interpreter's lock where it
takes time, and nothing has to be copied from one process to another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_GLANCE_SECONDS = 0.2  # how long the caller waits before it looks at `stop`


def in_order(
    items: Iterator[T],
    work: Callable[[T], R],
    workers: int,
    size_of: Callable[[T], int],
    room: int,
    stop: threading.Event | None = None,
) -> Generator[R, None, None]:
    """Yield ``work(item)`` of every item, in order.

    Args:
        items: drawn in a thread of its own. An exception of it, or of ``work``, is raised here, in the item's turn.
        size_of: of an item, in the unit of ``room``.
        room: no item is drawn while items of this size in all are drawn and not done with. One that is larger is
            worked on alone.
        stop: when it is set, no more results are given.

    Closing the generator ends the threads; what a worker has begun it finishes first.
    """
    stage = _Stage(items, work, size_of, room)
    threads = [threading.Thread(target=stage.draw, daemon=True)]  # daemon: a second Ctrl-C must not wait for them
    threads += [threading.Thread(target=stage.run, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    try:
        yield from stage.results(stop)
    finally:
        stage.end()
        for thread in threads:
            thread.join()
        if isinstance(items, Generator):
            items.close()


class _Stage(Generic[T, R]):
    """What the threads share; every field is guarded by ``changed``."""

    def __init__(self, items: Iterator[T], work: Callable[[T], R], size_of: Callable[[T], int], room: int) -> None:
        self.items, self.work, self.size_of, self.room = items, work, size_of, room
        self.changed = threading.Condition()
        self.waiting: deque[tuple[int, T, int]] = deque()
        self.done: dict[int, tuple[R | None, int, BaseException | None]] = {}
        self.held = 0
        self.drawn: int | None = None  # items in all, once the last is drawn
        self.ended = False

    def draw(self) -> None:
        number = 0
        error: BaseException | None = None
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.held < self.room or self.ended)
                if self.ended:
                    return
            try:
                item = next(self.items)
            except StopIteration:
                break
            except BaseException as raised:
                error = raised
                break
            size = self.size_of(item)
            with self.changed:
                self.held += size
                self.waiting.append((number, item, size))
                self.changed.notify_all()
            number += 1
            del item
        with self.changed:
            if error is not None:
                self.done[number] = None, 0, error
                number += 1
            self.drawn = number
            self.changed.notify_all()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.ended or self.drawn is not None)
                if self.ended or not self.waiting:
                    return
                number, item, size = self.waiting.popleft()
            result: R | None = None
            error: BaseException | None = None
            try:
                result = self.work(item)
            except BaseException as raised:
                error = raised
            del item
            with self.changed:
                self.done[number] = result, size, error
                self.changed.notify_all()
            del result

    def results(self, stop: threading.Event | None) -> Iterator[R]:
        number = 0
        while stop is None or not stop.is_set():
            with self.changed:
                while number not in self.done and number != self.drawn:
                    if stop is not None and stop.is_set():
                        return
                    self.changed.wait(_GLANCE_SECONDS if stop is not None else None)
                if number == self.drawn:
                    return
                result, size, error = self.done.pop(number)
            if error is not None:
                raise error
            yield result  # type: ignore[misc]
            result = None
            with self.changed:
                self.held -= size
                self.changed.notify_all()
            number += 1

    def end(self) -> None:
        with self.changed:
            self.ended = True
            self.waiting.clear()
            self.changed.notify_all()
