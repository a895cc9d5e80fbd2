"""The launchers of several nodes: which ranks each of them starts, and how they agree on one outcome.

Every node has a launcher of its own. They share the store through which the ranks meet, and write two things into it:
the failure that is the cause, and that a launcher has ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_hammer.base.errors import ParallelError, from_fields, to_fields
from megatron_hammer.supervise.watch import GRACE_SECONDS, Failure

if TYPE_CHECKING:
    from megatron_hammer.parallel.rendezvous import Store

FAILURE_KEY, ENDED_KEY = "launcher/failure", "launcher/ended"  # in the store


@dataclass(frozen=True)
class Node:
    """Which ranks this launcher starts and where they all meet."""

    nproc: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    """0: any free port (one node only)."""

    @property
    def world_size(self) -> int:
        """Ranks over all nodes."""
        return self.nproc * self.nnodes


def failed_elsewhere(store: Store | None) -> bool:
    """Whether another node's launcher has reported a failure, or node 0's is gone. Communicates with the store."""
    if store is None:
        return False
    try:
        return bool(store.check([FAILURE_KEY]))
    except RuntimeError:
        return True


def agree_with_other_nodes(store: Store, node: Node, failure: Failure | None) -> Failure | None:
    """Print the same cause on every node; node 0 keeps the store open until all launchers have read it.

    A consequence (severity 2 and 3: a peer's death seen from here) gives way to a cause that another node reports.
    """
    try:
        if failure is not None and failure.severity >= 2:
            _wait_until(lambda: store.check([FAILURE_KEY]), 2 * GRACE_SECONDS)
        if store.check([FAILURE_KEY]):
            failure = Failure(0, 0, from_fields(json.loads(store.get(FAILURE_KEY))))
        elif failure is not None:
            store.set(FAILURE_KEY, json.dumps(to_fields(failure.error)))
        store.add(ENDED_KEY, 1)
        if node.node_rank == 0:
            _wait_until(lambda: store.add(ENDED_KEY, 0) >= node.nnodes, 10 * GRACE_SECONDS)
    except RuntimeError:
        lost = ParallelError(
            6, "the launcher of node 0", "is gone", "see its output; run the same command on every node"
        )
        return failure or Failure(3, 0, lost)
    return failure


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
