"""Muon beside AdamW: what a step costs on two ranks, and what the quick start's model learns in as many steps.

    python benchmarks/muon.py cost [mid|quick] [--rounds N]
    python benchmarks/muon.py curve [--steps 100] [--styles adamw muon] [--rates 1e-3 2e-3 4e-3] [--output FOLDER]
    python benchmarks/muon.py predict

cost     DP 2 over gloo, a thread a rank, bf16, presets of ``shapes.py``: steps of both styles alternate. Medians of
         rank 0, of the whole step and of its update alone, and the ratio at more micro-batches a step, on which the
         update does not depend.
curve    the model, text and batches of ``loss_parity.py``, in bf16, each style with each learning rate; a side that is
         there is not run again. Compared are the best of each. Prints a table, writes it and a picture.
predict  what Newton-Schulz and its messages take of a step of the 1.4B on 8 GPUs, from stated rates: not measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from equal_bits_cost import random_batches
from loss_parity import LAST, read_tokens, smooth, train_side
from loss_parity import config_of as parity_config
from ranks import meet
from shapes import HAMMERLLM, SHAPES

from megatron_hammer.base.pictures import COLOURS, new_figure, save_png, tidy
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.kernels.newton_schulz import flops
from megatron_hammer.model.parameters import hidden_matrices, logical_shapes
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.context import build_parallel_context
from megatron_hammer.train.build import build
from megatron_hammer.train.step import train_step

RANKS, GPUS = 2, 8
STYLES = ("adamw", "muon")
GPU_RATE = 0.45 * 989e12  # of products in bf16: H100's dense peak, and the share that squares of 2,048 reach; assumed
LINK_RATE = 300e9  # bytes a second and direction within a node: two thirds of NVLink's 450e9; assumed
STEP_MFU = 0.5  # of the whole step, as in the forecast


def cost_config(size: str, style: str) -> Config:
    """The run of one style."""
    shape = SHAPES[size]
    return config_from_tree({
        "model": shape.model_fields, "data": {"seq_length": shape.sequence}, "optimizer": {"style": style},
        "train": {"micro_batch_size": shape.micro_batch,
                  "global_batch_size": shape.micro_batch * shape.accumulation * RANKS},
    })  # fmt: skip


def timed(optimizer: Optimizer, seconds: list[float], *arguments: Any) -> Any:
    """An update, until the new weights are there."""
    began = time.perf_counter()
    applied = Optimizer.step(optimizer, *arguments)
    optimizer.store.wait()
    seconds.append(time.perf_counter() - began)
    return applied


def measure(rank: int, size: str, rounds: int, folder: str) -> None:
    """One rank: steps of both styles in turns; print the medians on rank 0."""
    meet(rank, RANKS, f"{folder}/store")
    shape, configs = SHAPES[size], {style: cost_config(size, style) for style in STYLES}
    ctx = build_parallel_context(configs["adamw"].grid(RANKS), torch.device("cpu"))
    built = {style: build(config, ctx) for style, config in configs.items()}
    steps: dict[str, list[float]] = {style: [] for style in STYLES}
    updates: dict[str, list[float]] = {style: [] for style in STYLES}
    for step in range(1, rounds + 2):
        for style, (model, optimizer) in built.items():
            batches = random_batches(shape, configs[style], step, ctx.dp.rank)
            optimizer.step = partial(timed, optimizer, updates[style])  # type: ignore[method-assign]
            dist.barrier()
            began = time.perf_counter()
            train_step(model, optimizer, batches, configs[style], step, ctx).loss.item()
            steps[style].append(time.perf_counter() - began)
    if rank == 0:
        whole, update = ({s: statistics.median(t[s][1:]) for s in STYLES} for t in (steps, updates))
        backward = statistics.median([w - u for s in STYLES for w, u in zip(steps[s][1:], updates[s][1:], strict=True)])
        print(f"{size}, DP 2, {shape.tokens * RANKS:,} tokens a step: "
              + ", ".join(f"{s} {whole[s] * 1e3:.0f} ms (update {update[s] * 1e3:.0f})" for s in STYLES)
              + f"; ratio of the steps {whole['muon'] / whole['adamw']:.3f}", flush=True)  # fmt: skip
        for factor in (1, 2, 4, 8):
            rest = backward * factor
            ratio = (rest + update["muon"]) / (rest + update["adamw"])
            print(f"  {shape.tokens * RANKS * factor:,} tokens a step, from the parts: {ratio:.3f}")
    dist.destroy_process_group()


def curve(steps: int, styles: Sequence[str], rates: Sequence[float], output: Path) -> None:
    """Train what is missing; compare the best of each style."""
    output.mkdir(parents=True, exist_ok=True)
    tokens, found = read_tokens([], output), []
    for style in styles:
        for lr in rates:
            path, base = output / f"{style}-{lr:g}.json", parity_config("bf16", steps)
            optimizer = replace(base.optimizer, style=style, lr=lr, min_lr=lr / 10, weight_decay=0.1, beta2=0.95)
            kept = json.loads(path.read_text()) if path.exists() else {}
            if kept.get("steps") != steps:
                result = train_side(f"{style} {lr:g}", replace(base, optimizer=optimizer), tokens)
                kept = {"steps": steps, "style": style, "lr": lr, **result}
                path.write_text(json.dumps(kept) + "\n")
            found.append(kept)
    lines = [f"| optimizer | lr | loss, last {LAST} of {steps} steps | CPU s |", "|---|---|---|---|"]
    for side in found:
        mean = np.mean(side["losses"][-LAST:])
        lines.append(f"| {side['style']} | {side['lr']:g} | {mean:.4f} | {side['cpu_seconds']} |")
    (output / "muon.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    draw(found, output / "muon.png")


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """The smoothed losses of all sides, the best of each style in front."""
    steps = max(len(side["losses"]) for side in found)
    figure = new_figure(
        4.8, "Muon beside AdamW, the quick start's model", f"Source: benchmarks/muon.py curve, {steps} steps, one seed"
    )
    axes = figure.subplots()
    colours = dict(zip(STYLES, COLOURS, strict=False))
    for style in STYLES:
        sides = sorted((s for s in found if s["style"] == style), key=lambda s: float(np.mean(s["losses"][-LAST:])))
        for place, side in enumerate(sides):
            losses = smooth(side["losses"])
            label = f"{style}, lr {side['lr']:g}" if place == 0 else None
            axes.plot(range(1, len(losses) + 1), losses, color=colours[style], label=label,
                      linewidth=1.8 if place == 0 else 0.8, alpha=1 if place == 0 else 0.35)  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss, mean of up to 30 steps")
    axes.legend(frameon=False, title="best of the sweep (others pale)")
    tidy(axes)
    save_png(figure, path)


def predict() -> None:
    """Of a step of HammerLLM 1.4B with its global batch, data-parallel on 8 GPUs."""
    shape = HAMMERLLM
    config = config_from_tree({"model": shape.model_fields, "data": {"seq_length": shape.sequence}})
    shapes, names = logical_shapes(config.model), hidden_matrices(config.model)
    products = sum(flops(*shapes[name]) for name in names)  # type: ignore[arg-type]
    elements = sum(int(np.prod(shapes[name])) for name in names)
    own = products / GPUS / GPU_RATE
    sent = 2 * 2 * elements / GPUS * (GPUS - 1) / GPUS / LINK_RATE
    tokens = shape.tokens * GPUS
    step = tokens / GPUS * shape.flops_per_token / (STEP_MFU * 989e12)
    print(f"{len(names)} matrices, {elements / 1e9:.2f} G elements, {products / 1e12:.0f} TFLOP of Newton-Schulz")
    print(f"a GPU of {GPUS}: {own * 1e3:.0f} ms of products, {sent * 1e3:.1f} ms of messages "
          f"({2 * elements / GPUS / 1e9:.2f} "
          "GB to the owners, as much back)")  # fmt: skip
    print(f"a step of {tokens:,} tokens {step * 1e3:,.0f} ms: ratio {(step + own + sent) / step:.3f}")


def main() -> None:
    """One of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "curve", "predict"))
    parser.add_argument("size", nargs="?", choices=SHAPES, default="mid")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=list(STYLES))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--output", type=Path, default=Path("muon"))
    arguments = parser.parse_args()
    if arguments.what == "cost":
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (arguments.size, arguments.rounds, folder), nprocs=RANKS)
    elif arguments.what == "curve":
        curve(arguments.steps, arguments.styles, arguments.rates, arguments.output)
    else:
        predict()


if __name__ == "__main__":
    main()
