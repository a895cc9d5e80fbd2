"""The tests marked gpu: equality with the CPU, no synchronisation in a step, resume, kernels and their references."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from gpu.measure import Bench, Item, Result

ROOT = Path(__file__).parents[2]
PROCESSES, SECONDS_EACH = 4, 120
SMALL = "tests/test_gpu.py::test_varlen_equals_each_document"  # one of them, which skips where there is no GPU


def run_tests(bench: Bench) -> Result:
    """Counts, and a line for each function that did not pass; every function has a process of its own."""
    sys.path.insert(0, str(ROOT))
    from tests.kernels.gpu_check import run, run_all

    outcomes = [run(ROOT, SMALL, SECONDS_EACH)] if bench.small else list(run_all(ROOT, PROCESSES, SECONDS_EACH))
    summary = [f"{o.word} {o.name}: {o.says}" for o in outcomes if o.word != "ok"]
    return {**Counter(o.word for o in outcomes), "summary": summary}


def items(bench: Bench) -> dict[str, Item]:
    return {"tests marked gpu": lambda: run_tests(bench)}
