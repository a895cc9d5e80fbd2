"""A copy of what a rank saves, in host memory that another process can read: what a save in the background writes from.

::

    step s         | next step: forward, backward        | update
    take() ------> | the copy is made meanwhile          | wait(): not before it is whole -> then(): it may be written

Masters and moments change in the update only, so that the copy has the time of a forward and a backward. On a CPU a
thread makes it, on a GPU a stream of its own, into pinned memory; there the update waits on the device, and Python
never does. The memory is taken and touched once, when training starts: what is too much shows there, not hours later.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.base.errors import MemoryShortage

ALIGNMENT = 64  # bytes: of where a tensor's copy starts


def places_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where copies of so many bytes each lie one after the other, and how many bytes all take."""
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, at


@contextmanager
def _any_file_size() -> Iterator[None]:
    """Within the block a limit on the sizes of files does not count, as far as this process may lift it: memory that
    processes share is a file to the kernel, and the limit is meant for disks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Snapshot:
    """Memory for one copy, which is used again for the next.

    Args:
        size: bytes, at least of all that ``take`` will be given.
        device: where the tensors are.

    Raises:
        MemoryShortage: this machine has not so much.
        OSError: this process may not even have memory of that size (``ulimit -f``, its hard limit).
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self._device = max(size, mmap.PAGESIZE), device
        self.descriptor = os.memfd_create("megatron_hammer snapshot")
        try:
            with _any_file_size():
                os.posix_fallocate(self.descriptor, 0, self.size)
            self._memory = mmap.mmap(self.descriptor, self.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            os.close(self.descriptor)
            if error.errno == errno.EFBIG:
                raise
            raise MemoryShortage(
                1,
                f"checkpoint.mode=background: a snapshot of {self.size / 2**30:.2f} GiB",
                f"found no memory ({error.strerror or error})",
                "use more ranks, or checkpoint.mode=blocking, which needs none",
            ) from None
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.size, 0)
        self._thread = ThreadPoolExecutor(1, "snapshot")
        self._taken: Future[None] | None = None
        self._event: torch.cuda.Event | None = None
        self.is_handed_over = False
        """Whether the copy is whole and ``then`` has been called."""

    def take(self, tensors: Sequence[Tensor], offsets: Sequence[int], then: Callable[[], None]) -> None:
        """Begin to copy flat tensors to their places; they must not change before ``wait`` has returned.

        Args:
            then: called, in a thread, when all is there; must not raise.
        """
        assert self._taken is None, "one snapshot at a time"
        self.is_handed_over = False
        if self._stream is None:
            self._taken = self._thread.submit(self._copy, tensors, offsets, then)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor, offset in zip(tensors, offsets, strict=True):
                source = tensor.detach().view(torch.uint8)
                self._bytes[offset : offset + source.numel()].copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._event = event
        self._taken = self._thread.submit(self._after, event, then)

    def _copy(self, tensors: Sequence[Tensor], offsets: Sequence[int], then: Callable[[], None]) -> None:
        target = self._bytes.numpy()
        for tensor, offset in zip(tensors, offsets, strict=True):
            source = tensor.detach().view(torch.uint8).numpy()
            np.copyto(target[offset : offset + source.size], source)  # without Python's lock: training goes on
        then()
        self.is_handed_over = True

    def _after(self, event: torch.cuda.Event, then: Callable[[], None]) -> None:
        event.synchronize()
        then()
        self.is_handed_over = True

    def wait(self) -> None:
        """Return when what was copied may change: at once on a GPU, whose next work waits instead."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._device))
            self._event = None
        elif self._taken is not None and self._stream is None:
            self._taken.result()
            self._taken = None

    def finish(self) -> None:
        """Return when the copy is whole and ``then`` has been called."""
        self.wait()
        if self._taken is not None:
            self._taken.result()
            self._taken = None

    def close(self) -> None:
        """Give the memory back."""
        self.finish()
        self._thread.shutdown()
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
        del self._bytes
        os.close(self.descriptor)
