"""A copy of a rank's state in host memory that another process can read, and writes in the background.

::

    step s         | next step: forward, backward        | update
    take() ------> | the copy is made meanwhile          | wait(): not before it is whole -> then(): it may be written

fp32 masters and moments change in the update only, so the copy may take as long as the next forward and backward. On a
CPU a thread makes it, and a step that must wait for it helps to copy. On a GPU a separate stream copies into pinned
memory; the update waits for it on the device, and Python never waits. The memory is allocated and touched once, when
training starts, so that a shortage shows there and not hours later.

On a core of an EPYC a gigabyte takes 0.11 s, of which plain memcpy between two arrays takes 0.10: a step that is
shorter than that for the gigabytes of its rank waits for the rest of the copy, and for nothing else. Stores past the
caches take memory from training less: on a Xeon whose two cores were busy, 4.5 to 5.7 GB/s where memcpy had 2.5 to 2.7.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.base.errors import MemoryShortage
from megatron_hammer.base.system import shared_memory_file, take_memory
from megatron_hammer.checkpoint.one_pass import OnePass

ALIGNMENT = 64  # bytes: of where a tensor's copy starts
PIECE_BYTES = 2**24  # that one thread copies at a time: a millisecond or two


def places_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where copies of so many bytes each lie one after the other, and how many bytes all take."""
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, at


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Bytes to their place, past the core's caches where that was built."""
    OnePass().take(source.data, target.data)


def _forget_last_error(device: torch.device) -> None:
    """After a call of CUDA that failed: CUDA keeps its error for whoever asks next, which torch does behind a launch.

    That would be a kernel by which the ranks agree on the error: it would be raised there instead, on this rank alone,
    and the others would wait. torch has no other way to ask (cudaGetLastError is not among what it binds).
    """
    with suppress(RuntimeError):
        torch.ones(1, device=device)


class _CopyWork:
    """What is to be copied, in pieces, by whoever has time for it; whoever copies the last one calls ``then``.

    Args:
        copies: flat arrays of bytes: where to, and what.
    """

    def __init__(self, copies: Sequence[tuple[np.ndarray, np.ndarray]], then: Callable[[], None]) -> None:
        self._pieces = [
            (target[at : at + PIECE_BYTES], source[at : at + PIECE_BYTES])
            for target, source in copies
            for at in range(0, source.size, PIECE_BYTES)
        ]
        self._then, self._open, self._lock = then, len(self._pieces), threading.Lock()
        self.is_handed_over = False
        """Whether all is copied and ``then`` has been called."""
        if not self._pieces:
            self._hand_over()

    def copy(self) -> None:
        """Copy until nothing is left to begin with."""
        while True:
            with self._lock:
                if not self._pieces:
                    return
                target, source = self._pieces.pop()
            copy(target, source)  # without Python's lock: training goes on
            with self._lock:
                self._open -= 1
                last = self._open == 0
            if last:
                self._hand_over()

    def _hand_over(self) -> None:
        self._then()
        self.is_handed_over = True


class Snapshot:
    """Memory for one copy, which is used again for the next.

    Args:
        size: bytes, at least of all that ``take`` will be given.
        device: where the tensors are.

    Raises:
        MemoryShortage: this machine has not so much, or its GPU cannot reach it.
        OSError: this process may not even have memory of that size (``ulimit -f``, its hard limit).
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self._device = max(size, mmap.PAGESIZE), device
        self.descriptor = shared_memory_file("megatron_hammer snapshot")
        try:
            self._memory = take_memory(self.descriptor, self.size)
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
            result = int(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.size, 0))
            if result:  # said here: torch would find it after the next launch of a kernel, and name that
                del self._bytes
                self._memory.close()
                os.close(self.descriptor)
                _forget_last_error(device)
                raise MemoryShortage(
                    1,
                    f"checkpoint.mode=background: a snapshot of {self.size / 2**30:.2f} GiB",
                    f"cannot be pinned for the GPU (cudaHostRegister: error {result})",
                    "use checkpoint.mode=blocking, which needs none",
                )
        # A thread begins on GPU 0, whichever is the rank's, and its first call of CUDA takes half a gigabyte there.
        on_device: dict[str, Any] = {}
        if self._stream is not None:
            on_device = {"initializer": torch.cuda.set_device, "initargs": (self._stream.device,)}
        self._thread = ThreadPoolExecutor(1, "snapshot", **on_device)
        self._taken: Future[None] | None = None
        self._event: torch.cuda.Event | None = None
        self._pieces = _CopyWork((), lambda: None)
        self._is_behind_event = True

    @property
    def is_handed_over(self) -> bool:
        """Whether the copy is whole and ``then`` has been called."""
        return self._pieces.is_handed_over and self._is_behind_event

    def take(self, tensors: Sequence[Tensor], offsets: Sequence[int], then: Callable[[], None]) -> None:
        """Begin to copy flat tensors to their places; they must not change before ``wait`` has returned.

        Args:
            then: called, in a thread, when all is there; must not raise.
        """
        assert self._taken is None, "one snapshot at a time"
        if self._stream is None:
            target = self._bytes.numpy()
            sources = [tensor.detach().view(torch.uint8).numpy() for tensor in tensors]
            copies = [(target[at : at + source.size], source) for source, at in zip(sources, offsets, strict=True)]
            self._pieces = _CopyWork(copies, then)
            self._taken = self._thread.submit(self._pieces.copy)
            return
        self._is_behind_event = False
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for tensor, offset in zip(tensors, offsets, strict=True):
                source = tensor.detach().view(torch.uint8)
                self._bytes[offset : offset + source.numel()].copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # who waits leaves the core to others
            event.record(self._stream)
        self._event = event
        self._taken = self._thread.submit(self._after, event, then)

    def _after(self, event: torch.cuda.Event, then: Callable[[], None]) -> None:
        event.synchronize()
        then()
        self._is_behind_event = True

    def wait(self) -> None:
        """Return when what was copied may change: at once on a GPU, whose next work waits instead."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream(self._device))
            self._event = None
        elif self._taken is not None and self._stream is None:
            self._pieces.copy()
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
