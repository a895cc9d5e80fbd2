"""The tests marked gpu: equality with the CPU, no synchronisation in a step, resume, kernels and their references."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from gpu.measure import Bench, Item, Result

ROOT = Path(__file__).parents[2]
PROCESSES, SECONDS_EACH = 4, 120
SPARE_SECONDS = 15  # in which the last process ends, before this one would be ended and all outcomes lost
SMALL = "tests/test_gpu.py::test_varlen_equals_each_document"  # one of them, which skips where there is no GPU


def run_tests(bench: Bench) -> Result:
    """Counts, and a line for each function that did not pass; every function has a process of its own.

    Those that have no time left are not begun, and the entry is one that is tried again.
    """
    sys.path.insert(0, str(ROOT))
    from tests.kernels.gpu_check import NOT_BEGUN, run, run_all

    until = time.monotonic() + bench.limit_seconds - SPARE_SECONDS
    every = run_all(ROOT, PROCESSES, SECONDS_EACH, until=until)
    outcomes = [run(ROOT, SMALL, SECONDS_EACH)] if bench.small else list(every)
    summary = [f"{o.word} {o.name}: {o.says}" for o in outcomes if o.word != "ok"]
    left = sum(o.says == NOT_BEGUN or (o.word == "TIME" and o.seconds < SECONDS_EACH) for o in outcomes)
    cut = {"error": f"no time for {left} of {len(outcomes)} functions"} if left else {}
    return {**Counter(o.word for o in outcomes), "summary": summary, **cut}


def items(bench: Bench) -> dict[str, Item]:
    return {"tests marked gpu": lambda: run_tests(bench)}
