"""The launchers of several nodes: how they find each other and agree on one outcome.

Every node has a launcher of its own. They share the store through which the ranks meet, and write into it that a
launcher is there, the failure that is the cause, and that a launcher has ended. Where the user allows restarts, also
whether each can start again, and what node 0 has decided: the same store is closed then, and node 0 opens the next one
in the same place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from megatron_hammer.base.errors import ConfigError, ParallelError, from_fields, to_fields
from megatron_hammer.parallel.heartbeat import node_0_is_gone
from megatron_hammer.parallel.rendezvous import Meeting, Store, Waiting
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.watch import GRACE_SECONDS, Failure

PRESENT_KEY, FAILURE_KEY, ENDED_KEY = "launcher/present", "launcher/failure", "launcher/ended"  # in the store
ABLE_KEY, AGAIN_KEY = "launcher/able", "launcher/again"


def wait_for_all_nodes(
    meeting: Meeting, node: Node, timeout_seconds: float, note: Callable[[str], None], restarts: int = 0
) -> None:
    """Return when a launcher of every node is there. Nothing has been started yet, so a signal may end the wait.

    Args:
        restarts: that the user allows this launcher.

    Raises:
        ConfigError: two launchers have one number, or they were started with other numbers of ranks, nodes or restarts.
        ParallelError: a node does not come in time.
    """
    try:
        ours = {"nproc": node.nproc, "nnodes": node.nnodes, "max-restarts": restarts}
        _announce(meeting.store, node, ours)
        waiting = Waiting(timeout_seconds, note)
        while missing := [i for i in range(node.nnodes) if not meeting.store.check([f"{PRESENT_KEY}/{i}"])]:
            numbers = ", ".join(map(str, missing))
            if not waiting.pause(f"node {numbers} of {node.nnodes} to come to {meeting.address}:{meeting.port}"):
                raise ParallelError(
                    7,
                    f"node {numbers}",
                    f"did not join the run at {meeting.address}:{meeting.port} within {timeout_seconds:g} s",
                    "start the launcher on every node, with the same --master-addr and --master-port",
                )
        for other in range(node.nnodes):
            _check_alike(ours, other, json.loads(meeting.store.get(f"{PRESENT_KEY}/{other}")))
    except RuntimeError:  # the store's host has closed it
        raise node_0_is_gone() from None


def _announce(store: Store, node: Node, ours: Mapping[str, int]) -> None:
    if store.add(f"{PRESENT_KEY}/count/{node.node_rank}", 1) > 1:
        raise ConfigError(
            41,
            f"--node-rank={node.node_rank}",
            "is that of another launcher too",
            "start one launcher a node (under Slurm --ntasks-per-node=1), each with its own number",
        )
    store.set(f"{PRESENT_KEY}/{node.node_rank}", json.dumps(ours))


def _check_alike(ours: Mapping[str, int], other: int, theirs: Mapping[str, int]) -> None:
    for name, number in ours.items():
        if number != theirs[name]:
            raise ConfigError(40, f"--{name}={number}", f"is {theirs[name]} on node {other}", "start all nodes alike")


def agree_with_other_nodes(
    store: Store, node: Node, failure: Failure | None, lost: ParallelError | None = None
) -> Failure | None:
    """Print the same cause on every node; node 0 keeps the store open until all launchers have read it.

    A consequence (severity 2 and 3: a peer's death seen from here) gives way to a cause that another node reports.

    Args:
        lost: the node that does not answer any more. Then nothing is asked of it, and all that fails here is the
            consequence: what node 0 says to the nodes that are left is this.
    """
    if lost is not None and (failure is None or failure.severity >= 2):
        failure = Failure(1, 0, lost)
        if node.node_rank:
            return failure  # the store is where it cannot be reached
    try:
        failure = _common(store, failure)
        store.add(ENDED_KEY, 1)
        if node.node_rank == 0:
            others = GRACE_SECONDS if lost is not None else 10 * GRACE_SECONDS
            wait_until(lambda: store.add(ENDED_KEY, 0) >= node.nnodes, others)
    except RuntimeError:
        return failure or Failure(3, 0, node_0_is_gone())
    return failure


def _common(store: Store, failure: Failure | None) -> Failure | None:
    """The failure that a node has reported already, or this one, which is reported now."""
    if store.check([FAILURE_KEY]):
        return Failure(0, 0, from_fields(json.loads(store.get(FAILURE_KEY))))
    if failure is not None:
        store.set(FAILURE_KEY, json.dumps(to_fields(failure.error)))
    return failure


def agree_on_restart(
    store: Store, node: Node, failure: Failure | None, able: bool, decide: Callable[[Failure], int]
) -> int:
    """How many ranks each node starts again; 0: none. The same on all nodes that are there; before they agree to end.

    Args:
        able: whether this node can: nobody has asked it to stop, and nothing of its ranks is left.
        decide: asked on node 0 alone, if all nodes can.
    """
    try:
        failure = _common(store, failure)
        store.set(f"{ABLE_KEY}/{node.node_rank}", str(int(able)))
        if node.node_rank:
            wait_until(lambda: store.check([AGAIN_KEY]), 15 * GRACE_SECONDS)
            return int(store.get(AGAIN_KEY)) if store.check([AGAIN_KEY]) else 0
        keys = [f"{ABLE_KEY}/{number}" for number in range(node.nnodes)]
        wait_until(lambda: store.check(keys), 10 * GRACE_SECONDS)
        all_able = store.check(keys) and all(int(store.get(key)) for key in keys)
        again = decide(failure) if failure is not None and all_able else 0
        store.set(AGAIN_KEY, str(again))
        return again
    except RuntimeError:  # node 0 is gone
        return 0


def wait_for_its_end(store: Store) -> None:
    """Return when node 0 has closed the store: who came earlier would meet the old one again."""

    def is_closed() -> bool:
        try:
            store.add(ENDED_KEY, 0)
        except RuntimeError:
            return True
        return False

    wait_until(is_closed, 15 * GRACE_SECONDS)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Return when it holds, or after this time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
