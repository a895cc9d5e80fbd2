"""Names the file that was being written, and its intended size, when the operating system refuses a write. No torch.

The system's own error names no file where an open file cannot grow. Files that ``open_new`` and ``open_existing`` open
add their name to such an error; ``writing`` adds it for a block of code that writes in another way.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import tempfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Protocol

from megatron_hammer.base.system import sync

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteFailed(OSError):
    """An error that names its file and the bytes that were needed."""

    def __init__(self, error: OSError, path: str | os.PathLike[str], needed: int) -> None:
        super().__init__(error.errno, error.strerror or str(error), os.fspath(path))
        self.needed = needed


@contextlib.contextmanager
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


class _NamedFile(io.FileIO):
    """A file whose errors of writing say its path, and how large it was to become."""

    def __init__(self, path: str | os.PathLike[str], mode: str, descriptor: int | None) -> None:
        super().__init__(path if descriptor is None else descriptor, mode)
        self._path = path

    def write(self, content: ReadableBuffer, /) -> int:
        """As of any file, if the system takes it."""
        try:
            return super().write(content)
        except OSError as error:
            raise WriteFailed(error, self._path, self.tell() + memoryview(content).nbytes) from error


def open_new(path: str | os.PathLike[str], buffering: int = io.DEFAULT_BUFFER_SIZE) -> IO[bytes]:
    """A new file, or one that is emptied, to be written and read."""
    return io.BufferedRandom(_NamedFile(path, "w+", None), buffering)


def open_existing(path: str | os.PathLike[str], descriptor: int | None = None) -> IO[bytes]:
    """A file that is there, to be written and read from its start.

    Args:
        descriptor: of that file, where it is open already; closed with what is returned.
    """
    return io.BufferedRandom(_NamedFile(path, "r+", descriptor))


def make_durable(file: IO[bytes], name: str | os.PathLike[str]) -> None:
    """Have all that was written to an open file on the disk.

    Args:
        name: of the file, for errors: a disk over a network may be full only now.
    """
    file.flush()
    with writing(name, os.fstat(file.fileno()).st_size):
        sync(file.fileno())


class _Closes(Protocol):
    def close(self) -> object: ...


def close_after(file: _Closes, error: BaseException | None) -> None:
    """Close a file at the end of a ``with`` block: what cannot be written any more does not hide why the block failed.

    Args:
        error: why; None where it has not failed.
    """
    with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
        file.close()


@contextlib.contextmanager
def nameless_file(folder: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A temporary file without a name on the file system of a folder: it is gone when it is closed."""
    descriptor, path = tempfile.mkstemp(dir=folder)
    os.unlink(path)
    file = open_existing(path, descriptor)
    try:
        yield file
    except BaseException as error:
        close_after(file, error)
        raise
    file.close()
