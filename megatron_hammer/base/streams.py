"""Standard output and standard error that never end a program whose work is something else.

A reader can vanish (``| head``, a closed terminal), a log's disk can fill, a program can be started with a stream
closed (``>&-``) or with an encoding that lacks the characters of its text. ``guard_streams`` is called once at the
start of every process of ours, and decides for all of them:

    closed at the start             what is written there is dropped; descriptors 0 to 2 never become a data file
    a character beyond the encoding written as its escape, such as \\u4e2d
    standard error fails            what is written there is dropped: there is no other place to say so
    standard output fails           by ``OutputKind``, what standard output is to the program:

    kind      reader vanished (EPIPE)                 any other failure (disk full)
    LOG       note on stderr once, the work goes on   the same: metrics and results are in files of their own
    REPORT    the same                                the same; a program that would end with 0 ends with 6 (E601)
    LISTING   the program ends, quietly, with 0       the program ends with 6 (E601)

A reader that merely pauses, a full pipe that was set non-blocking included, is waited for. Needs no torch.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import io
import os
import select
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from megatron_hammer.base.errors import DiskError, os_remedy

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# What the loss of a terminal or of a reader looks like; anything else is a failure of what is behind the stream.
VANISHED = (errno.EPIPE, errno.ECONNRESET)


class OutputKind(enum.Enum):
    """What standard output is to a program, which decides what its failure means."""

    LOG = "log"
    """What happens, beside files that record it: training."""
    REPORT = "report"
    """A summary or verdict of work that is worth finishing without a reader: most tools."""
    LISTING = "listing"
    """All that the program is for: ``--help``, ``list``, ``show``."""


class Vanished(Exception):
    """Nobody reads what the program lists: it may end."""


class Outlet(io.FileIO):
    """One of the two descriptors, unbuffered; it fails at most once, then drops what is written.

    Args:
        descriptor: 1 or 2; it stays open when the object goes.
        kind: decides what a failure does, see above. None: drop in silence, as standard error does.
    """

    def __init__(self, descriptor: int, kind: OutputKind | None) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.kind = kind
        self.failure: OSError | None = None
        """Why nothing is written any more."""
        self.before: Callable[[bytes], bytes] | None = None
        """Asked for what goes before what is going to be written: a view on the same terminal makes room for it
        (``terminal.py``)."""
        self.written = time.monotonic()
        """When something was written for the last time."""
        self.is_bar = False
        """Whether that was a bar of progress, which stands on the line of the cursor."""

    def write(self, content: ReadableBuffer, /) -> int:
        """Write, or drop what cannot be written."""
        size = memoryview(content).nbytes
        if self.failure is not None:
            return size
        try:
            if self.before is not None and (first := self.before(bytes(content))):
                super().write(first)
            while (written := super().write(content)) is None:  # non-blocking and full
                select.select([], [self.fileno()], [])
            text = bytes(content)
            self.written, self.is_bar = time.monotonic(), text[:1] == b"\r" and text[-1:] not in (b"\n", b"\r")
            return written
        except OSError as error:
            self.failure = error
        if self.kind is OutputKind.LISTING:
            raise Vanished if self.failure.errno in VANISHED else _disk_error(self.failure)
        if self.kind is not None:
            why = "nobody reads standard output any more"
            if self.failure.errno not in VANISHED:
                why = f"standard output cannot be written ({self.failure.strerror})"
            print(f"note: {why}; the work goes on without it", file=sys.stderr, flush=True)
        return size

    def loss(self) -> DiskError | None:
        """The error of a program that has lost output that it was for; None where nothing is lost by ``kind``."""
        if (
            self.failure is None
            or self.failure.errno in VANISHED
            or self.kind not in (OutputKind.REPORT, OutputKind.LISTING)
        ):
            return None
        return _disk_error(self.failure)


def _disk_error(failure: OSError) -> DiskError:
    return DiskError(1, "standard output", f"could not be written: {failure.strerror}", os_remedy(failure))


def guard_streams(kind: OutputKind = OutputKind.REPORT) -> None:
    """Make ``sys.stdout`` and ``sys.stderr`` as this module says; for the start of a process, before its work.

    Streams that somebody has replaced (a test, a notebook) stay as they are; a second call changes the kind.
    """
    _fill_standard_descriptors()
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(2, sys.stderr, None)
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(1, sys.stdout, kind)
    elif (outlet := stdout_outlet()) is not None:
        outlet.kind = kind


def only_list() -> None:
    """From here on the program only lists: without a reader it may end, see ``OutputKind.LISTING``."""
    if (outlet := stdout_outlet()) is not None:
        outlet.kind = OutputKind.LISTING


def outlet_of(stream: TextIO) -> Outlet | None:
    """What ``guard_streams`` has put under a stream; None where it left it alone."""
    below = getattr(stream, "buffer", None)
    below = getattr(below, "raw", below)
    return below if isinstance(below, Outlet) else None


def stdout_outlet() -> Outlet | None:
    """The outlet behind ``sys.stdout``."""
    return outlet_of(sys.stdout)


def flush_streams() -> DiskError | None:
    """Write what is buffered; the error of standard output that the program should end with, if there is one.

    Afterwards nothing is left that the interpreter could fail on at its end (exit code 120).
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, Vanished, DiskError):
            with contextlib.suppress(OSError):
                stream.flush()  # an outlet that has failed drops what is left
    outlet = stdout_outlet()
    return None if outlet is None else outlet.loss()


def _fill_standard_descriptors() -> None:
    """Have descriptors 0 to 2 open: a file that is opened later must not get what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # as standard descriptors are: ranks and other children get them too
    os.close(descriptor)


def _guarded(descriptor: int, former: TextIO | None, kind: OutputKind | None) -> TextIO:
    """A text stream over an ``Outlet``, with the encoding and the buffering of the one before."""
    outlet = Outlet(descriptor, kind)
    unbuffered = former is not None and isinstance(getattr(former, "buffer", None), io.RawIOBase)  # python -u
    if former is not None:
        with contextlib.suppress(OSError):
            former.flush()
    return io.TextIOWrapper(
        outlet if unbuffered else io.BufferedWriter(outlet),  # as CPython itself does
        encoding="utf-8" if former is None else former.encoding,
        errors="backslashreplace",
        line_buffering=outlet.isatty() or descriptor == 2 or bool(getattr(former, "line_buffering", False)),
        write_through=unbuffered,
    )
