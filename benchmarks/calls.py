"""What Python does for one decoder layer in one micro-batch: function calls, torch operations and host time.

    cd WORKTREE && PYTHONPATH=. python benchmarks/calls.py [PATH ...] [--list] [--time]

A GPU that finishes its kernels faster than Python launches them waits for Python: with small micro-batches or much
tensor parallelism a step takes as long as these calls do. They are counted, and counting is the same every time.

A micro-batch's forward and backward (``train/schedules.py``, not the first of its step) is run on models of two and of
three layers, and the difference is what a layer costs. Paths, each on the fused kernels of a CPU::

    cpu       one rank, bf16
    tp2       rank 0 of two with sequence parallelism, bf16, on gloo
    gpu       what a GPU runs, as far as a CPU can: the same autograd functions, attention by the backend "cudnn" (with
              torch's CPU attention in its place), and each weight's gradient by one product that adds (fp32)

ours, torch's
    Functions written in Python that were called: of the package, and of torch or Python's own library. A generator
    counts each time that it goes on.
operations
    That reach torch's dispatcher below autograd, views among them; the fused kernels do not pass it.
time
    CPU time that the thread spends on a layer, with tensors so small that host work is nearly all of it: an eighth of
    the difference between models of ten and of two layers, of each the quickest of ``ROUNDS`` micro-batches.

Before and after Python was taken out of the layers (29 Nov. 2026, torch 2.13, Python 3.11; the time on an AMD EPYC that
did ten other things, the better of two runs)::

    path    calls    ours  torch's  operations     us           calls    ours  torch's  operations     us
    cpu       427     139      288         118  1,104     ->      167     105       62         117    998
    tp2       517     149      368         146  2,503     ->      253     131      122         145  2,342
    gpu       399     124      275         117    729     ->      167      99       68         116    668

(Times before the ten collectives of tp2 were noted for those who watch the ranks: at first five calls each, 311 in all;
now the notes are C alone, and torch's wrappers that log an exception are left out.)

So 60 % of the calls were a tenth of the time; what is left is mostly torch's own code around each operation, which only
a CUDA graph (``kernels.cuda_graph``) takes away.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hammer.kernels import attention
from megatron_hammer.train.build import build, choose_kernels
from megatron_hammer.train.schedules import micro_batch
from tests.distributed import run_distributed
from tests.model.tiny import make_context, rank_batches, tiny_config

PACKAGE = os.sep + "megatron_hammer" + os.sep
ROUNDS = 400  # chosen by eye

TP2 = {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
PATHS: dict[str, dict[str, Any]] = {
    "cpu": {"train__precision": "bf16"},
    "tp2": {"train__precision": "bf16", **TP2},
    "gpu": {"train__precision": "fp32"},
}

CPU_AS_CUDNN = SimpleNamespace(CUDNN_ATTENTION=SDPBackend.FLASH_ATTENTION)
"""torch's attention on a CPU, which goes by the name of another backend, in the place of cuDNN's."""

Called = tuple[str, str]
"""File, with the package's or site-packages' folder, and qualified name."""


@dataclass(frozen=True)
class Cost:
    """What one layer costs in one micro-batch."""

    calls: Counter[Called]
    """Functions written in Python."""
    operations: int

    @property
    def ours(self) -> int:
        """Calls of the package's functions."""
        return sum(count for (file, _), count in self.calls.items() if file.startswith("megatron_hammer"))

    @property
    def python(self) -> int:
        """Calls of all functions written in Python."""
        return self.calls.total()


class _Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def prepared(path: str, layers: int, **changes: Any) -> Callable[[], None]:
    """One micro-batch of a model of this many layers, warm: what is made at a first call has been made."""
    config = tiny_config(**PATHS[path], model__num_layers=layers, **changes)
    ctx = make_context(config)
    kernels = choose_kernels(config, ctx.device)
    if path == "gpu":
        kernels = replace(kernels, operations=replace(kernels.operations, attention=attention.cudnn))
    model, optimizer = build(config, ctx, kernels=kernels)
    batch, share = rank_batches(config, 1, ctx)[0], torch.tensor(0.01)

    def run() -> None:
        optimizer.store.begin(first=False, last=False)
        micro_batch(model, batch, share, 0.0)

    for _ in range(3):
        run()
    return run


def count(rank: int, path: str) -> Cost:
    """On one of the ranks of the path."""
    with patch.object(attention, "SDPBackend", CPU_AS_CUDNN):
        costs = [_count(prepared(path, layers)) for layers in (2, 3)]
    (calls, operations), (more_calls, more_operations) = costs
    return Cost(more_calls - calls, more_operations - operations)


def _count(run: Callable[[], None]) -> tuple[Counter[Called], int]:
    calls: Counter[Called] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            code = frame.f_code
            file = code.co_filename.replace(os.sep, "/")
            for root in ("/site-packages/", "/lib/"):
                file = file.rpartition(root)[2]
            _, package, below = code.co_filename.rpartition(PACKAGE)
            calls["megatron_hammer/" + below if package else file, code.co_qualname] += 1

    sys.setprofile(note)  # backward of CPU tensors runs in the thread that asks for it
    try:
        run()
    finally:
        sys.setprofile(None)
    with _Operations() as operations:
        run()
    return calls, operations.count


def measure(rank: int, path: str) -> float:
    """Microseconds of CPU time that a layer takes."""
    small = dict(train__micro_batch_size=1, data__seq_length=4)

    def seconds(run: Callable[[], None]) -> float:
        start = time.thread_time()
        run()
        return time.thread_time() - start

    with patch.object(attention, "SDPBackend", CPU_AS_CUDNN):
        runs = [prepared(path, layers, **small) for layers in (2, 10)]
        two, ten = (min(taken) for taken in zip(*([seconds(run) for run in runs] for _ in range(ROUNDS)), strict=True))
    return (ten - two) / 8 * 1e6


def on_ranks(function: Callable[..., Any], path: str) -> Any:
    """What rank 0 of the path returns."""
    return run_distributed(PATHS[path].get("parallel__tensor_model_parallel_size", 1), function, path)[0]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="PATH", help=f"of {', '.join(PATHS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="also print every function with its calls")
    parser.add_argument("--time", action="store_true", help="also measure the host time")
    options = parser.parse_args()
    if unknown := set(options.paths) - set(PATHS):
        parser.error(f"no such path: {', '.join(sorted(unknown))}")
    print(f"{'path':6} {'calls':>6} {'ours':>6} {'torchs':>6} {'operations':>10} {'us':>6}")
    for path in options.paths or PATHS:
        cost: Cost = on_ranks(count, path)
        spent = f"{on_ranks(measure, path):6.0f}" if options.time else ""
        print(f"{path:6} {cost.python:6} {cost.ours:6} {cost.python - cost.ours:6} {cost.operations:10} {spent}")
        if options.list:
            print(*(f"  {n:5} {file:50} {name}" for (file, name), n in cost.calls.most_common()), "", sep="\n")


if __name__ == "__main__":
    main()
