"""Memory at an address that stays, whose pages are given back to the system in between. Linux; needs no torch.

``malloc`` keeps what is freed, and what comes next lies in the holes: blocks of tens of MiB that come and go leave a
heap of which a quarter is free (glibc does not move blocks). Pages of a mapping of their own are gone when they are
given back, and come as huge ones, in two steps of the kernel for 4 MiB and not in a thousand.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys

HERE = sys.platform == "linux"
"""Whether this system gives pages back at once and refuses an access to memory that is closed."""

_PROT_NONE = 0
_C = ctypes.CDLL(None, use_errno=True)
_C.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Pages:
    """Anonymous private memory, open at first.

    Args:
        size: bytes, above zero.
    """

    def __init__(self, size: int) -> None:
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._size = len(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self._open = True

    @property
    def memory(self) -> memoryview:
        """All of it, writable; the mapping lives as long as somebody holds this."""
        return memoryview(self._map)

    @property
    def is_open(self) -> bool:
        """Whether it may be read and written."""
        return self._open

    def open(self) -> None:
        """Make it readable and writable; all zero if it was closed."""
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        self._open = True

    def close(self) -> None:
        """Give its pages back. Whoever reads or writes it then ends the process (SIGSEGV), as with a null pointer."""
        self._map.madvise(mmap.MADV_DONTNEED)
        self._protect(_PROT_NONE)
        self._open = False

    def _protect(self, access: int) -> None:
        if _C.mprotect(self._address, self._size, access) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"mprotect of {self._size:,} bytes: {os.strerror(number)}")
