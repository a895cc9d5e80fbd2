"""A file mapped into memory without a descriptor: thousands of them fit under the usual limit of 1,024 open files.

Python's ``mmap`` (before 3.13), and with it NumPy's ``memmap``, keeps a copy of the descriptor while the map lives.
The system itself needs none once the file is mapped, so this module calls it directly. What limits the number of maps
then is ``vm.max_map_count`` (65,530 by default).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref

import numpy as np

_C = ctypes.CDLL(None, use_errno=True)
_C.mmap.restype = ctypes.c_void_p
_C.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_C.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_C.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_FAILED = ctypes.c_void_p(-1).value


class FileMap:
    """The bytes of an open regular file, read-only; unmapped when neither it nor an array of it is left.

    Args:
        descriptor: of the file; it may be closed afterwards.
        size: bytes to map from the start; 0 maps nothing.
        name: the file's, for errors.

    Raises:
        OSError: the system does not map it.
    """

    def __init__(self, descriptor: int, size: int, name: str | os.PathLike[str]) -> None:
        self._address, self._size = 0, size
        if size:
            address = _C.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
            if address == _FAILED:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), os.fspath(name))
            self._address = address
            # Not at the end of the process, whose threads may still read.
            weakref.finalize(self, _C.munmap, address, size).atexit = False

    @property
    def __array_interface__(self) -> dict[str, object]:
        """How NumPy sees the map; an array made from it keeps this object alive."""
        return {"data": (self._address, True), "shape": (self._size,), "typestr": "|u1", "version": 3}

    def array(self) -> np.ndarray:
        """All bytes: uint8, read-only, not copied."""
        return np.asarray(self) if self._size else np.frombuffer(b"", np.uint8)

    def forget(self) -> None:
        """Give the pages that were looked at back: they need not count as our memory, the system keeps them cached."""
        if self._size:
            _C.madvise(self._address, self._size, mmap.MADV_DONTNEED)
