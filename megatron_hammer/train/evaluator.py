"""Evaluation of committed checkpoints in a process of its own (``train.evaluator``), which training never waits for.

::

    rank 0:   committed(checkpoint) --> due? --> [process: nice, reads the checkpoint, evaluates, appends its line] --+
              poll(), each step     <-- exit code, the line in OUT/evaluations.jsonl  <------------------------------+
                '--> TensorBoard (at the checkpoint's step), trackers (at the present step)

There is one process at a time, a new one for each checkpoint: one that is killed, hangs or finds no room on the disk
costs that evaluation and a warning. While one works, the newest checkpoint that is due waits; older ones are passed
over. The process dies with rank 0. All that training does is to start it and to ask whether it has ended; it opens no
file of the run's but its own, so the bits of a run are the same with and without.

``evaluations.jsonl`` has a line a step, ``{"step": 500, "evaluation/zh/loss": ...}``. A run that goes on from a
checkpoint cuts it back to that step, as it does with metrics.jsonl, and evaluates the checkpoint itself if its line is
missing. Needs no torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_hammer.base.reading import open_regular, parse_json
from megatron_hammer.checkpoint.folder import step_of
from megatron_hammer.config import Config
from megatron_hammer.metrics.metrics_file import MetricsFile, read_lines

EVALUATIONS, LOG = "evaluations.jsonl", "evaluator.log"
_POLL_SECONDS = 0.05  # at the end of a run, between two looks
_KILL_SECONDS = 5.0  # one that waits for a disk that does not answer cannot be killed: it ends when that does
_LOG_BYTES = 2000  # of the log's end, in which the reason of a failure stands
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Evaluator:
    """Rank 0's side; a context manager that ends the process with the run.

    Args:
        config: of a run with ``train.evaluator``.
        start: the checkpoint that the run goes on from; None for a new one.
        report: gets each result: a line of the file.
        warn: called with a line on what went wrong.
    """

    def __init__(
        self,
        config: Config,
        start: Path | None,
        report: Callable[[Mapping[str, Any]], None],
        warn: Callable[[str], None],
    ) -> None:
        settings = config.train.evaluator
        assert settings is not None
        self._settings, self._config, self._report, self._warn = settings, config, report, warn
        self._output = Path(config.train.output).resolve()
        self._process: subprocess.Popen[bytes] | None = None
        self._working: Path | None = None
        self._waiting: Path | None = None
        self._began = 0.0
        self._done = False
        """Whether the run has done all its steps, so that its last checkpoint is worth waiting for."""
        self._cut_back(0 if start is None else step_of(start))
        if start is not None and step_of(start) and self._line(step_of(start)) is None:
            self.committed(start)

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._done:
            self._finish()
        self._end_process()

    def committed(self, checkpoint: Path) -> None:
        """A checkpoint is there: it is evaluated as soon as nothing else is, if it is due."""
        step, interval = step_of(checkpoint), self._settings.interval_steps
        self._done = step == self._config.train.num_steps
        if not (self._done or interval is None or step % interval == 0):
            return
        if self._waiting is not None:
            self._warn(f"note: {self._waiting.name} is not evaluated: train.evaluator is still at work on an older one")
        self._waiting = checkpoint
        self.poll()

    def poll(self) -> None:
        """Look whether the process has ended, and start the next; takes microseconds and never raises."""
        if self._process is not None:
            if self._process.poll() is None:
                if time.monotonic() - self._began < self._settings.timeout_seconds:
                    return
                self._end_process()
                self._failed(f"took longer than {self._settings.timeout_seconds:g} s")
            else:
                self._ended(self._process.returncode)
            self._process = self._working = None
        if self._waiting is not None:
            self._working, self._waiting = self._waiting, None
            self._start(self._working)

    def _start(self, checkpoint: Path) -> None:
        task = {
            "checkpoint": str(checkpoint),
            "step": step_of(checkpoint),
            "results": str(self._output / EVALUATIONS),
            "parent": os.getpid(),
            "sets": self._settings.sets or self._config.data.valid or {},
            "samples": self._settings.samples,
            "command": self._settings.command,
            "prompts": self._settings.prompts,
            "new_tokens": self._settings.new_tokens,
            "device": self._settings.device,
            "threads": self._settings.threads,
            "nice": self._settings.nice,
        }
        environment = os.environ | dict.fromkeys(_THREAD_VARIABLES, str(self._settings.threads))
        if self._settings.device == "cpu" and self._settings.command is None:
            environment["CUDA_VISIBLE_DEVICES"] = ""  # a context on the GPU would cost the run memory there
        self._began = time.monotonic()
        try:
            with self._log() as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "megatron_hammer.evaluation.checkpoint_process", json.dumps(task)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                    start_new_session=True,  # a signal for the run, Ctrl-C say, is not meant for it
                )  # fmt: skip
        except OSError as error:
            self._failed(f"could not be started: {error}")
            self._working = None

    def _log(self) -> Any:
        """Where the process prints; nowhere, on a disk that has no room."""
        try:
            return (self._output / LOG).open("ab")
        except OSError:
            return open(os.devnull, "ab")

    def _ended(self, code: int) -> None:
        """Report the result of a process that has ended, or why there is none."""
        assert self._working is not None
        line = self._line(step_of(self._working)) if code == 0 or self._settings.prompts else None
        if line is not None:  # also where only the texts of prompts, which come after it, could not be written
            self._report(line)
        if code == 0 and line is not None:
            return
        if code < 0:
            self._failed(f"was ended by signal {-code}")
        else:
            self._failed(self._last_words() or f"ended with exit code {code} and no result")

    def _failed(self, why: str) -> None:
        name = "" if self._working is None else self._working.name
        self._warn(
            f"warning: train.evaluator: the evaluation of {name} {why}; the run goes on, see {self._output / LOG}, or "
            f"evaluate it by hand: python tools/evaluate.py {self._output} --step {step_of(Path(name))}"
        )

    def _last_words(self) -> str:
        """The last line of the log."""
        with suppress(OSError, ValueError):
            with open_regular(self._output / LOG, follow=False) as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_BYTES))
                lines = file.read().decode(errors="replace").strip().splitlines()
            return f"failed ({lines[-1]})" if lines else ""
        return ""

    def _cut_back(self, last_step: int) -> None:
        """Take lines of steps out that the run will do again."""
        path = self._output / EVALUATIONS
        try:
            if os.path.lexists(path):
                MetricsFile(path, last_step, self._warn).close()
        except OSError as error:
            self._warn(f"warning: train.evaluator: {path} could not be cut back to step {last_step}: {error}")

    def _line(self, step: int) -> dict[str, Any] | None:
        """What the file has of a step."""
        with suppress(OSError, ValueError):
            for found, text in read_lines(self._output / EVALUATIONS).lines:
                if found == step:
                    return dict(parse_json(text))
        return None

    def _finish(self) -> None:
        """Wait for the evaluation of the last checkpoint, no longer than asked for."""
        deadline = time.monotonic() + self._settings.finish_seconds
        self.poll()
        while self._process is not None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            self.poll()
        if self._process is not None:
            self._failed(f"was not over {self._settings.finish_seconds:g} s after the end of the run")

    def _end_process(self) -> None:
        """Kill the process and what it has started."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_SECONDS)
