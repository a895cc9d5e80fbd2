"""The self-test: six parts that check whether this installation computes what it must, each in a process of its own.

``tools/selftest.py`` runs it. The parts (``selftest_parts.py``) are started one after the other in a temporary folder;
a part that is wrong, crashes or does not end is named with its remedy, and the others still run. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import from_fields
from megatron_hammer.base.reading import read_regular
from megatron_hammer.base.signals import Stopped, StopRequest
from megatron_hammer.verify.golden import WRONG
from megatron_hammer.verify.selftest_parts import NOT_TRIED, PARTS, VERDICT, SelftestPart

PART_SECONDS = 300.0  # a part takes some ten seconds on two cores; one that takes this long hangs
POLL_SECONDS = 0.05
LAST_LINES = 40  # of a failed part's output, for the report
EXIT_WRONG = 5
SURROUNDINGS = ("SLURM_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_", "HAMMER_TRACEBACK")
"""Variables of a job that the self-test is no rank of."""


@dataclass(frozen=True)
class PartResult:
    """What came of one part."""

    name: str
    seconds: float
    found: str
    """What was compared; of a part that failed: what is wrong."""
    exit_code: int = 0
    """0 where it passed."""
    cure: str = ""
    output: tuple[str, ...] = ()
    """The last lines that a failed part printed."""

    @property
    def word(self) -> str:
        """What became of the part, in one word."""
        return "FAILED" if self.exit_code else "skipped" if self.found.startswith(NOT_TRIED) else "passed"

    def lines(self) -> list[str]:
        """The result for people: one line, and of a part that failed its cure."""
        line = f"{self.word:7} {self.name:10}{self.seconds:6.1f} s  {self.found}"
        return [line, f"{'':27}-> {self.cure}"] if self.exit_code else [line]


def run_parts(parts: Sequence[SelftestPart], folder: Path, stop: StopRequest) -> Iterator[PartResult]:
    """Each part when it is done.

    Args:
        folder: empty; a part has a folder of its own in it.

    Raises:
        Stopped: ``stop`` was received; the part under way is ended.
    """
    for part in parts:
        place = folder / part.name
        place.mkdir()
        yield run_part(part, [sys.executable, "-P", "-m", "megatron_hammer.verify.selftest_parts"], place, stop)


def run_part(part: SelftestPart, command: Sequence[str], folder: Path, stop: StopRequest) -> PartResult:
    """Run ``command PART FOLDER`` to its end and read the verdict that it leaves."""
    log, started = folder.with_suffix(".log"), time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, part.name, str(folder)],
            env=environment(folder.parent),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = _wait(process, stop)
        finally:  # with all that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - started
    lines = tuple(read_regular(log).decode("utf-8", "replace").splitlines()[-LAST_LINES:])
    verdict: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        verdict = json.loads(read_regular(folder / VERDICT))
    if "error" in verdict:
        error = from_fields(verdict["error"])
        cure = part.cure if error.code == f"E{EXIT_WRONG}{WRONG}" else error.remedy
        return PartResult(part.name, seconds, f"[{error.code}] {error.what} {error.rule}", error.exit_code, cure, lines)
    if "found" in verdict and code == 0:  # what crashes or hangs at its very end would do so in a run, too
        return PartResult(part.name, seconds, verdict["found"])
    return PartResult(part.name, seconds, _bad_end(code, lines), EXIT_WRONG, part.cure, lines)


def _wait(process: subprocess.Popen[bytes], stop: StopRequest) -> int | None:
    """The exit code; None where the process does not end in time."""
    deadline = time.monotonic() + PART_SECONDS
    while (code := process.poll()) is None:
        if stop.received:
            raise Stopped
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_SECONDS)
    return code


def _bad_end(code: int | None, lines: Sequence[str]) -> str:
    if code is None:
        return f"did not end within {PART_SECONDS:g} s"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"crashed with {name}: a compiled part, or a library, does not fit this machine"
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"crashed with exit code {code}: {said}"


def environment(temporary: Path) -> dict[str, str]:
    """The environment of the parts: no job around them, no network, one thread each, this package.

    Args:
        temporary: where libraries leave what they keep for a next time, such as torch's compiler.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SURROUNDINGS)}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return kept | fixed | {"TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(temporary)}


def selftest_exit_code(results: Sequence[PartResult]) -> int:
    """5 where a result is wrong or a part crashed; else that of the first failure; 0 where all passed."""
    codes = [result.exit_code for result in results if result.exit_code]
    return EXIT_WRONG if EXIT_WRONG in codes else next(iter(codes), 0)


def selftest_summary(results: Sequence[PartResult]) -> str:
    """The last line of the report."""
    names = {word: [r.name for r in results if r.word == word] for word in ("passed", "skipped", "FAILED")}
    passed, seconds = len(names["passed"]), sum(result.seconds for result in results)
    if passed == len(results):
        return f"all {passed} parts passed in {seconds:.0f} s"
    said = {"not tried here": names["skipped"], "failed": names["FAILED"]}
    rest = "".join(f"; {what}: {', '.join(which)}" for what, which in said.items() if which)
    return f"{passed} of {len(results)} parts passed in {seconds:.0f} s{rest}"


def chosen(names: Sequence[str]) -> list[SelftestPart]:
    """The parts of these names in their order; all where none is named."""
    return [part for part in PARTS if not names or part.name in names]
