"""Two sides of a comparison, each run a process of its own, in turns; medians and ratios.

A benchmark's module calls ``compare``, or ``run`` for one run; its ``main`` runs one side and prints one line of JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

OURS, PEER = "ours", "megatron-core"


class Measured:
    """Seconds and memory of a ``with`` block: wall, CPU, and the peak of this process above what it had before."""

    def __enter__(self) -> Measured:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # starts the peak anew
        self.before = memory_mb("VmRSS")
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.peak_mb = memory_mb("VmHWM")

    def report(self, **more: Any) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_mb": self.peak_mb,
            "before_mb": self.before,
            **more,
        }


def memory_mb(field: str) -> float:
    """A line of /proc/self/status in MiB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(f"{field}:")) / 1024


def p99(seconds: Sequence[float]) -> float:
    """The 99th percentile, nearest rank: the largest of fewer than 100."""
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


def run(script: str, *arguments: str) -> dict[str, Any]:
    """One process of a script in this folder; the JSON of its last line of output.

    Raises:
        SystemExit: it failed; with the end of what it said.
    """
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def compare(script: str, arguments: Sequence[str], rounds: int, peer: bool = True) -> dict[str, Any]:
    """Run ``script SIDE arguments...`` for each side in turn; medians, ratio of the seconds, and all rounds."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        for side in (OURS, PEER) if peer else (OURS,):
            runs.setdefault(side, []).append(run(script, side, *arguments))
    result: dict[str, Any] = {}
    for side, lines in runs.items():
        numbers = {k for k, v in lines[0].items() if isinstance(v, int | float)}
        medians = {k: statistics.median(line[k] for line in lines) for k in sorted(numbers)}
        result[side] = {**medians, **{k: v for k, v in lines[0].items() if k not in numbers}, "runs": lines}
    if peer:
        result["times as fast"] = result[PEER]["seconds"] / result[OURS]["seconds"]
        result["equal"] = [line.get("sha1") for line in runs[OURS]] == [line.get("sha1") for line in runs[PEER]]
    return result
