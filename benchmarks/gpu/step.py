"""The training step end to end: against the peers, between our own choices, HammerLLM's tables, optimizer, memory.

Every entry is measured in a process of its own (memory, compilation and global settings of one are no business of the
next). ``step`` alternates: two rounds, the second in reverse order, each 10 warm-up and 10 timed steps. A contestant
that does not fit gets half the micro-batch until it does, and the result says so.
"""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from shapes import Shape

from gpu.contestants import Contestant, hugging_face, megatron_core, our_config, ours, torchtitan
from gpu.kernels import our_demand
from gpu.measure import Bench, Clocks, Item, Result, is_out_of_memory, marked_times, p99, peak_memory
from megatron_hammer.kernels.operations import TABLES
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.loop import build
from megatron_hammer.train.schedules import forward_backward

ROUNDS = 2
# Where the search for Hugging Face's largest begins: activations and loss take about 8 GiB a sample beside 25 GiB of
# weights and optimizer (counted), so twice this cannot fit an H200 (True: more than 100 GiB) or an H100.
LARGE_MICRO_BATCH = {True: 16, False: 8}

FP8 = {"layers": "torch", "fp8": "current"}
COMPETITORS: dict[str, tuple[Contestant, bool]] = {  # name -> who, and whether it may take a larger micro-batch
    "HammerLLM's recipe": (hugging_face("flash"), False),
    "HammerLLM's recipe tuned": (hugging_face("cudnn", pad=True), True),
    "Megatron core, local": (megatron_core(fused_attention=False), False),
    "Megatron core, local + SDPA": (megatron_core(fused_attention=True), False),
    "torchtitan 0.2.2": (torchtitan(), False),
    "torchtitan 0.2.2 + chunked loss written here": (torchtitan(8), False),
    "ours bf16": (ours(), False),
    "ours fp8": (ours(kernels=FP8), False),
}
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "plain torch": {
        "kernels": {"norm": "torch", "rope": "torch", "swiglu": "torch", "adamw": "torch", "loss": "torch"}
    },
    "compile=operations": {"kernels": {"compile": "operations"}},
    "compile=layers": {"kernels": {"compile": "layers"}},
    "recompute=selective": {"train": {"recompute": "selective"}},
    "recompute=full": {"train": {"recompute": "full"}},
    "fp8 + head": {"kernels": {**FP8, "fp8_head": True}},
    "micro-batch 16": {},
    "layers=te": {"kernels": {"layers": "te"}},
    "layers=te, fp8": {"kernels": {"layers": "te", "fp8": "current"}},
}


def measure(bench: Bench, who: Contestant, shape: Shape, warm_up: int = 10, timed: int = 10) -> Result:
    """Rate, times and memory of one contestant, at this micro-batch or the largest half of it that fits."""
    warm_up, timed = (1, 2) if bench.small else (warm_up, timed)
    wanted = shape.micro_batch
    while True:
        memory: Result = {}
        try:
            with Clocks() as clocks, peak_memory(bench, memory, "peak_gib"):
                seconds = who(bench, shape, warm_up + timed)
            break
        except Exception as error:
            if not is_out_of_memory(error) or shape.micro_batch == 1:
                raise
        shape = replace(shape, micro_batch=shape.micro_batch // 2)
        gc.collect()
        torch._dynamo.reset()
        if bench.cuda:
            torch.cuda.empty_cache()
    kept = seconds[warm_up:]
    median = statistics.median(kept)
    return {
        "tokens_per_second": shape.tokens / median,
        "step_s": median,
        "step_s_p99": p99(kept),
        "step_s_each": kept,
        "first_step_s": seconds[0],
        "micro_batch": shape.micro_batch,
        **({"did_not_fit": wanted} if wanted != shape.micro_batch else {}),
        "accumulation": shape.accumulation,
        "vocabulary": shape.vocabulary,
        **memory,
        **clocks.medians,
    }


def competition(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for number in range(1, ROUNDS + 1):
        names = list(COMPETITORS) if number % 2 else list(reversed(COMPETITORS))
        for name in names:
            who, may_grow = COMPETITORS[name]
            micro_batch = _large(bench) if may_grow else bench.shape.micro_batch
            before = bench.known.get(f"{name} (round 1)", {})  # what fitted then
            shape = replace(bench.shape, micro_batch=before.get("micro_batch", micro_batch))
            found[f"{name} (round {number})"] = partial(measure, bench, who, shape)
    return found


def _large(bench: Bench) -> int:
    if not bench.cuda:
        return bench.shape.micro_batch
    return LARGE_MICRO_BATCH[torch.cuda.get_device_properties(bench.device).total_memory > 100 * 2**30]


def choices(bench: Bench) -> dict[str, Item]:
    """Ours, one setting changed at a time from the default."""
    found: dict[str, Item] = {"default": partial(measure, bench, ours(), bench.shape, 5, 10)}
    able = [row.name for row in TABLES["attention"] if not row.obstacle(our_demand(bench))]
    attention = {f"attention={name}": {"kernels": {"attention": name}} for name in able}
    for name, groups in (CHOICES | attention).items():
        shape = replace(bench.shape, micro_batch=2 * bench.shape.micro_batch) if "micro-batch" in name else bench.shape
        found[name] = partial(measure, bench, ours(**groups), shape, 5, 10)
    return found


def tables(bench: Bench) -> dict[str, Item]:
    """HammerLLM's own: flash attention and compile, each alone and both; and the price of the vocabulary."""
    found: dict[str, Item] = {}
    for name, attention, compiled in (
        ("neither", "eager", False),
        ("flash attention", "flash", False),
        ("compile", "eager", True),
        ("both", "flash", True),
    ):
        found[name] = partial(measure, bench, hugging_face(attention, compiled), bench.shape, 4, 6)
    small = replace(bench.shape, vocabulary=128 if bench.small else 32_000)
    found["both, 32,000 pieces"] = partial(measure, bench, hugging_face("flash"), small, 4, 6)
    found["ours"] = partial(measure, bench, ours(), bench.shape, 4, 6)
    found["ours, 32,000 pieces"] = partial(measure, bench, ours(), small, 4, 6)
    return found


def clip_and_update(bench: Bench) -> Result:
    """Clipping and AdamW alone, after a real backward each time."""
    shape = replace(bench.shape, micro_batch=1, accumulation=1)
    config, ctx = our_config(shape), ParallelContext.single(bench.device)
    model, optimizer = build(config, ctx)

    def run(mark: Any) -> None:
        windows = bench.tokens(shape.micro_batch, shape.sequence + 1, vocabulary=shape.vocabulary)
        forward_backward(model, optimizer, [(windows[:, :-1], windows[:, 1:])], ctx)
        mark()
        optimizer.clip_grad_norm(1.0)
        mark()
        optimizer.step(1e-4)
        mark()

    norm, update = (statistics.median(t) for t in marked_times(bench, run, bench.repeats(10)))
    return {"clip_ms": 1e3 * norm, "update_ms": 1e3 * update, "ms": 1e3 * (norm + update)}


def optimizer(bench: Bench) -> dict[str, Item]:
    """Alone; and the step at accumulation 16, to check what the report computes from accumulation 4."""
    sixteen = replace(bench.shape, accumulation=4 if bench.small else 16)
    return {
        "clip + AdamW": partial(clip_and_update, bench),
        "step at accumulation 4": partial(measure, bench, ours(), bench.shape, 3, 6),
        "step at accumulation 16": partial(measure, bench, ours(), sixteen, 2, 4),
    }


def memory(bench: Bench) -> dict[str, Item]:
    """Peak of two steps at each way to recompute."""
    found: dict[str, Item] = {}
    for recompute in ("none", "selective", "full"):
        groups = {} if recompute == "none" else {"train": {"recompute": recompute}}
        found[recompute] = partial(measure, bench, ours(**groups), bench.shape, 1, 1)
    return found
