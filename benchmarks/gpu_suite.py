"""Everything worth a GPU, in parts that each take less than 8 minutes; a session that has a GPU runs it first.

    python benchmarks/gpu_suite.py --part ceilings matmul kernels      what is already measured today is not done again
    python benchmarks/gpu_suite.py --report                            Markdown from all results of this device and day

After each entry the part's results are written to RESULTS/gpu_suite-PART-DEVICE-DATE.json, so a run that is cut off
loses one entry; the same command goes on from there. No entry begins that would not end within --limit. An entry that
fails is a line in the report, which is RESULTS/DEVICE-DATE.md.

Where the package is not installed, `python setup.py build_ext --inplace` builds its extensions, and PYTHONPATH=. finds
it. Peers that the machine lacks travel as wheels (5 MB in all), installed into a temporary folder by `--wheels wheels`:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp
        --platform manylinux_2_28_x86_64 -d wheels liger-kernel==0.8.5 megatron-core==0.16.1 torchtitan==0.2.2
        torchdata tyro docstring_parser typeguard datasets==4.7.0 dill multiprocess     (these for torchtitan)

torchtitan 0.3 imports only in a torch newer than 2.11. --small runs every part at toy size on whatever device there is,
with torch.compile switched off: the tests run it on the CPU, so that the suite itself is known to work.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
MARK = "result of the entry: "


@dataclass(frozen=True)
class Part:
    """Entries by name, made when the part runs."""

    about: str
    minutes: float
    """Predicted on an H200, with compilation."""
    items: Callable[[Any], dict[str, Callable[[], dict[str, Any]]]]
    isolated: bool = False
    """Each entry is a process of its own."""


def run_tests(bench: Any) -> dict[str, Callable[[], dict[str, Any]]]:
    """The tests marked gpu: equality with the CPU, no synchronisation in a step, resume."""

    def run() -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", "tests"]
        if bench.small:  # collecting all tests takes longer than all else at toy size
            command[-1] = "tests/test_gpu.py"
        environment = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
        done = subprocess.run(command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True)
        return {"exit_code": done.returncode, "summary": done.stdout.strip().splitlines()[-15:]}

    return {"tests marked gpu": run}


def parts() -> dict[str, Part]:
    """All parts, in the order of their use."""
    from gpu import attention, ceilings, head, kernels, matmul, step

    return {
        "tests": Part("the tests marked gpu", 3, run_tests),
        "ceilings": Part("copy bandwidth; 8192^3 products in bf16 and fp8, burst and 5 s", 0.5, ceilings.items),
        "matmul": Part("every product of the step, the head at both vocabularies", 0.5, matmul.items),
        "kernels": Part("norm, RoPE, SwiGLU, cross-entropy, AdamW: ours and peers", 2, kernels.items),
        "attention": Part("every backend and SDPA's own kernels", 1, attention.items),
        "head": Part("output head and loss: ours and peers", 2, head.items),
        "step": Part("end to end against the peers, alternating: two calls of this part", 14, step.competition, True),
        "choices": Part("our own settings, one at a time", 7, step.choices, True),
        "optimizer": Part("clipping and AdamW; accumulation 16 checked", 2, step.optimizer, True),
        "tables": Part("HammerLLM's tables: flash attention, compile; 32,000 pieces", 6, step.tables, True),
        "memory": Part("peak memory at each way to recompute", 1.5, step.memory, True),
    }


class Results:
    """The file of one part, written after every entry."""

    def __init__(self, folder: Path, part: str, bench: Any) -> None:
        from gpu.measure import versions

        name = bench.name.replace(" ", "_")
        self.path = folder / f"gpu_suite-{part}-{name}-{datetime.date.today()}.json"
        self.tree: dict[str, Any] = {"part": part, "device": bench.name, "small": bench.small, "items": {}}
        if self.path.exists():
            self.tree = json.loads(self.path.read_text(encoding="utf-8"))
        self.tree["versions"] = dict(versions())

    def has(self, name: str) -> bool:
        """Measured, or known to be missing; what failed is tried again."""
        return name in self.tree["items"] and "error" not in self.tree["items"][name]

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.tree["items"][name] = result
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.tree, indent=1) + "\n", encoding="utf-8")
        new.replace(self.path)


def in_a_process(part: str, name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One entry in a fresh interpreter."""
    command = [sys.executable, __file__, "--part", part, "--entry", name, "--results", str(arguments.results)]
    command += ["--small"] if arguments.small else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        return {"error": f"exit code {done.returncode}: {' '.join(done.stderr.split())[-600:]}"}
    return json.loads(lines[-1].removeprefix(MARK))  # type: ignore[no-any-return]


def run_part(name: str, bench: Any, arguments: argparse.Namespace, end: float) -> None:
    """Measure what of a part is not measured yet, while there is time."""
    from gpu.measure import attempt

    part, results, longest = parts()[name], Results(arguments.results, name, bench), 0.0
    isolated, items = part.isolated and bench.cuda, part.items(bench)
    expected = 0.0 if bench.small else 60 * part.minutes / len(items)
    for entry, item in items.items():
        if not arguments.again and results.has(entry):
            continue
        left = end - time.monotonic()
        if left < max(longest, expected):
            print(f"{name}: {left:.0f} s are left; run the same command again for the rest", flush=True)
            return
        began = time.monotonic()
        result = in_a_process(name, entry, arguments, left) if isolated else attempt(item)
        longest = max(longest, time.monotonic() - began)
        results.add(entry, result)
        told = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items() if not isinstance(v, list)}
        print(f"{name} | {entry} | {json.dumps(told)}", flush=True)
        if bench.cuda:
            import torch

            torch.cuda.empty_cache()


def install(wheels: Path) -> None:
    """Make the wheels of a folder importable here and in the processes that this one starts."""
    target = tempfile.mkdtemp(prefix="gpu-suite-")
    for wheel in sorted(wheels.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", target, str(wheel)], capture_output=True, text=True)
        if done.returncode:
            print(f"{wheel.name}: {done.stderr.strip().splitlines()[-1]}", flush=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), target)))
    sys.path.append(target)


def parse() -> argparse.Namespace:
    """The command line; --help lists the parts."""
    described = "\n".join(f"  {name:<10} {part.minutes:>4} min  {part.about}" for name, part in parts().items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nparts:\n{described}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=list(parts()), help="default: all, in this order")
    parser.add_argument("--limit", type=float, default=480, help="seconds for this call (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what is measured already, too")
    parser.add_argument("--report", action="store_true", help="write the report; without --part nothing is measured")
    parser.add_argument("--wheels", type=Path, help="folder with peers' wheels")
    parser.add_argument("--small", action="store_true", help="toy shapes")
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--entry", help=argparse.SUPPRESS)  # one entry in this process, its result on standard output
    return parser.parse_args()


def main() -> None:
    """Run the parts asked for, then write the report if asked for."""
    if "--small" in sys.argv:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # before torch is imported: compiling takes longer than all else
    end = time.monotonic()
    arguments = parse()
    end += arguments.limit
    if arguments.wheels:
        install(arguments.wheels)
    import torch
    from gpu.measure import Bench, attempt
    from gpu.report import write_report

    if not torch.cuda.is_available() and not arguments.small:
        raise SystemExit("no CUDA device: use --small to try the suite itself")
    bench = Bench(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), arguments.small)
    if arguments.entry:
        (part,) = arguments.part
        bench = replace(bench, known=Results(arguments.results, part, bench).tree["items"])
        print(MARK + json.dumps(attempt(parts()[part].items(bench)[arguments.entry])))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    for name in arguments.part or ([] if arguments.report else list(parts())):
        run_part(name, bench, arguments, end)
    if arguments.report:
        print(write_report(arguments.results, bench.name, str(datetime.date.today())))


if __name__ == "__main__":
    main()
