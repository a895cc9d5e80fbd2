"""The process that evaluates one checkpoint beside a run: ``train/evaluator.py`` starts it with one JSON argument.

It computes what ``tools/evaluate.py`` does on the sets of ``train.evaluator``, or runs the program that stands there in
its place, and appends one line to OUT/evaluations.jsonl; then the checkpoint continues the prompts. It is niced before
it imports anything large, and dies with the run's rank 0. Needs no torch but for our own evaluation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_hammer.base.cli import end_of
from megatron_hammer.base.errors import DataError
from megatron_hammer.base.reading import parse_json
from megatron_hammer.base.system import die_with_parent
from megatron_hammer.metrics.generations import write_generations
from megatron_hammer.metrics.metrics_file import append_line, finite

FIGURES = ("loss", "perplexity", "bits_per_byte", "bits_per_character")


def evaluate_checkpoint(task: Mapping[str, Any]) -> dict[str, float | None]:
    """Our own figures of a checkpoint on the task's sets, by ``evaluation/NAME/FIGURE``."""
    import torch

    from megatron_hammer.evaluation.measure import EvaluationOptions, measure
    from megatron_hammer.evaluation.sets import parse_sets
    from megatron_hammer.evaluation.subjects import describe_subject, device_of_argument

    torch.set_num_threads(task["threads"])
    options = EvaluationOptions(samples=task["samples"], device=device_of_argument(task["device"]))
    sets = parse_sets([f"{name}={path}" for name, path in task["sets"].items()])
    found: dict[str, float | None] = {}
    for figures in measure([describe_subject(task["checkpoint"])], sets, options):
        tree = figures.to_tree()
        found |= {f"evaluation/{figures.set}/{key}": tree[key] for key in FIGURES}
    return found


def run_command(task: Mapping[str, Any]) -> dict[str, float | None]:
    """What the user's own program says in its last line, by ``evaluation/KEY``.

    Raises:
        DataError: E367 it failed, or that is no JSON object of numbers.
    """
    words = [
        word.replace("{checkpoint}", task["checkpoint"]).replace("{step}", str(task["step"]))
        for word in task["command"]
    ]
    here = os.getpid()
    done = subprocess.run(words, stdout=subprocess.PIPE, preexec_fn=lambda: die_with_parent(here), check=False)
    what, remedy = f"train.evaluator.command: {words[0]}", "print one JSON object of numbers as the last line"
    if done.returncode:
        raise DataError(67, what, f"ended with {done.returncode}", "see what it printed above")
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    try:
        found = parse_json(lines[-1]) if lines else None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found or not all(map(_is_number, found.values())):
        raise DataError(67, what, "did not end its output with a JSON object of numbers", remedy)
    return finite({f"evaluation/{key}": float(value) for key, value in found.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def main() -> int:
    """Evaluate, and append the line."""
    task = json.loads(sys.argv[1])
    die_with_parent(task["parent"])
    os.nice(task["nice"])
    found = run_command(task) if task["command"] else evaluate_checkpoint(task)
    results = Path(task["results"])
    append_line(results, {"step": task["step"], **found})
    if prompts := task.get("prompts"):
        longest, device = task["new_tokens"], task["device"]
        write_generations(task["checkpoint"], task["step"], prompts, results.parent, longest, device)
    return 0


if __name__ == "__main__":
    sys.exit(end_of(main))
