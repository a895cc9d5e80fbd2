"""Which file was being written, and how large it was to become, when the operating system refused a write. No torch."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteFailed(OSError):
    """An error that names its file and the bytes that were needed."""

    def __init__(self, error: OSError, path: str | os.PathLike[str], needed: int) -> None:
        super().__init__(error.errno, error.strerror or str(error), os.fspath(path))
        self.needed = needed


@contextmanager
def writing(path: str | os.PathLike[str], needed: int) -> Iterator[None]:
    """While so many bytes are written to a file, a full disk, or an error without a name, becomes ``WriteFailed``."""
    try:
        yield
    except WriteFailed:
        raise
    except OSError as error:
        if error.errno in FULL or error.filename is None:
            raise WriteFailed(error, path, needed) from error
        raise
