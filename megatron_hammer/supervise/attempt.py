"""One start of the ranks of a node, from opening the rendezvous store to the end of the last rank: ``run_ranks``.

The ranks are spawned with the stop signals blocked and unblock them once their handlers are installed. The launcher
adopts whatever processes a dead rank has started (trackers, writers of checkpoints, compilers) and ends them with the
last rank: no process of a run outlives it or writes while the next start runs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from megatron_hammer.base.environment import keep_kernels_on_this_machine
from megatron_hammer.base.errors import EXIT_STOPPED_BY_SIGNAL
from megatron_hammer.base.processes import KILL_SECONDS, outlives_a_kill
from megatron_hammer.base.progress import say
from megatron_hammer.base.signals import STOP_SIGNALS, end_at_once, on_signals, take_over
from megatron_hammer.base.system import LOOPBACK, adopt_orphans, parents, usable_cores
from megatron_hammer.config import Config
from megatron_hammer.parallel.board import STACKS_SIGNAL, Board
from megatron_hammer.parallel.heartbeat import Heartbeat
from megatron_hammer.parallel.observe import Observer
from megatron_hammer.parallel.rendezvous import Meeting, host_store, interface_towards, join_store
from megatron_hammer.supervise.nodes import Node
from megatron_hammer.supervise.rank import rank_main
from megatron_hammer.supervise.restart import Restarts
from megatron_hammer.supervise.several_nodes import (
    FAILURE_KEY,
    agree_on_restart,
    agree_with_other_nodes,
    wait_for_all_nodes,
    wait_for_its_end,
    wait_until,
)
from megatron_hammer.supervise.watch import GRACE_SECONDS, Failure, RankProcess, forward_signal, kill, watch

ORPHAN_ROUNDS = 20  # of orphans' own children, which come to the launcher one after the other


@dataclass(frozen=True)
class Ended:
    """How the ranks of one start have ended."""

    code: int
    """0, 75, or that of the failure."""
    failure: Failure | None
    asked_to_stop: bool
    """Whether a stop signal came."""
    left: tuple[str, ...] = ()
    """What to say of each process that outlives this, since it waits in the kernel and SIGKILL does not reach it."""
    again: Node | None = None
    """Of several nodes: what this one starts next, as all have agreed."""


def run_ranks(
    config: Config, node: Node, entry: str, options: Mapping[str, Any], restarts: Restarts | None = None
) -> Ended:
    """Run ``entry`` on every rank of ``node``, until all have ended. The arguments are those of ``launch``."""
    most = 0 if restarts is None else restarts.most
    meeting = None if node.world_size == 1 else _meet(node, config.parallel.timeout_seconds, most)
    others = None
    if meeting is not None and node.nnodes > 1:
        timeout = config.parallel.timeout_seconds
        others = Heartbeat(meeting, node.node_rank, node.nnodes, node.nproc, timeout, FAILURE_KEY)
    place = None if meeting is None else (meeting.address, meeting.port)
    _set_environment(node, meeting)
    spawn = multiprocessing.get_context("spawn")
    ranks: list[RankProcess] = []
    numbers = range(node.node_rank * node.nproc, (node.node_rank + 1) * node.nproc)
    board, received, alone = Board(node.nproc), list[int](), node.nnodes == 1
    observer = Observer(board, numbers, config.parallel.timeout_seconds, alone=alone)

    def pass_on(signum: int, frame: object) -> None:
        received.append(signum)
        forward_signal(ranks, signum)

    adopt_orphans(True)
    resource_tracker.ensure_running()  # its start would unblock the signals that are blocked next
    on_signals(STOP_SIGNALS, pass_on)  # before they are blocked, as they are here alone: another thread may take one
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # inherited by the ranks
    take_over()
    others_children = children_of(os.getpid())
    try:
        for local_rank, rank in enumerate(numbers):
            pipe, rank_end = spawn.Pipe(duplex=False)
            arguments = (
                entry,
                config,
                rank,
                local_rank,
                node.world_size,
                place,
                dict(options),
                os.getpid(),
                rank_end,
                board,
            )
            process = spawn.Process(target=rank_main, args=arguments, name=f"rank {rank}")
            process.start()
            rank_end.close()  # the rank's copy is the only one left: its death closes the pipe
            ranks.append(RankProcess(rank, process, pipe))
        on_signals((STACKS_SIGNAL,), lambda *_: observer.ask())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for number in tuple(received):  # while ranks were started
            forward_signal(ranks, number)
        failed_elsewhere = others.failed if others is not None else lambda: False
        failure = watch(
            ranks, failed_elsewhere, config.parallel.timeout_seconds, observer, lambda: alone and bool(received)
        )
    finally:
        # Until ranks are started again: the outcome stands, nothing is left to stop.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        left = [*kill(ranks), *end_orphans(others_children | {r.pid for r in ranks if r.code is None})]
        adopt_orphans(False)
        board.close()
    if failure is None and received and any(r.ended_by_us for r in ranks):
        say(f"stopped by {signal.Signals(received[0]).name} before the first step; run the same command again")
    again: Node | None = None
    if others is not None and meeting is not None:
        if failure is not None and failure.severity >= 2:  # it may be the consequence of what happened elsewhere
            wait_until(others.failed, 2 * GRACE_SECONDS)
        lost = others.lost()
        if restarts is not None and most and lost is None:
            able = not received and not left
            nproc = agree_on_restart(
                meeting.store, node, failure, able, lambda cause: _ranks_again(restarts, cause, node)
            )
            again = restarts.as_decided(nproc, node)
        failure = agree_with_other_nodes(meeting.store, node, failure, lost)
        others.stop()
        if again is not None:  # what follows is a wait for the others, as before the first start
            end_at_once("before the ranks were started again")
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            if node.node_rank:
                wait_for_its_end(meeting.store)
    code = EXIT_STOPPED_BY_SIGNAL if any(r.code for r in ranks) else 0
    return Ended(code if failure is None else failure.error.exit_code, failure, bool(received), tuple(left), again)


def _ranks_again(restarts: Restarts, failure: Failure, node: Node) -> int:
    """How many ranks each node starts after a failure; 0: none."""
    again = restarts.after(failure, node)
    return 0 if again is None else again.nproc


def _meet(node: Node, timeout_seconds: int, restarts: int) -> Meeting:
    """The open store through which all ranks find each other; with several nodes, when all of them are there."""
    if node.node_rank == 0:
        meeting = host_store(node.master_addr, node.master_port, timeout_seconds)
    else:
        meeting = join_store(node.master_addr, node.master_port, timeout_seconds, say)
    if node.nnodes > 1:
        wait_for_all_nodes(meeting, node, timeout_seconds, say, restarts)
    return meeting


def _set_environment(node: Node, meeting: Meeting | None) -> None:
    """What the ranks inherit, where the user has not said otherwise: network interfaces, a share of the cores, a cache.

    On one node nothing but loopback is used. On several, gloo would take the interface that this machine's own name
    resolves to, which may be loopback; it gets the one on the way to node 0.
    """
    if node.nnodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    elif meeting is not None and (name := interface_towards(meeting)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    cores = usable_cores()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // node.nproc)))
    keep_kernels_on_this_machine()


# ---- orphans ---------------------------------------------------------------------------------------------------------


def children_of(pid: int) -> set[int]:
    """The processes that this one is the parent of, as the kernel sees it."""
    return {child for child, parent in parents().items() if parent == pid}


def end_orphans(spared: set[int]) -> list[str]:
    """Kill what the ranks have left behind, and what that has.

    Args:
        spared: children of this process that were there before the ranks.

    Returns:
        what to say of each that does not end.
    """
    left: dict[int, str] = {}
    for _ in range(ORPHAN_ROUNDS):
        orphans = children_of(os.getpid()) - spared - left.keys()
        if not orphans:
            break
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + KILL_SECONDS
        for pid in orphans:
            if not _has_ended(pid, until):
                left[pid] = outlives_a_kill(pid)
    return list(left.values())


def _has_ended(pid: int, until: float) -> bool:
    """Whether a killed child has ended, at the latest at that time."""
    with contextlib.suppress(ChildProcessError):
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
    return True
