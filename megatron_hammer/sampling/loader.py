"""The samples of one step, cut into micro-batches for one data-parallel rank.

::

    global batch of a step = samples [consumed, consumed + batch size at this sample)

    grad_accum 2, dp 2, micro-batch 2:     samples   0 1 | 2 3 | 4 5 | 6 7
                                           rank       0     1     0     1
                                           micro-batch   0     |     1

So the state of the loader is one integer, ``consumed``, and the global batch is the same samples for every number of
ranks. ``chain_digest`` proves it: a hash over the names of all samples so far, that each step carries on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from megatron_hammer.sampling.batch import Batch
from megatron_hammer.sampling.order import SampleId


class Samples(Protocol):
    """Where samples are read from: ``TrainData``, or a proof's."""

    def read(self, first: int, count: int) -> Batch[np.ndarray]:
        """So many samples, from number ``first`` of the run on."""
        ...


def micro_batches(
    data: Samples, first_sample: int, count: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[Batch[np.ndarray]]:
    """What data-parallel rank ``dp_rank`` of ``dp_size`` computes of samples [first_sample, first_sample + count).

    Micro-batch m holds samples first_sample + m * (dp_size * b) + dp_rank * b + [0, b).
    """
    first, stride = first_sample + dp_rank * micro_batch_size, dp_size * micro_batch_size
    return [data.read(first + m * stride, micro_batch_size) for m in range(count // stride)]


class ReadAhead:
    """The micro-batches of step after step; a thread reads those of the next step while the present one is computed.

    So a page that has to come from the disk, or an index that has to be built, costs no time of the device. It changes
    nothing that is read.

    Args:
        read: ``micro_batches`` of (first sample, count).
    """

    def __init__(self, read: Callable[[int, int], list[Batch[np.ndarray]]]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[int, Future[list[Batch[np.ndarray]]]] | None = None

    def get(self, first_sample: int, count: int, following: int) -> list[Batch[np.ndarray]]:
        """The micro-batches of a step; what failed while reading ahead is raised here.

        Args:
            count: samples of the step.
            following: of the next one, which is read ahead; 0: there is none.
        """
        if self._next is not None and self._next[0] == first_sample:
            batches = self._next[1].result()
        else:
            batches = self._read(first_sample, count)
        behind, self._next = first_sample + count, None
        if following:
            self._next = behind, self._thread.submit(self._read, behind, following)
        return batches

    def close(self) -> None:
        """End the thread, once it has read what it is at; nothing can be got any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def chain_digest(previous: str, ids: Iterable[SampleId], fingerprints: Sequence[str]) -> str:
    """BLAKE2b-128 over the digest of the step before and the samples of this one, as 32 hex digits.

    Args:
        previous: what the step before returned; "" before the first.
        ids: samples of the whole global batch in the order of their numbers, not those of one rank.
        fingerprints: content of each source; a sample is named by it and not by the source's place in the mix.
    """
    names = "".join([f"\n{fingerprints[source]} {epoch} {window}" for source, epoch, window in ids])
    return hashlib.blake2b((previous + names).encode(), digest_size=16).hexdigest()
