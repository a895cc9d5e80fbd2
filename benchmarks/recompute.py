"""What recompute costs and saves, and what compiled layers cost at start: this machine's cores, one process a variant.

    python benchmarks/recompute.py [--sizes quick mid] [--precisions bf16] [--rounds 3] [--variants ...] [--steps 8]

Prints every run, then a table of medians: what the layers keep of a micro-batch by the formula
(``activation_bytes``), the largest resident memory above that after the imports, the CPU time of a step (as it suffers
least from other programs), its ratio to "none", and the wall time of the first step, which compiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from shapes import SHAPES, WARM_UP_STEPS, peak_mb
from sides import run

VARIANTS: dict[str, dict[str, dict[str, object]]] = {  # name -> settings
    "none": {},
    "selective": {"train": {"recompute": "selective"}},
    "full, half of the layers": {"train": {"recompute": "full", "recompute_layers": -2}},
    "full": {"train": {"recompute": "full"}},
    "none, compile=operations": {"kernels": {"compile": "operations"}},
    "none, compile=layers": {"kernels": {"compile": "layers"}},
    "full, compile=layers": {"kernels": {"compile": "layers"}, "train": {"recompute": "full"}},
}


def measure(variant: str, size: str, precision: str, steps: int) -> None:
    """One variant in this process; prints one JSON line."""
    import torch

    from megatron_hammer.config import config_from_tree
    from megatron_hammer.kernels.selection import kernel_requirements, select_backends
    from megatron_hammer.model.recompute import activation_bytes
    from megatron_hammer.parallel.context import ParallelContext
    from megatron_hammer.sampling.batch import Batch
    from megatron_hammer.train.build import build
    from megatron_hammer.train.step import train_step

    imported, shape = peak_mb(), SHAPES[size]
    train = {
        "num_steps": WARM_UP_STEPS + steps,
        "micro_batch_size": shape.micro_batch,
        "global_batch_size": shape.micro_batch * shape.accumulation,
        "precision": precision,
        **VARIANTS[variant].get("train", {}),
    }
    if "recompute_layers" in train:
        train["recompute_layers"] = shape.layers // 2
    tree = {"model": shape.model_fields, "data": {"seq_length": shape.sequence}, "train": train}
    config = config_from_tree({**tree, "kernels": VARIANTS[variant].get("kernels", {})})
    config.validate(1)
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    seconds, first = [], 0.0
    for step in range(1, WARM_UP_STEPS + steps + 1):
        generator = torch.Generator().manual_seed(step)
        lengths = (shape.micro_batch, shape.sequence + 1)
        samples = [
            Batch.from_windows(torch.randint(0, shape.vocabulary, lengths, generator=generator))
            for _ in range(shape.accumulation)
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        train_step(model, optimizer, samples, config, step, ctx).loss.item()
        seconds.append(time.process_time() - cpu)
        first = first or time.perf_counter() - wall
    rows = select_backends(config.kernels, kernel_requirements(config, ctx.device))
    line = {
        "variant": variant,
        "size": size,
        "precision": precision,
        "kept_mb": round(activation_bytes(config, rows) / 1e6, 1),
        "peak_mb": peak_mb() - imported,
        "step_ms": round(1000 * statistics.median(seconds[WARM_UP_STEPS:]), 1),
        "first_step_s": round(first, 1),
    }
    print(json.dumps(line), flush=True)


def measured(variant: str, size: str, precision: str, steps: int) -> dict:
    """``measure`` in a process of its own; prints what it found."""
    where = ["--measure", variant, "--sizes", size, "--precisions", precision]
    line = run(Path(__file__).name, *where, "--steps", str(steps))
    print(json.dumps(line), flush=True)
    return line


def main() -> None:
    """Take the variants in turn and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["quick", "mid"], choices=SHAPES)
    parser.add_argument("--precisions", nargs="+", default=["bf16"], choices=["bf16", "fp32"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed ones, after a few to warm up")
    parser.add_argument("--measure", choices=VARIANTS, help="one variant, in this process")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.sizes[0], arguments.precisions[0], arguments.steps)
        return
    table = [
        "| size | precision | train.recompute | layers keep, MB | peak, MB | step, CPU ms | to none | first step, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in arguments.sizes:
        for precision in arguments.precisions:
            runs: dict[str, list[dict]] = {}
            for _ in range(arguments.rounds):
                for variant in arguments.variants:
                    runs.setdefault(variant, []).append(measured(variant, size, precision, arguments.steps))
            names = ("kept_mb", "peak_mb", "step_ms", "first_step_s")
            medians = {v: {n: statistics.median(line[n] for line in lines) for n in names} for v, lines in runs.items()}
            base = medians.get("none", next(iter(medians.values())))["step_ms"]
            for variant, m in medians.items():
                memory = f"{m['kept_mb']:.0f} | {m['peak_mb']:.0f}"
                times = f"{m['step_ms']:.0f} | {m['step_ms'] / base:.2f} | {m['first_step_s']:.1f}"
                table.append(f"| {size} | {precision} | {variant} | {memory} | {times} |")
    print("\n".join(table))


if __name__ == "__main__":
    main()
