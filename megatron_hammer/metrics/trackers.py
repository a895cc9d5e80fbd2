"""Sends the figures of metrics.jsonl to experiment trackers (``log.trackers``), without ever delaying a step.

::

    Reporter.step -> lines of each tracker (bounded) -> its thread -> its process (tracker_process.py) -> service

The loop only appends to a list. Each tracker has a thread that feeds a process of its own, in which the client library
runs. A service that fails, or is slower than the run for so long that the list is full, costs one warning; at the end
all trackers together have ``CLOSE_SECONDS`` to deliver what is left, and a process that hangs then is killed. Whether
the named libraries are there is found out at the start (``check_trackers``). Needs no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config, config_to_tree
from megatron_hammer.metrics.tracked_run import TrackedRun
from megatron_hammer.metrics.tracker_process import CLIENTS

KEPT_LINES = 10_000  # of about 500 bytes: what a run of a step a second makes while a service is away for three hours
CLOSE_SECONDS = 30.0  # a scheduler that stops a run kills it a minute or more later; by then the checkpoint is written
CHECK_SECONDS = 120.0  # mlflow takes four seconds to import from a local disk; a cold network file system, much longer


def command(name: str, *arguments: str) -> list[str]:
    """How a tracker's process is started."""
    return [sys.executable, "-m", "megatron_hammer.metrics.tracker_process", name, *arguments]


def check_trackers(names: Sequence[str]) -> None:
    """Import the library of each named tracker, all at once, each in a process of its own.

    Raises:
        ConfigError: one is missing, or cannot be imported.
    """
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    started = {
        name: subprocess.Popen(command(name, "--check"), stdin=null, stdout=pipe, stderr=null, text=True)
        for name in names
    }
    reasons = {name: _reason(process) for name, process in started.items()}
    for name, reason in reasons.items():
        packages = CLIENTS[name].packages
        if reason == "missing":
            raise ConfigError(
                17,
                f"log.trackers: {name}",
                "is named and its library is not installed here",
                f'pip install {packages} (or pip install -e ".[{name}]"), or take {name} out of log.trackers',
            )
        if reason:
            raise ConfigError(
                17,
                f"log.trackers: {name}",
                f"is named and its library cannot be imported ({reason})",
                f"pip install --upgrade {packages}, or take {name} out of log.trackers",
            )


def _reason(process: subprocess.Popen[str]) -> str:
    """Why the import failed, or an empty string."""
    try:
        said, _ = process.communicate(timeout=CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return f"still at it after {CHECK_SECONDS:.0f} s"
    return "" if process.returncode == 0 else said.strip() or f"exit code {process.returncode}"


class Tracker:
    """One service: its lines, the thread that hands them on, and the process with the client.

    Args:
        warn: gets the one warning.
    """

    def __init__(self, name: str, run: TrackedRun, warn: Callable[[str], None], kept_lines: int) -> None:
        self.name, self._run, self._warn, self._kept_lines = name, run, warn, kept_lines
        self._lines: deque[Mapping[str, Any]] = deque()
        self._changed = threading.Condition()
        self._closing = self._gone = self._warned = False
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Leave one step's line for the thread; waits for nothing."""
        with self._changed:
            if self._gone:
                return
            full = len(self._lines) >= self._kept_lines
            if not full:
                self._lines.append(line)
                self._changed.notify()
        if full:
            self._warn_once(f"has not taken the last {self._kept_lines:,} lines: later ones are left out")

    def begin_close(self, failed: bool) -> None:
        """No more lines come; what is left is delivered from now on."""
        with self._changed:
            if not self._gone:
                self._lines.append({"close": "failed" if failed else "done"})
            self._closing = True
            self._changed.notify()

    def end_close(self, deadline: float) -> None:
        """Wait for the delivery until the clock (``time.monotonic``) says ``deadline``, then end the process."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if not self._thread.is_alive():
            return
        self._warn_once(f"had not taken everything {CLOSE_SECONDS:.0f} s after the end of the run")
        with self._changed:
            self._gone = True
        self._end_process()

    def _end_process(self) -> None:
        """Kill the process if the run has given the service up. Both threads ask; the later one finds it."""
        process = self._process
        if self._gone and process is not None and process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def _next(self) -> Mapping[str, Any] | None:
        with self._changed:
            while not self._lines and not self._closing:
                self._changed.wait()
            return self._lines.popleft() if self._lines else None

    def _work(self) -> None:
        reason = self._serve()
        with self._changed:
            self._gone = True
            self._lines.clear()
        if reason:
            self._warn_once(f"failed ({reason})")

    def _serve(self) -> str:
        """Feed the process until the end or its failure; why it failed, or an empty string."""
        folder = Path(self._run.folder)
        if self._gone:
            return ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            pipe = subprocess.PIPE
            with (folder / f"{self.name}.log").open("ab") as log:
                self._process = process = subprocess.Popen(
                    command(self.name), stdin=pipe, stdout=pipe, stderr=log, encoding="utf-8",
                    start_new_session=True,  # a signal for the run, Ctrl-C say, is not meant for the client
                )  # fmt: skip
        except OSError as error:
            return str(error)
        self._end_process()  # it may have been given up while it started
        assert process.stdin is not None and process.stdout is not None
        try:
            message: Mapping[str, Any] | None = self._run.to_tree()
            while message is not None:
                process.stdin.write(json.dumps(message, ensure_ascii=False) + "\n")
                process.stdin.flush()
                message = self._next()
            process.stdin.close()
        except OSError:  # it has gone: what it said says why
            with suppress(OSError):
                process.stdin.close()
        code, said = process.wait(), process.stdout.read().strip()
        return "" if code == 0 or self._gone else said or f"its process ended with {code}"

    def _warn_once(self, what: str) -> None:
        with self._changed:
            if self._warned:
                return
            self._warned = True
        self._warn(
            f"warning: log.trackers: {self.name} {what}; the run goes on, metrics.jsonl has every step, and "
            f"{self._run.folder}/{self.name}.log has what the client printed"
        )


class Trackers:
    """All services of a run; none for most."""

    def __init__(
        self, config: Config, resumed: bool, environment: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        log, output = config.log, Path(config.train.output)
        run = TrackedRun(
            folder=str(output / "trackers"),
            project=log.tracker_project,
            name=log.tracker_run_name or output.resolve().name,
            offline=log.trackers_offline,
            resumed=resumed,
            config=config_to_tree(config),
            environment=dict(environment),
        )
        self.trackers = [Tracker(name, run, warn, KEPT_LINES) for name in log.trackers]

    def log(self, line: Mapping[str, Any]) -> None:
        """One step, as metrics.jsonl has it."""
        for tracker in self.trackers:
            tracker.log(line)

    def close(self, failed: bool = False) -> None:
        """Deliver what is left, all at the same time, and no longer than ``CLOSE_SECONDS``."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for tracker in self.trackers:
            tracker.begin_close(failed)
        for tracker in self.trackers:
            tracker.end_close(deadline)
