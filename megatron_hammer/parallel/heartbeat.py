"""Heartbeats between the launchers of a run's nodes, through the store, to notice a node that is gone.

A node that is switched off or cut off from the network closes no connection, so nothing ends and nothing fails until a
collective's time is up, and what fails then is a healthy rank. So every launcher counts up a number of its own in the
store once a second, and node 0 looks at those of the others (under torchrun and srun the first rank of each node does
so, ``torchrun.py``)::

    node 0   hosts the store     sees the node whose number stands still
    node k   reaches the store   or not: then node 0 is cut off from it, or it from node 0

Both do so in a thread of its own on a connection of its own, because an operation on a dead connection may never come
back; the thread that watches the ranks only reads when each node has last answered.
"""

from __future__ import annotations

import threading
import time

from megatron_hammer.base.errors import ParallelError
from megatron_hammer.parallel.rendezvous import Meeting, Store, join_store

BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0  # or the timeout of collectives, where that is shorter: no pause of a healthy machine is so long
BEAT_KEY = "launcher/beat"


def node_0_is_gone() -> ParallelError:
    """For a launcher whose connection to the store was closed."""
    return ParallelError(6, "the launcher of node 0", "is gone", "see its output; run the same command on every node")


class Heartbeat:
    """What one launcher has heard of the others.

    Args:
        node: number of this one, of ``nnodes`` with ``nproc`` ranks each.
        timeout_seconds: of collectives (``parallel.timeout_seconds``).
        failure_key: where launchers report a failure in the store, which is looked at too.
    """

    def __init__(
        self, meeting: Meeting, node: int, nnodes: int, nproc: int, timeout_seconds: float, failure_key: str = ""
    ) -> None:
        self._meeting, self._node, self._nproc, self._failure_key = meeting, node, nproc, failure_key
        self._limit = min(SILENT_SECONDS, timeout_seconds)
        self._heard = dict.fromkeys(range(1, nnodes) if node == 0 else (0,), time.monotonic())
        self._failed = self._refused = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def failed(self) -> bool:
        """Whether another launcher has reported a failure, or does not answer any more."""
        return self._failed or self.lost() is not None

    def lost(self) -> ParallelError | None:
        """The node that does not answer any more, as the error of the run."""
        if self._refused:
            return node_0_is_gone()
        now = time.monotonic()
        silent = [i for i, heard in sorted(self._heard.items()) if now - heard > self._limit]
        if not silent:
            return None
        ranks = ", ".join(str(i * self._nproc + r) for i in silent for r in range(self._nproc))
        return ParallelError(
            8,
            f"node {', '.join(map(str, silent))} (rank {ranks})",
            f"has not answered node {self._node} for {self._limit:g} s: it is off, or one of the two is cut "
            f"off from {self._meeting.address}",
            "look at that machine and its network; the last committed checkpoint is safe",
        )

    def stop(self) -> None:
        """Say nothing more; does not wait for an operation that hangs."""
        self._stop.set()
        self._thread.join(2 * BEAT_SECONDS)

    def _beat(self) -> None:
        counts = dict.fromkeys(self._heard, 0)
        try:
            store = join_store(self._meeting.address, self._meeting.port, int(self._limit) + 1).store
            while not self._stop.wait(BEAT_SECONDS):
                store.add(f"{BEAT_KEY}/{self._node}", 1)
                if self._node:
                    self._heard[0] = time.monotonic()  # whoever reaches the store reaches node 0
                else:
                    self._look_at(counts, store)
                if self._failure_key and store.check([self._failure_key]):
                    self._failed = True
        except (RuntimeError, ParallelError):  # the connection was closed, unless it took as long as a silent one
            self._refused = self._node > 0 and time.monotonic() - self._heard[0] < self._limit

    def _look_at(self, counts: dict[int, int], store: Store) -> None:
        """Which of the other nodes' numbers have gone up."""
        for i in counts:
            count = store.add(f"{BEAT_KEY}/{i}", 0)
            if count > counts[i]:
                counts[i], self._heard[i] = count, time.monotonic()
