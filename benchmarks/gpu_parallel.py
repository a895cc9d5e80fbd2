"""TP 2 (with sequence parallelism) and DP 2 as two processes on ONE GPU: right numbers, no claim about speed.

    python benchmarks/gpu_parallel.py [--small] [--results benchmarks/results]

NCCL refuses two ranks on one device, so the ranks talk over gloo, and every message goes through the host's memory:
what runs for real is the CUDA path of the sharded layers, loss and optimizer. Losses and gradient norms of every step
are compared with those of one process on the same GPU; the exit code is 1 where they differ by more than the order of
sums and (in bf16) rounding explain. --small: a toy model, on the CPU where there is no GPU, as the tests run it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu.contestants import our_config
from gpu.measure import Bench, versions
from shapes import TOY, Shape
from torch import Tensor

from megatron_hammer.base.cli import leave
from megatron_hammer.config import Config
from megatron_hammer.parallel import collectives
from megatron_hammer.parallel.collectives import Done
from megatron_hammer.parallel.context import ParallelContext, build_parallel_context
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.step import train_step

SHAPE = Shape(1024, 2816, 4, 16, 4, 512, 10_007, 2, 4, 8)  # heads of 64, an odd vocabulary
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP 2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "DP 2": {},
}
# Largest relative difference of a loss or gradient norm over the steps: fp32 differs in the order of sums (1e-5 seen on
# a CPU), bf16 in roundings of 2^-9 that eight updates carry on.
TOLERANCES = {"fp32": 1e-3, "bf16": 3e-2}
SECONDS_EACH = 120  # of a layout, with the start of its processes: some 20 on an H200 (predicted)
COLLECTIVE_SECONDS = 60  # after which a rank no longer waits for one that has failed


def stage_through_host() -> None:
    """Let the collectives of this process copy CUDA tensors to the host, talk over gloo, and copy back."""
    real_all_reduce, real_gather, real_scatter = (
        dist.all_reduce,
        collectives._all_gather_into,
        collectives._reduce_scatter_into,
    )

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        host = tensor.cpu()
        real_all_reduce(host, op=op, group=group)
        tensor.copy_(host)
        return Done()

    def staged(real: Any) -> Any:
        def call(out: Tensor, given: Tensor, group: Any = None, async_op: bool = False) -> Any:
            host = torch.empty(out.shape, dtype=out.dtype)
            real(host, given.cpu(), group=group)
            out.copy_(host)
            return Done()

        return call

    dist.all_reduce = all_reduce
    collectives._all_gather_into, collectives._reduce_scatter_into = staged(real_gather), staged(real_scatter)


def train(config: Config, ctx: ParallelContext, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, on samples that do not depend on the layout."""
    model, optimizer = build(config, ctx)
    b, found = config.train.micro_batch_size, []
    for step in range(1, steps + 1):
        generator = torch.Generator().manual_seed(step)
        size = (config.train.global_batch_size, config.data.seq_length + 1)
        windows = torch.randint(0, config.model.vocab_size or 0, size, generator=generator).to(ctx.device)
        mine = [Batch.from_windows(windows[i : i + b]) for i in range(b * ctx.dp.rank, len(windows), b * ctx.dp.size)]
        report = train_step(model, optimizer, mine, config, step, ctx)
        found.append((report.loss.item(), report.grad_norm.item()))
    return found


def config_of(shape: Shape, precision: str, layout: str) -> Config:
    """A learning rate that moves the weights from the first step on."""
    return our_config(
        shape,
        train={"precision": precision, "num_steps": shape.steps},
        parallel=LAYOUTS.get(layout, {}),
        optimizer={"lr": 1e-3},
        schedule={"warmup_steps": 1},
    )


def rank_main(rank: int, store: str, device: str, shape: Shape, layouts: Sequence[str], results: Any) -> None:
    """One of the two processes: these layouts and every precision in turn, each told as it ends."""
    limit = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=limit)
    stage_through_host()
    for layout in layouts:
        for precision in TOLERANCES:
            config = config_of(shape, precision, layout)
            ctx = build_parallel_context(config.grid(2), torch.device(device), COLLECTIVE_SECONDS)
            found = train(config, ctx, shape.steps)
            if rank == 0:
                results.put((layout, precision, found))
    dist.destroy_process_group()
    leave(0)  # gloo's threads do not always survive the interpreter's teardown


Losses = list[tuple[float, float]]


def of_two_processes(device: torch.device, shape: Shape) -> dict[tuple[str, str], Losses | str]:
    """Losses and norms of each layout and precision, or why there are none. A layout that fails or hangs is left, and
    the next begins in two new processes."""
    context = torch.multiprocessing.get_context("spawn")
    found: dict[tuple[str, str], Losses | str] = {}
    while layouts := [x for x in LAYOUTS if any((x, p) not in found for p in TOLERANCES)]:
        results, why = context.SimpleQueue(), ""
        with tempfile.TemporaryDirectory() as folder:
            given = (f"{folder}/store", str(device), shape, layouts, results)
            ranks = torch.multiprocessing.start_processes(rank_main, given, 2, join=False, start_method="spawn")
            end = time.monotonic() + SECONDS_EACH * len(layouts)
            try:
                while not (ended := ranks.join(timeout=5)) and time.monotonic() < end:
                    pass
                why = "" if ended else f"not done after {SECONDS_EACH * len(layouts)} s"
            except Exception as error:  # of one of them; the other has been ended
                why = str(error).strip().splitlines()[-1]
            for process in ranks.processes:
                process.kill()
                process.join(30)  # its memory of the GPU is the next ones'
        while not results.empty():
            layout, precision, losses = results.get()
            found[layout, precision] = losses
        if missing := [(x, p) for x in layouts for p in TOLERANCES if (x, p) not in found]:
            found |= {(x, p): why or "no result" for x, p in missing if x == missing[0][0]}
    return found


def compare(device: torch.device, shape: Shape) -> list[dict[str, Any]]:
    """A line for each layout and precision."""
    alone = {p: train(config_of(shape, p, "one"), ParallelContext.single(device), shape.steps) for p in TOLERANCES}
    lines = []
    for (layout, precision), found in of_two_processes(device, shape).items():
        line: dict[str, Any] = {"layout": layout, "precision": precision, "tolerance": TOLERANCES[precision]}
        if isinstance(found, str):
            lines.append({**line, "right": False, "error": found})
            continue
        pairs = list(zip(found, alone[precision]))
        off = max(abs(a - b) / abs(b) for two, one in pairs for a, b in zip(two, one))
        lines.append(
            {
                **line,
                "largest_relative_difference": off,
                "right": off <= TOLERANCES[precision],
                "losses": [two[0] for two in found],
                "losses_of_one_process": [one[0] for one in alone[precision]],
            }
        )
    return lines


def main() -> None:
    """Compare, print, write RESULTS/gpu_parallel-DEVICE-DATE.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        raise SystemExit("no CUDA device: use --small to try the script itself")
    bench = Bench(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"), arguments.small)
    lines = compare(bench.device, replace(TOY, micro_batch=1, steps=4) if arguments.small else SHAPE)
    for line in lines:
        print(json.dumps({k: v for k, v in line.items() if not isinstance(v, list)}), flush=True)
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"gpu_parallel-{bench.name.replace(' ', '_')}-{datetime.date.today()}.json"
    path.write_text(json.dumps({"versions": dict(versions()), "comparisons": lines}, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(line["right"] for line in lines) else 1)


if __name__ == "__main__":
    main()
