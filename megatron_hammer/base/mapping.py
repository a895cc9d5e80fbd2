"""A file mapped into memory without a descriptor: thousands of them fit under the usual limit of 1,024 open files.

Python's ``mmap`` (before 3.13), and with it NumPy's ``memmap``, keeps a copy of the descriptor while the map lives.
The system itself needs none once the file is mapped, so this module calls it directly. What limits the number of maps
then is ``vm.max_map_count`` (65,530 by default).

Another process can still truncate or overwrite a mapped file. Memory behind the new end of a truncated file reads as
zeros (``csrc/base/mapping.cpp`` catches the SIGBUS that would end the process), and ``FileMap.check`` says afterwards
whether the file is still the one that was mapped. So a reader reads, checks, and only then uses what it has read. Reads
cost nothing more; a check is one ``stat`` (2 us on a local disk). Reading by ``pread`` instead would notice a truncated
file too, but not an overwritten one, and needs a descriptor for each file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

import numpy as np

from megatron_hammer.base.compiled import find_compiled
from megatron_hammer.base.errors import DataError
from megatron_hammer.base.system import C as _C

_compiled: Any = find_compiled("megatron_hammer.base._mapping", 1)
BACKEND = "Python" if _compiled is None else "C++"
SURVIVES_CUTS = _compiled is not None
"""Whether a read of a file that has been cut gives zeros; without the compiled part it ends the process."""
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_C.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_C.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


def _release(address: int, size: int, watched: int | None) -> None:
    if watched is not None:
        _compiled.unwatch(watched)
    _C.munmap(address, size)


class FileMap:
    """The bytes of an open regular file, read-only; unmapped when neither it nor an array of it is left.

    Args:
        descriptor: of the file; it may be closed afterwards.
        size: bytes to map from the start; 0 maps nothing.
        name: the file's path, for errors and for ``check``.

    Raises:
        OSError: the system does not map it.
    """

    def __init__(self, descriptor: int, size: int, name: str | os.PathLike[str]) -> None:
        self._address, self._size = 0, size
        self._path, self._opened = os.path.abspath(name), os.fstat(descriptor)
        self._watched: int | None = None
        if size:
            address = _C.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address == _FAILED:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), os.fspath(name))
            self._address = address
            if SURVIVES_CUTS:
                self._watched = _compiled.watch(address, size)
            # Not at the end of the process, whose threads may still read.
            weakref.finalize(self, _release, address, size, self._watched).atexit = False

    @property
    def __array_interface__(self) -> dict[str, object]:
        """How NumPy sees the map; an array made from it keeps this object alive."""
        return {"data": (self._address, True), "shape": (self._size,), "typestr": "|u1", "version": 3}

    def array(self) -> np.ndarray:
        """All bytes: uint8, read-only, not copied."""
        return np.asarray(self) if self._size else np.frombuffer(b"", np.uint8)

    def forget(self, first: int = 0, size: int | None = None) -> None:
        """Give pages that were looked at back: they need not count as our memory, the system keeps them cached.

        Args:
            first, size: of a part, in bytes from the start, ``first`` a multiple of the page's size; absent: all of it.
        """
        if self._size:
            _C.madvise(self._address + first, self._size - first if size is None else size, mmap.MADV_DONTNEED)

    def check(self) -> None:
        """Whether all that has been read so far is what the file had when it was mapped.

        A file that was removed, or replaced by another of its name, is not changed: the old one is still mapped.

        Raises:
            DataError: E350 it was cut, overwritten or could not be read.
        """
        if self._watched is not None and _compiled.was_cut(self._watched):
            raise _changed(self._path, "was cut, or could not be read, while it was in use")
        try:
            now = os.stat(self._path)
        except OSError:
            return
        before = self._opened
        if (now.st_ino, now.st_dev) != (before.st_ino, before.st_dev):
            return
        if now.st_size != before.st_size:
            raise _changed(self._path, f"had {before.st_size:,} bytes when it was opened, and has {now.st_size:,} now")
        if now.st_mtime_ns != before.st_mtime_ns:
            raise _changed(self._path, "was written to while it was in use")


def _changed(path: str, rule: str) -> DataError:
    remedy = "put it back as it was (tools/inspect_dataset.py verify says whether it is) and run the same command again"
    return DataError(50, path, rule, remedy)
