"""Everything worth a GPU, in parts that each take less than 8 minutes; a session that has a GPU runs it first.

    python benchmarks/gpu_suite.py --part ceilings matmul kernels      what is already measured today is not done again
    python benchmarks/gpu_suite.py --report                            Markdown from all of RESULTS; needs no GPU

After each entry the part's results are written to RESULTS/gpu_suite-PART-DEVICE-DATE.json, so a run that is cut off
loses one entry; the same command goes on from there. No entry begins that would not end within --limit. Entries run in
a process of their own, or of their part, which is replaced when its GPU does not work any more: what fails, hangs or
crashes is a line in the report, which is RESULTS/DEVICE-DATE.md.

Where the package is not installed, `python setup.py build_ext --inplace` builds its extensions, and PYTHONPATH=. finds
it. Peers that the machine lacks travel as wheels (5 MB in all), unpacked into a temporary folder by `--wheels wheels`.
What lies in a folder of its own, wheels/NAME, only the peer of that name gets to see: with `datasets` at hand, for
example, transformers imports it.

    get="pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp
        --platform manylinux_2_28_x86_64"
    $get -d wheels liger-kernel==0.8.5 cut-cross-entropy==25.1.1 megatron-core==0.16.1
    $get -d wheels/torchtitan torchtitan==0.2.2 torchdata==0.11.0 tyro docstring_parser typeguard datasets==4.7.0 dill
        multiprocess

torchtitan 0.3 imports only in a torch newer than 2.11. --small runs every part at toy size on whatever device there is,
with torch.compile switched off: the tests run it on the CPU, so that the suite itself is known to work.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MARK = "result of the entry: "
EVERYBODY = "everybody"  # folder of the packages that all processes see
SLOWER_AT_MOST = 1.5  # than predicted: one entry that hangs shall not keep all others from beginning
START_SECONDS = 120  # for a process to import torch and see the device; seen: 5 to 15


@dataclass(frozen=True)
class Part:
    """Entries by name, made where they run by ``items(bench)`` of this module and function."""

    about: str
    minutes: float
    """Predicted on an H100, with compilation."""
    items: str
    isolated: bool = False
    """Each entry is a process of its own."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Predicted for entries whose names begin so; the others take an equal share of the minutes."""
    stop_seconds: float = 120
    """After which an entry is taken to hang."""

    def predicted_seconds(self, entry: str, entries: int) -> float:
        found = [seconds for name, seconds in self.seconds.items() if entry.startswith(name)]
        return found[0] if found else 60 * self.minutes / entries


END_TO_END = {"HammerLLM": 125, "compile": 110, "both": 100, "torchtitan": 65, "FSDP2": 65, "Megatron": 60, "": 42}
PARTS = {  # in the order of their use
    "ceilings": Part("copy bandwidth; 8192^3 products in bf16 and fp8, burst and 5 s", 0.5, "ceilings:items"),
    "matmul": Part("every product of the step, the head at both vocabularies", 0.4, "matmul:items"),
    "kernels": Part("norm, RoPE, SwiGLU, cross-entropy, AdamW: ours and peers", 1.5, "kernels:items"),
    "head": Part("output head and loss: ours and peers", 1.7, "head:items"),
    "attention": Part("every backend and SDPA's own kernels", 0.8, "attention:items"),
    "tests": Part("the tests marked gpu", 3, "marked_tests:items", stop_seconds=270),
    "step": Part("end to end against the peers, alternating: two calls", 17, "step:competition", True, END_TO_END, 300),
    "loop": Part("the real loop on a dataset: p99, waits for data", 1, "loop:items", True, {}, 200),
    "optimizer": Part(
        "clipping and AdamW; accumulation 16 checked", 2, "step:optimizer", True, {"step": 55, "": 25}, 200
    ),
    "memory": Part("peak memory at each way to recompute", 1.5, "step:memory", True, {}, 200),
    "tables": Part(
        "HammerLLM's tables: flash attention, compile, pieces", 7, "step:tables", True, {**END_TO_END, "": 60}, 300
    ),
    "choices": Part("our own settings, one at a time", 9, "step:choices", True, END_TO_END, 300),
}


class Results:
    """The file of one part, written after every entry."""

    def __init__(self, folder: Path, part: str, device: str, versions: Mapping[str, str], small: bool) -> None:
        name = device.replace(" ", "_")
        self.path = folder / f"gpu_suite-{part}-{name}-{datetime.date.today()}.json"
        self.tree: dict[str, Any] = {"part": part, "device": device, "small": small, "items": {}}
        if self.path.exists():
            self.tree = json.loads(self.path.read_text(encoding="utf-8"))
        self.tree["versions"] = dict(versions)

    @property
    def entries(self) -> dict[str, Any]:
        return self.tree["items"]  # type: ignore[no-any-return]

    def has(self, name: str) -> bool:
        """Measured, or known to be missing; what failed is tried again."""
        return name in self.entries and "error" not in self.entries[name]

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.entries[name] = result
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.tree, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


# ---- the process that measures ---------------------------------------------------------------------------------------


def serve(small: bool, packages: str) -> None:
    """Answer questions, one JSON a line, to the end of input: what is here, a part's entries, an entry's result."""
    import torch
    from gpu.measure import Bench, attempt, versions

    there = torch.cuda.is_available()
    if not there and not small:
        raise SystemExit("no CUDA device: use --small to try the suite itself")
    device = torch.device("cuda", 0) if there else torch.device("cpu")
    for line in sys.stdin:
        question = json.loads(line)
        bench = Bench(device, small, question.get("known", {}), packages, question.get("limit", math.inf))
        answer: Any = {"device": bench.name, "versions": dict(versions())}
        if "part" in question:
            module, _, function = PARTS[question["part"]].items.partition(":")
            items = getattr(importlib.import_module(f"gpu.{module}"), function)(bench)
            answer = list(items)
            if "entry" in question:
                answer = attempt(items[question["entry"]])
                answer["device_works"] = bench.give_back_memory()
        print(f"\n{MARK}{json.dumps(answer)}", flush=True)  # on a line of its own, whatever a library has printed


class Server:
    """The process behind ``serve``, by its command line; started with the first question, and anew after ``end``."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = command
        self.process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by end
        process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(process, self.lines), daemon=True).start()
        return process

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                lines.put(line.removeprefix(MARK))
        lines.put(None)

    def ask(self, seconds: float, **question: Any) -> Any:
        """The answer; where there is none, a dictionary with the key "error", and the process is gone."""
        self.process = self.process or self._start()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended = self.process.poll()  # before looking for its last words; what it started may hold the pipe open
            with contextlib.suppress(queue.Empty):
                line = self.lines.get(timeout=min(1.0, max(0.0, end - time.monotonic())))
                if line is not None:
                    return json.loads(line)
                ended = self.process.wait()
            if ended is not None:
                return {"error": f"exit code {ended}: {self.end()}"}
        return {"error": f"not done after {seconds:.0f} s", "said": self.end()}

    def end(self) -> str:
        """Stop the process and all that it started; the end of what it wrote to standard error."""
        if self.process is None:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may take its time to let go of it
            self.process.wait(timeout=30)
        self.process = None
        self.errors.seek(0)
        said = " ".join(self.errors.read().split())[-600:]
        self.errors.close()
        return said


# ---- the one that asks -----------------------------------------------------------------------------------------------


def run_part(name: str, server: Server, here: Mapping[str, Any], arguments: argparse.Namespace, end: float) -> str:
    """Measure what of a part is not measured yet, while there is time; why nothing could be, or an empty string."""
    part, results = PARTS[name], Results(arguments.results, name, here["device"], here["versions"], arguments.small)
    entries = server.ask(START_SECONDS, part=name, known=results.entries)
    if not isinstance(entries, list):
        print(f"{name}: {entries['error']}", flush=True)
        return f"{name}: {entries['error']}"
    slower, skipped = 1.0, []  # than predicted, so far
    for entry in entries:
        if not arguments.again and results.has(entry):
            continue
        predicted = 0.0 if arguments.small else part.predicted_seconds(entry, len(entries))
        while True:
            left = end - time.monotonic()
            if left < predicted * slower or left <= 0:
                skipped.append(entry)
                break
            began = time.monotonic()
            limit = min(left, part.stop_seconds)
            result = server.ask(limit, part=name, entry=entry, known=results.entries, limit=limit)
            if predicted:
                slower = min(SLOWER_AT_MOST, max(slower, (time.monotonic() - began) / predicted))
            device_works = result.pop("device_works", False)
            results.add(entry, result)
            print(f"{name} | {entry} | {json.dumps(_told(result))}", flush=True)
            if not device_works or (part.isolated and not arguments.small):
                server.end()
            if result.get("did_not_fit", 1) == 1:
                break
    if skipped:
        print(f"{name}: no time for {', '.join(skipped)}; run the same command again", flush=True)
    return ""


def _told(result: Mapping[str, Any]) -> dict[str, Any]:
    """Of a result, what a line on the screen has room for."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items() if not isinstance(v, list)}


def unpack(wheels: Path) -> str:
    """Make the wheels of a folder importable in the processes that this one starts; where those of its folders are."""
    root = Path(tempfile.mkdtemp(prefix="gpu-suite-"))
    for wheel in sorted(wheels.rglob("*.whl")):
        with zipfile.ZipFile(wheel) as file:  # as pip does: none of them has scripts that matter
            file.extractall(root / (wheel.parent.name if wheel.parent != wheels else EVERYBODY))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(root / EVERYBODY))))
    return str(root)


def parse() -> argparse.Namespace:
    """The command line; --help lists the parts."""
    described = "\n".join(f"  {name:<10} {part.minutes:>4} min  {part.about}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=list(PARTS), help="default: all, in this order")
    parser.add_argument("--limit", type=float, default=480, help="seconds for this call (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what is measured already, too")
    parser.add_argument("--report", action="store_true", help="write the report; without --part nothing is measured")
    parser.add_argument("--wheels", type=Path, help="folder with peers' wheels")
    parser.add_argument("--small", action="store_true", help="toy shapes")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # be the process that measures; folder of peers' packages
    return parser.parse_args()


def main() -> None:
    """Run the parts asked for, then write the report if asked for; a part that cannot begin stops no other."""
    end = time.monotonic()
    arguments = parse()
    end += arguments.limit
    if arguments.serve is not None:
        serve(arguments.small, arguments.serve)
        return
    if arguments.small:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than all else
    packages = unpack(arguments.wheels) if arguments.wheels else ""
    arguments.results.mkdir(parents=True, exist_ok=True)
    names, failed = arguments.part or ([] if arguments.report else list(PARTS)), list[str]()
    if names:
        server = Server([sys.executable, __file__, "--serve", packages, *(["--small"] if arguments.small else [])])
        try:
            here = server.ask(START_SECONDS)
            if "error" in here:
                raise SystemExit(here["error"])
            failed = [why for name in names if (why := run_part(name, server, here, arguments, end))]
        finally:
            server.end()
    if arguments.report:
        from gpu.report import write_reports

        print("\n".join(map(str, write_reports(arguments.results))))
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
