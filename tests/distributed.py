"""Multi-process tests on gloo: a pool of worker processes that stays alive between tests.

``run_distributed(world_size, function, *args)`` calls the top-level ``function(ctx_or_rank, *args)`` on that many
ranks and returns their results in rank order. Starting ranks costs seconds, a call costs milliseconds. A failure
reports every rank's traceback; a hang reports where each rank stands and kills the pool, and the next call builds a new
one.

The workers are forked by one process that has imported torch and the package (``IMPORTED``) and nothing else: a rank
then costs a tenth of a second in place of three. All of them share one hash seed, so that sets have one order on all
ranks; the ranks of the launcher, in tests/train/test_run.py and tests/supervise, each have their own.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import faulthandler
import gc
import os
import queue
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_hammer.parallel.rendezvous import leave_cores_to_those_who_run

MAX_RANKS = 8
STARTED = 0  # in place of the number of a call
IMPORTED = ["torch", "tests.train.runs", "tests.verify.grid"]  # what most functions need; none starts a thread
DEFAULT_TIMEOUT = 120  # seconds for one call, far above what any needs on two cores
START_SECONDS = 280  # for new workers: the first read gigabytes of a torch for CUDA from a disk that has not seen them


def _worker(rank: int, inbox: Any, outbox: Any, stacks: Path) -> None:
    gc.freeze()  # what was imported before: no garbage, and never searched for any
    faulthandler.register(signal.SIGPROF, stacks.open("w"), all_threads=True)  # the file stays open
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"  # else a rank that has nothing to do is gone while others still connect
    leave_cores_to_those_who_run()
    outbox.put((STARTED, rank, None, None))
    while (task := inbox.get()) is not None:
        call, world_size, store_path, function, args = task
        try:
            if world_size > 1:
                store = dist.FileStore(store_path, world_size)
                dist.init_process_group(
                    "gloo",
                    store=store,
                    rank=rank,
                    world_size=world_size,
                    timeout=datetime.timedelta(seconds=DEFAULT_TIMEOUT),
                )
            try:
                outbox.put((call, rank, function(rank, *args), None))
            finally:
                if world_size > 1:
                    dist.destroy_process_group()
        except BaseException:
            outbox.put((call, rank, None, traceback.format_exc()))


class _Pool:
    def __init__(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        self.outbox = context.Queue()
        self.inboxes: list[Any] = []
        self.processes: list[Any] = []
        self.context, self.calls, self.owner = context, 0, os.getpid()
        self.folder = tempfile.TemporaryDirectory(prefix="hammer-test-")

    def grow(self, size: int) -> None:
        missing = max(0, size - len(self.processes))
        while len(self.processes) < size:
            inbox = self.context.Queue()
            rank = len(self.processes)
            arguments = rank, inbox, self.outbox, self._stacks(rank)
            process = self.context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            self.inboxes.append(inbox)
            self.processes.append(process)
        deadline = time.monotonic() + START_SECONDS
        while missing:
            try:
                missing -= self.outbox.get(timeout=max(0.05, deadline - time.monotonic()))[0] == STARTED
            except queue.Empty:
                self.close()
                raise AssertionError(f"{missing} of {size} workers did not start in {START_SECONDS} s") from None

    def call(self, world_size: int, function: Callable, args: tuple, timeout: float) -> list[Any]:
        self.grow(world_size)
        self.calls += 1
        store = os.path.join(self.folder.name, f"store-{self.calls}")
        for rank in range(world_size):
            self.inboxes[rank].put((self.calls, world_size, store, function, args))
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        while len(results) + len(errors) < world_size:
            left = (deadline - datetime.datetime.now()).total_seconds()
            if errors:
                left = min(left, 5.0)  # the others may wait for the rank that failed
            try:
                call, rank, result, error = self.outbox.get(timeout=max(0.05, left))
            except queue.Empty:
                silent = sorted(set(range(world_size)) - set(results) - set(errors))
                where = self._where(silent)
                self.close()
                raise AssertionError(f"ranks {silent} did not answer in time\n" + _joined(errors | where)) from None
            if call == self.calls:
                (errors if error else results)[rank] = error or result
        if errors:
            ended = {r: self._said(r) for r in range(world_size) if self.processes[r].exitcode is not None}
            raise AssertionError(_joined(errors | ended))
        return [results[r] for r in range(world_size)]

    def _stacks(self, rank: int) -> Path:
        return Path(self.folder.name) / f"stacks-{rank}"

    def _where(self, ranks: list[int]) -> dict[int, str]:
        """Where the threads of ranks stand that did not answer."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGPROF)
        time.sleep(1.0)
        return {rank: self._said(rank) for rank in ranks}

    def _said(self, rank: int) -> str:
        code, stacks = self.processes[rank].exitcode, self._stacks(rank)
        if code is not None:
            return f"(ended with {code})"
        return stacks.read_text() if stacks.exists() else f"({stacks} is not there)"

    def close(self) -> None:
        if os.getpid() != self.owner:
            return  # a child of the test process, at its end
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self.inboxes = [], []


def _joined(errors: dict[int, str]) -> str:
    return "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(errors.items()))


_pool: list[_Pool] = []


def run_distributed(world_size: int, function: Callable, *args: Any, timeout: float = DEFAULT_TIMEOUT) -> list[Any]:
    """Run ``function(rank, *args)`` on ``world_size`` gloo ranks; results in rank order (tensors and plain values)."""
    if not _pool or not _pool[0].processes:
        _pool[:] = [_Pool()]
        atexit.register(_pool[0].close)
    return _pool[0].call(world_size, function, args, timeout)
