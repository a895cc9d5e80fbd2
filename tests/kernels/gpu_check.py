"""What works on this GPU and what does not, in two minutes: the first command of a session that has one.

    python -m tests.kernels.gpu_check [--out FOLDER] [--jobs 4] [-k WORD]

It prints the versions, why each backend that cannot run here cannot, and then a line for every test function marked
``gpu``. Each has a process of its own and a time limit: an illegal access or a hang spoils no other, whereas within one
process everything after a CUDA error fails. The output of what failed is in FOLDER. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_BEGUN = "no time was left for it"


@dataclass(frozen=True)
class Outcome:
    """Of one test function, all its parameters together."""

    name: str
    """File and function, as pytest takes it."""
    word: str
    """ok, skipped, FAILED, CRASHED or TIME."""
    seconds: float
    says: str
    """Pytest's count of passed and failed, and the first error."""
    output: str


def machine() -> Iterator[str]:
    """Versions, and which backends run the 1.4B model here."""
    import torch

    from megatron_hammer.base.errors import ConfigError
    from megatron_hammer.config import KernelsConfig
    from megatron_hammer.kernels.backend import Requirements
    from megatron_hammer.kernels.native import cuda
    from megatron_hammer.kernels.report import kernels_table

    device = torch.device("cuda", 0)
    free, total = torch.cuda.mem_get_info(device)
    yield f"python {sys.version.split()[0]}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}"
    yield f"{torch.cuda.get_device_name(device)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    yield f"our CUDA kernels: {cuda.unavailable(device) or 'load and run'}"
    for mask in ("causal", "document"):
        try:
            yield kernels_table(KernelsConfig(), Requirements(device, torch.bfloat16, mask, heads=32, groups=4))
        except ConfigError as error:
            yield str(error)


def functions(root: Path, word: str = "") -> list[str]:
    """The test functions marked gpu in the files under ``root``/tests that name the marker."""
    files = [
        str(path)
        for path in sorted((root / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run([*command, *(["-k", word] if word else [])], cwd=root, capture_output=True, text=True)
    if done.returncode not in (0, 5):  # 5: no test
        raise SystemExit(done.stdout + done.stderr)
    names = (line.split("[")[0] for line in done.stdout.splitlines() if "::" in line)
    return list(dict.fromkeys(names))


def run(root: Path, name: str, seconds: float) -> Outcome:
    """One function in a process of its own; what it started ends with it."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-ra",
        "-x",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        name,
    ]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return Outcome(name, "TIME", time.monotonic() - began, f"not done after {seconds:.0f} s", output)
    lines = done.stdout.strip().splitlines()
    says = lines[-1].strip("= ") if lines else ""
    word = {0: "ok" if "passed" in says else "skipped", 1: "FAILED"}.get(done.returncode, "CRASHED")
    if word == "CRASHED":
        says = f"exit code {done.returncode}"
    first = next((line for line in lines if line.startswith(("E   ", "SKIPPED"))), "") if word != "ok" else ""
    says = f"{says} | {first.removeprefix('E').strip()[:160]}" if first else says
    return Outcome(name, word, time.monotonic() - began, says, done.stdout + done.stderr)


def run_all(root: Path, jobs: int, seconds: float, word: str = "", until: float = float("inf")) -> Iterator[Outcome]:
    """All functions, some at a time; each as it ends, in order.

    Args:
        until: when all are to have ended, as ``time.monotonic`` has it: what runs then is stopped, the rest not begun.
    """

    def in_time(name: str) -> Outcome:
        left = until - time.monotonic()
        return run(root, name, min(seconds, left)) if left > 0 else Outcome(name, "TIME", 0.0, NOT_BEGUN, "")

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(in_time, functions(root, word))


def check(root: Path, out: Path, jobs: int = 4, seconds: float = 150, word: str = "") -> int:
    """Run all, a line each as they end; how many failed.

    Args:
        root: of a repository. out: where the output of what failed goes. seconds: for one function.
    """
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for outcome in run_all(root, jobs, seconds, word):
        print(f"{outcome.word:8} {outcome.seconds:5.0f} s  {outcome.name}  {outcome.says}", flush=True)
        if outcome.word not in ("ok", "skipped"):
            failed += 1
            (out / f"{outcome.name.split('/')[-1].replace('::', '-')}.log").write_text(outcome.output)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-check")), help="(default: %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time (default: %(default)s)")
    parser.add_argument("-k", dest="word", default="", help="only these tests, as pytest's -k")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no GPU")
    for line in machine():
        print(line, flush=True)
    failed = check(ROOT, arguments.out, arguments.jobs, word=arguments.word)
    print(f"{failed} failed; their output is in {arguments.out}" if failed else "all work")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
