"""Pages of a mapping go and come back at their address; closed ones are no memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_hammer.base import pages
from megatron_hammer.base.pages import Pages

pytestmark = pytest.mark.skipif(not pages.HERE, reason="Linux gives pages back at once")


def resident_kib() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def test_pages_go_and_come_back_at_their_address() -> None:
    size = 64 * 2**20
    room = Pages(size)
    view = room.memory
    before = resident_kib()
    view[::4096] = b"x" * (size // 4096)
    assert resident_kib() - before > 60 * 1024
    room.close()
    assert not room.is_open and resident_kib() - before < 4 * 1024
    room.open()
    assert room.is_open and view[0] == 0 and view[size - 1] == 0
    view[size - 1] = 7
    room.open()  # again
    assert view[size - 1] == 7


def test_closed_memory_is_no_memory() -> None:
    """A read ends the process, in one that was forked for it."""
    room = Pages(4096)
    room.close()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        room.memory[0]
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
