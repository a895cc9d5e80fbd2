"""Pages of a mapping go and come back at their address; closed ones are no memory."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from megatron_hammer.base import pages
from megatron_hammer.base.pages import HUGE, Pages, Spare

pytestmark = pytest.mark.skipif(not pages.HERE, reason="Linux gives pages back at once")


def resident_kib() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_pages_go_and_come_back_at_their_address() -> None:
    size = 64 * 2**20
    room = Pages(size)
    view, before = room.memory, resident_kib()
    assert not room.is_open
    room.open()
    view[::4096] = b"x" * (size // 4096)
    assert resident_kib() - before > 60 * 1024
    room.close()
    assert not room.is_open and resident_kib() - before < 4 * 1024
    room.open()
    assert room.is_open and view[0] == 0 and view[size - 1] == 0
    view[size - 1] = 7
    room.open()  # again
    assert view[size - 1] == 7


def test_pages_of_one_room_serve_the_next() -> None:
    """Written to in turn, three rooms have the memory of one."""
    size, spare = 32 * 2**20, Spare()
    rooms, before = [Pages(size) for _ in range(3)], resident_kib()
    for room in [*rooms, *rooms]:
        room.open(spare)
        room.memory[::4096] = b"x" * (size // 4096)
        room.close(spare)
    assert 28 * 1024 < resident_kib() - before < 40 * 1024


@pytest.mark.parametrize("unit", [4096, HUGE])
def test_who_opens_has_the_pages_of_those_that_closed(unit: int) -> None:
    """In any order, rooms of several sizes: each holds what was written to it, and no more pages than were open."""
    spare, draw = Spare(), random.Random(unit)
    rooms = [Pages(pages * unit) for pages in (3, 5, 3, 8, 1)]
    views = [torch.frombuffer(room.memory, dtype=torch.int64) for room in rooms]
    most = 0
    for mark in range(300):
        room, view = draw.choice(list(zip(rooms, views, strict=True)))
        if room.is_open:
            assert bool((view == view[0]).all())
            room.close(spare)
        else:
            room.open(spare)
            view.fill_(mark)
        now = sum(room.size for room in rooms if room.is_open)
        most = max(most, now)
    assert all(bool((view == view[0]).all()) for room, view in zip(rooms, views, strict=True) if room.is_open)
    assert sum(p.stop - p.start for room in rooms for p in room.pieces if p.filled) == (most if unit == HUGE else now)


def test_small_rooms_do_not_cut_large_ones_into_pages() -> None:
    """A norm's pages among those of layers: each cut would stay, and make others, until there are no ranges left."""
    spare, draw = Spare(), random.Random(1)
    rooms = [Pages(size) for size in (3 * HUGE + 4096, 5 * HUGE, 4096, 3 * HUGE, 12_288, 9 * HUGE)]
    for _ in range(600):
        room = draw.choice(rooms)
        room.close(spare) if room.is_open else room.open(spare)
    assert all(len(room.pieces) <= max(1, room.size // HUGE) for room in rooms)


def test_a_kernel_that_moves_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 5.7: what is left goes back, and who opens gets new ones."""
    monkeypatch.setattr(pages, "_MOVE", 1 | 2 | 64)  # a flag that no kernel knows
    spare, one, other = Spare(), Pages(2 * HUGE), Pages(HUGE)
    one.open(spare)
    one.memory[::4096] = b"x" * (one.size // 4096)
    one.close(spare)
    other.open(spare)
    assert not any(other.memory[::4096])
    one.open(spare)
    halves = one.memory[:HUGE:4096], one.memory[HUGE::4096]
    assert one.is_open and all(set(half) in ({0}, {ord("x")}) for half in halves) and 0 in one.memory[::4096]


def test_closed_memory_is_no_memory() -> None:
    """A read ends the process, in one that was forked for it."""
    room = Pages(4096)
    room.open()
    room.close()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        room.memory[0]
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
