"""Buffers with fixed addresses that share physical pages: a closed buffer gives its pages to the next one that opens.

For large buffers of which few are in use at a time (``optim/buffers.py``). With ``malloc``, blocks of tens of MiB that
come and go leave a heap of which a quarter is free, since glibc does not move blocks. Here each buffer is an anonymous
mapping of its own, and pages move from one to another by ``mremap``, which changes page tables and copies nothing::

    closed, its pages still there     [ a a a a ]                       [         ]
    closed, without pages             [         ]     the other opens   [ a a a a ]

So memory holds only as many pages as were ever open at the same time (huge pages where the kernel has them), and no
page is cleared and faulted in again. Buffers smaller than a huge page, and buffers that share with no others, give
their pages back to the system. If they moved as well, they would cut the large buffers into single pages, each of which
takes a system call to move and is one of the 65,530 mappings that a process may have (``vm.max_map_count``). Linux;
needs no torch.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from dataclasses import dataclass

from megatron_hammer.base.system import IS_LINUX, on_huge_pages
from megatron_hammer.base.system import C as _C

HERE = IS_LINUX
"""Whether this system moves pages, and refuses an access to memory that is closed."""

HUGE = 2 * 2**20
"""Bytes of a huge page: mappings of one and more are of whole ones, which move as one; smaller ones do not move."""

_PROT_NONE = 0
_MOVE = 1 | 2 | 4  # MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP (linux/mman.h)
_C.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
if HERE:
    _C.mremap.restype = ctypes.c_void_p
    _C.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


@dataclass
class _PageRange:
    """A range of a mapping that the kernel keeps as one, or a part of such a one: what can be moved at once."""

    start: int
    stop: int
    filled: bool
    """Whether its pages are here; else they may be elsewhere."""


class Spare:
    """Closed mappings whose pages are still there, for whichever opens next."""

    def __init__(self) -> None:
        self.left: list[Pages] = []
        """The last one was closed last."""

    def fill(self, pages: Pages) -> None:
        """Move as many pages as there are to where a mapping has none."""
        if pages in self.left:
            self.left.remove(pages)
        missing = sum(piece.stop - piece.start for piece in pages.pieces if not piece.filled)
        while missing and self.left:
            giver = next((p for p in reversed(self.left) if p.size == pages.size), self.left[-1])
            missing -= giver.move_to(pages)
            if not any(piece.filled for piece in giver.pieces):
                self.left.remove(giver)


class Pages:
    """Anonymous private memory, closed at first.

    Args:
        size: bytes, above zero.
    """

    def __init__(self, size: int) -> None:
        unit = HUGE if size >= HUGE else mmap.PAGESIZE
        self.size = -(-size // unit) * unit
        self._map = mmap.mmap(-1, self.size + unit, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._skipped = -start % unit
        self._address = start + self._skipped
        on_huge_pages(self._map, self._skipped, self.size)
        self.pieces = [_PageRange(0, self.size, filled=False)]
        self._open = False
        self._protect(_PROT_NONE)

    @property
    def memory(self) -> memoryview:
        """All of it, writable; the mapping lives as long as somebody holds this."""
        return memoryview(self._map)[self._skipped : self._skipped + self.size]

    @property
    def is_open(self) -> bool:
        """Whether it may be read and written."""
        return self._open

    def open(self, spare: Spare | None = None) -> None:
        """Make it readable and writable; what lies there then is undefined."""
        if self._open:
            return
        if spare is not None and self.size >= HUGE:
            spare.fill(self)
        for piece in self.pieces:
            piece.filled = True  # by the first access, where nobody had pages to spare
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        self._open = True

    def close(self, spare: Spare | None = None) -> None:
        """Give its pages up, to ``spare`` or to the system.

        Whoever reads or writes it then ends the process (SIGSEGV), as with a null pointer.
        """
        if not self._open:
            return
        self._protect(_PROT_NONE)
        self._open = False
        if spare is not None and self.size >= HUGE:
            spare.left.append(self)
            return
        self._map.madvise(mmap.MADV_DONTNEED, self._skipped, self.size)
        for piece in self.pieces:
            piece.filled = False

    def move_to(self, other: Pages) -> int:
        """Move a piece, or a part of it, to where the other has no pages: how many bytes have left."""
        mine = next(piece for piece in self.pieces if piece.filled)
        theirs = next(piece for piece in other.pieces if not piece.filled)
        size = min(mine.stop - mine.start, theirs.stop - theirs.start)
        mine, theirs = _first(self.pieces, mine, size), _first(other.pieces, theirs, size)
        target = other._address + theirs.start
        mine.filled, theirs.filled = False, True
        if _C.mremap(self._address + mine.start, size, size, _MOVE, target) != target:
            number = ctypes.get_errno()
            if number != errno.EINVAL:
                raise OSError(number, f"mremap of {size:,} bytes: {os.strerror(number)}")
            self._map.madvise(mmap.MADV_DONTNEED, self._skipped + mine.start, size)  # before Linux 5.7
        return size

    def _protect(self, access: int) -> None:
        if _C.mprotect(self._address, self.size, access) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"mprotect of {self.size:,} bytes: {os.strerror(number)}")


def _first(pieces: list[_PageRange], piece: _PageRange, size: int) -> _PageRange:
    """The first bytes of a piece as one of their own."""
    if size < piece.stop - piece.start:
        cut = piece.start + size
        pieces.insert(pieces.index(piece) + 1, _PageRange(cut, piece.stop, piece.filled))
        piece.stop = cut
    return piece
