"""Makes the datasets of a job on a Ray cluster: what ``tools/preprocess_data.py --engine ray`` does.

::

    files -> ranges (plan_ranges) -> Ray tasks: read, parse, encode -> a part a range (parts.py)
                                                                            |
    P_KEY_document.{bin,idx,meta.json} <-- the driver appends the parts, in the order of the documents

Ray places the tasks, and repeats those whose node was lost; there is no scheduler of ours. A shard is a piece of a
plain file of JSON lines (or of text whose documents are lines), some row groups of a parquet file, or a whole file of
another kind. Inputs, tokenizer and output lie in a file system that all nodes see, and each node has this package, of
one version. The files are those of a local run, byte for byte:

- A run after a kill makes only the parts that are missing.
- A range inside a file does not know its line number. The driver, which knows the lines of the ranges before it, puts
  the true number into its messages and rejected documents; nothing is read for that.
- A file that is cut is read once more by a task that hashes it: XXH3 cannot be joined from hashes of pieces.
- Of several errors the first in the order of the documents is raised.

The disk holds the tokens twice until the end. Joining goes on while tasks are at work and costs a copy of the bytes.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from megatron_hammer import __version__
from megatron_hammer.base.errors import ConfigError, DataError, HammerError, from_fields, to_fields
from megatron_hammer.base.progress import Progress, say
from megatron_hammer.base.reading import open_regular
from megatron_hammer.base.signals import Stopped
from megatron_hammer.base.system import usable_cores
from megatron_hammer.corpus.stream import check_unchanged
from megatron_hammer.dataset.make.job import SHARD_BYTES, Job
from megatron_hammer.dataset.make.journal import Tally, load_journal, other_command
from megatron_hammer.dataset.make.output import BuildSummary, DatasetOutput, check_numbers, rates
from megatron_hammer.dataset.make.parts import (
    REJECTED,
    UNKNOWN_LINE,
    HashTask,
    Parts,
    PartTask,
    number_of,
    plan_tasks,
    run_task,
)
from megatron_hammer.dataset.reader import IndexedDataset

_MAX_RETRIES = 3  # of a task whose worker or node is lost
_GLANCE_SECONDS = 0.5  # between two looks at `stop`
_LOST_SECONDS = 60.0  # without any node that could run a task, before the driver gives up
_LIMIT_SECONDS = 5.0  # between two looks at the size of the cluster
_OBJECT_STORE_BYTES = 80 << 20  # of a cluster of our own: Ray's least is 75 MB, and a task returns a few numbers
_CONNECT_SECONDS = 10.0
_HOST_PORT = re.compile(r"\[?([^/\[\]]+)\]?:(\d{1,5})")  # as in 10.0.0.1:6379; not ray://...
_PLACE = re.compile(r":(\d+)(?= \(byte \d+\))")  # behind the file's name, as jsonl.line_place writes it


def build_datasets_on_ray(
    job: Job,
    output_prefix: str | Path,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    restart: bool = False,
    stop: threading.Event | None = None,
    address: str | None = None,
    task_workers: int = 1,
) -> list[BuildSummary]:
    """As ``local.build_datasets``, on a Ray cluster; the same files.

    Args:
        workers: threads at work at once, in all; None: as many as the cluster has CPUs.
        shard_bytes: of text (parquet: of uncompressed columns) for a task.
        restart: drop the parts that an interrupted run left, instead of going on from them.
        address: of a running cluster, ``auto`` for that of this machine; None: one on this machine for this run.
        task_workers: threads of a task, which takes as many CPUs of a node.

    Raises:
        ConfigError: E297 no Ray here; E298 no such cluster, no node with so many CPUs, or a task's worker was lost
            again and again; as local.
        DataError: E375 a node has another version or tokenizer, E376 the nodes do not share the output's folder, E377
            an input is no regular file; as local.
        RefusedError: E534 an interrupted local run has left its journal.
        Stopped: ``stop`` was set.
    """
    ray = _import_ray()
    check_numbers(1 if workers is None else workers, shard_bytes)
    if task_workers < 1:
        raise ConfigError(75, f"--workers-per-task={task_workers}", "must be at least 1", "give threads for a task")
    for path in job.files:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(77, str(path), "is no regular file, and the nodes of a cluster could not all read it",
                            "write it to a file, or use --engine local")  # fmt: skip
    output = DatasetOutput(job, output_prefix, shard_bytes, task_workers, restart=True)  # its journal is never saved
    if not restart and load_journal(output.journal_path) is not None:
        raise other_command(output.journal_path, "engine local, now ray")
    most_tasks = None if workers is None or address is None else max(workers // task_workers, 1)
    parts = Parts(output.parts_path.absolute(), job.on_error)
    with _connected(ray, address, workers), parts, output:
        parts.begin(restart)
        plan = plan_tasks(job, parts.folder, shard_bytes, task_workers)
        with _Flight(ray, job, plan, parts, task_workers, most_tasks, stop) as flight:
            _join(job, output, parts, plan, flight)
        output.check_complete()
    encoder = "; ".join(sorted(flight.encoders)) or job.tokenizer.encoder
    return [replace(summary, encoder=encoder) for summary in output.summaries()]


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_task_oom_retries", str(_MAX_RETRIES))  # Ray would try for ever
    try:
        import ray
    except ImportError:
        raise ConfigError(97, "--engine ray", "needs the library ray, which this Python lacks",
                          "run: pip install 'megatron_hammer[ray]'") from None  # fmt: skip
    return ray


@contextmanager
def _connected(ray: Any, address: str | None, workers: int | None) -> Iterator[None]:
    """A cluster to send tasks to. One that the calling program is connected to is taken, and stays connected."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        cpus = usable_cores() if workers is None else workers
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        if address is not None and (place := _HOST_PORT.fullmatch(address)):
            socket.create_connection((place[1], int(place[2])), _CONNECT_SECONDS).close()  # Ray tries for minutes
        ray.init("local" if address is None else address, **options)
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        what, rule = ("--engine ray", "could not start Ray on this machine")
        if address is not None:
            what, rule = f"--address {address}", "is no Ray cluster that answers"
        raise ConfigError(98, what, f"{rule} ({error})", "see ray status; ray start --head begins one") from None
    finally:
        if main and on_term is not None:
            signal.signal(signal.SIGTERM, on_term)  # Ray puts its own in place, which would end us at once
    try:
        yield
    finally:
        ray.shutdown()


class _Flight:
    """Sends the tasks to the cluster in their order, a bounded number at a time; the ``with`` block ends them all."""

    def __init__(
        self,
        ray: Any,
        job: Job,
        plan: list[list[PartTask | HashTask]],
        parts: Parts,
        task_workers: int,
        most_tasks: int | None,
        stop: threading.Event | None,
    ) -> None:
        self.ray, self.parts, self.task_workers, self.most_tasks, self.stop = ray, parts, task_workers, most_tasks, stop
        self.encoders: set[str] = set()
        self._nodes: dict[str, int] = {}  # parts that each made
        self._found = 0  # parts of the run before
        self._todo = iter([task for tasks in plan for task in tasks])
        self._running: dict[Any, PartTask | HashTask] = {}
        self._done: dict[str, HammerError | None] = {}
        self._failed = False
        self._room, self._room_until = 0, 0.0
        self._lost_since: float | None = None
        self._text_bytes = self._tokens = 0  # of this run
        options = {"num_cpus": task_workers, "max_retries": _MAX_RETRIES, "scheduling_strategy": "SPREAD"}
        self._remote = ray.remote(**options)(_task_with_node)
        size = sum(path.stat().st_size for path in job.files)
        self._progress = Progress(" ".join(job.keys), size, note=self._describe_rates)

    def __enter__(self) -> _Flight:
        self._check_nodes()
        self._progress.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.__exit__(kind, error, trace)
        for reference in self._running:
            self.ray.cancel(reference, force=True)
        if self._running:
            self.ray.wait(list(self._running), num_returns=len(self._running), timeout=10)
        if kind is None:
            nodes = f"{len(self._nodes)} node{'' if len(self._nodes) == 1 else 's'} of the Ray cluster"
            found = f", {self._found:,} were there" if self._found else ""
            say(f"{number_of(sum(self._nodes.values()))} made on {nodes}{found}")

    def wait(self, task: PartTask | HashTask) -> None:
        """Until a task is done; the others go on.

        Raises:
            HammerError: what the task met.
            Stopped: the user has enough.
        """
        while True:
            self._fill()
            if task.name in self._done:
                error = self._done[task.name]
                if error is not None:
                    raise error
                return
            if self.stop is not None and self.stop.is_set():
                raise Stopped("stopped before the first part was done")
            self._poll()

    def _fill(self) -> None:
        """Send tasks while there is room. After an error no more are: all that come before it are on their way.

        It need not end the work: behind the damage of a file what its ranges hold does not count.
        """
        while len(self._running) < (min(self._most_running(), 1) if self._failed else self._most_running()):
            task = next(self._todo, None)
            if task is None:
                return
            if task.name in self._done or task.name in {other.name for other in self._running.values()}:
                continue  # the same file is named once more
            facts = self.parts.find(task)
            if facts is None:
                self.parts.drop(task)
                self._running[self._remote.remote(task, __version__)] = task
                continue
            self._done[task.name] = None
            if isinstance(task, PartTask):
                self._found += 1
                self._progress.pass_over(facts["raw_bytes"])

    def _most_running(self) -> int:
        """Twice what the cluster can work on, so that no node waits for us; nodes come and go."""
        if self.most_tasks is not None:
            return self.most_tasks
        now = time.monotonic()
        if now > self._room_until:
            cpus = int(self.ray.cluster_resources().get("CPU", 0))
            self._room, self._room_until = max(2 * cpus // self.task_workers, 2), now + _LIMIT_SECONDS
        return self._room

    def _poll(self) -> None:
        ready, _ = self.ray.wait(list(self._running), num_returns=1, timeout=_GLANCE_SECONDS)
        if not ready:
            return self._check_alive()
        self._lost_since = None
        task = self._running.pop(ready[0])
        result = self._result(ready[0], task)
        error = result.get("error")
        self._done[task.name] = error
        self._failed = self._failed or error is not None
        if error is None and isinstance(task, PartTask):
            self._nodes[result["node"]] = self._nodes.get(result["node"], 0) + 1
            self.encoders.add(result["encoder"])
            self._text_bytes += result["text_bytes"]
            self._tokens += result["tokens"]
            self._progress.advance(result["raw_bytes"])

    def _describe_rates(self) -> str:
        return f"text: {rates(self._text_bytes, self._tokens, self._progress.seconds)}"

    def _result(self, reference: Any, task: PartTask | HashTask) -> dict[str, Any]:
        result: dict[str, Any]
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if "failed to import" not in str(error):
                raise  # a mistake of ours
            remedy = f"install megatron_hammer {__version__} in the Python of every node"
            result = {"error": to_fields(DataError(75, "a node of the cluster", "lacks megatron_hammer", remedy))}
        except self.ray.exceptions.RayError as error:
            text = str(error).strip().splitlines() or [""]
            lost = ConfigError(
                98, f"the Ray task of {task.path}", f"lost its worker {_MAX_RETRIES + 1} times "
                f"({type(error).__name__}: {text[0]})", "see that the nodes stay up and have memory (ray status, logs "
                "in /tmp/ray of the node), then give the same command again",
            )  # fmt: skip
            result = {"error": to_fields(lost)}
        if "error" in result:
            result["error"] = from_fields(result["error"])
        return result

    def _check_nodes(self) -> None:
        """Refuse tasks that no node can run."""
        most = max((node["Resources"].get("CPU", 0) for node in self.ray.nodes() if node["Alive"]), default=0)
        if most < self.task_workers:
            raise ConfigError(98, f"--workers-per-task={self.task_workers}",
                              f"is more than the CPUs of any node of the Ray cluster: at most {most:g}",
                              "lower it, or add a node")  # fmt: skip

    def _check_alive(self) -> None:
        """Nothing has ended: give up where nothing will, as no node is left that could run a task."""
        try:
            self._check_nodes()
        except ConfigError:
            now = time.monotonic()
            if self._lost_since is None:
                self._lost_since = now
            elif now - self._lost_since > _LOST_SECONDS:
                raise
        else:
            self._lost_since = None


def _task_with_node(task: PartTask | HashTask, version: str) -> dict[str, Any]:
    """``run_task``, and the node's name: what Ray calls in a worker process."""
    import ray

    result = run_task(task, version)
    if isinstance(task, PartTask):
        result["node"] = ray.get_runtime_context().get_node_id()
    return result


# ---- parts -> datasets ----


def _join(
    job: Job, output: DatasetOutput, parts: Parts, plan: list[list[PartTask | HashTask]], flight: _Flight
) -> None:
    """Append all parts in order, each when it is there."""
    for source, tasks in enumerate(plan):
        path, lines = job.files[source], 0
        for task in tasks:
            if isinstance(task, HashTask):
                continue
            try:
                flight.wait(task)
            except HammerError as error:
                raise _with_true_place(error, path, task, lines) from None
            facts = parts.await_visible(task)
            _append(output, source, parts.folder / task.name, facts, task, lines)
            lines += facts["lines"]
            if facts["damaged"]:
                break  # a local run reads nothing behind it either
        if isinstance(tasks[0], HashTask):
            flight.wait(tasks[0])
            output.journal.tallies[source].xxh3 = parts.await_visible(tasks[0])["xxh3"]
        check_unchanged(path, output.journal.files[source])
    output.journal.source = len(plan)


def _append(
    output: DatasetOutput, source: int, folder: Path, facts: dict[str, Any], task: PartTask, lines_before: int
) -> None:
    journal, given = output.journal, output.job.files[source]
    for k, writer in enumerate(output.writers.values()):
        writer.append(IndexedDataset(folder / str(k)))
    part = Tally(**facts["tally"])
    tally = journal.tallies[source]
    tally.documents += part.documents
    tally.xxh3 = part.xxh3
    for counts, more in ((tally.tokens, part.tokens), (tally.rejected, part.rejected)):
        for name, count in more.items():
            counts[name] = counts.get(name, 0) + count
    journal.text_bytes += facts["text_bytes"]
    journal.raw_bytes += facts["raw_bytes"]
    if output.rejected is None or not part.rejected:
        return
    with open_regular(folder / REJECTED, follow=False) as file:
        for line in file:
            record = orjson.loads(line)
            ours, theirs = (str(path).encode("utf-8", "backslashreplace").decode() for path in (given, task.path))
            record["file"] = os.fsencode(given).decode("utf-8", "backslashreplace")
            record["message"] = _true_place(record["message"], ours, theirs, task, lines_before)
            if task.counts_lines:
                record["line"] += lines_before + 1 - UNKNOWN_LINE
            output.rejected.write_record(record)


def _with_true_place(error: HammerError, given: Path, task: PartTask, lines_before: int) -> HammerError:
    fields = to_fields(error)
    fields["what"] = _true_place(error.what, str(given), str(task.path), task, lines_before)
    return from_fields(fields)


def _true_place(text: str, ours: str, theirs: str, task: PartTask, lines_before: int) -> str:
    """A message that begins with the file's absolute path and, it may be, a line of the shard: put right."""
    if not text.startswith(theirs):
        return text
    rest = text[len(theirs) :]
    place = _PLACE.match(rest)
    if task.counts_lines and place is not None:
        rest = f":{int(place[1]) + lines_before + 1 - UNKNOWN_LINE}{rest[place.end() :]}"
    return ours + rest
