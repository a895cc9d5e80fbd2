"""The training step end to end: against the peers, between our own choices, HammerLLM's tables, optimizer, memory.

Every entry is measured in a process of its own (memory, compilation and global settings of one are no business of the
next). ``competition`` alternates: two rounds, the second in reverse order, each 5 warm-up and 10 timed steps. A
contestant that does not fit gets half the micro-batch in another process until it does, and the result says so; a step
has the same number of tokens at any micro-batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from shapes import Shape
from sides import p99
from torch import Tensor

from gpu.contestants import (
    Contestant,
    fsdp2,
    hugging_face,
    hugging_face_memory_gib,
    megatron_core,
    our_config,
    ours,
    torchtitan,
)
from gpu.kernels import our_requirements
from gpu.measure import Bench, Clocks, Item, Result, is_out_of_memory, marked_times, needed, peak_memory
from megatron_hammer.kernels.selection import TABLES
from megatron_hammer.model.parameters import logical_shapes
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.step import loss_and_gradients

ROUNDS = 2
LARGEST_MICRO_BATCH = 16
SMALL_VOCABULARY = 32_000
# Micro-batch at which the search for the largest that fits an H100 begins, where that of the recipe cannot fit: stored
# scores take 6 GiB a layer at 8 (counted).
UNFUSED_MICRO_BATCH = 2

FP8 = {"layers": "torch", "fp8": "current"}
COMPETITORS: dict[str, Contestant] = {  # in the order of what should be known first
    "ours bf16": ours(),
    "HammerLLM's recipe": hugging_face("flash"),
    "torchtitan 0.2.2 tuned (chunked loss written here)": torchtitan(tuned=True),
    "HammerLLM's recipe tuned": hugging_face("cudnn", tuned=True),
    "Megatron core, local + SDPA": megatron_core(fused_attention=True),
    "ours fp8": ours(kernels=FP8),
    "FSDP2": fsdp2(),
    "ours bf16, 32,000 pieces": ours(),
    "torchtitan 0.2.2": torchtitan(),
    "Megatron core, local": megatron_core(fused_attention=False),
}
MICRO_BATCHES = {"micro-batch 16": 2.0, "micro-batch 1": 0.125, "micro-batch 1, cuda_graph": 0.125}  # of the usual 8
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
    "micro-batch 1": {},
    "micro-batch 1, cuda_graph": {"kernels": {"cuda_graph": True}},
    "layers=te": {"kernels": {"layers": "te"}},
    "layers=te, fp8": {"kernels": {"layers": "te", "fp8": "current"}},
}


def measure(
    bench: Bench, name: str, who: Contestant, shape: Shape, warm_up: int = 5, timed: int = 10, former: str = ""
) -> Result:
    """Rate, times and memory of one contestant.

    name: of the entry; ``former``: of another entry of the same contestant, whose micro-batch is taken. What was
    measured of them before says what fits, or what does not: then half of it is tried.
    """
    warm_up, timed = (1, 2) if bench.small else (warm_up, timed)
    wanted = shape.micro_batch
    before = bench.known.get(name) or bench.known.get(former, {})
    if "micro_batch" in before:
        shape = shape.at(before["micro_batch"])
    elif "did_not_fit" in before:
        shape = shape.at(max(1, before["did_not_fit"] // 2))
    memory: Result = {}
    clocks = Clocks(bench)
    try:
        with clocks, peak_memory(bench, memory, "peak_gib"):
            spans = who(bench, shape, warm_up + timed)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {
            "error": f"out of memory at micro-batch {shape.micro_batch}",
            "did_not_fit": shape.micro_batch,
            "said": " ".join(str(error).split())[:300],
        }
    seconds = [end - start for start, end in spans]
    kept = seconds[warm_up:]
    median = statistics.median(kept)
    return {
        "tokens_per_second": shape.tokens / median,
        "step_s": median,
        "step_s_p99": p99(kept),
        "step_s_each": kept,
        "first_step_s": seconds[0],
        "micro_batch": shape.micro_batch,
        **({"wanted": wanted} if wanted != shape.micro_batch else {}),
        "accumulation": shape.accumulation,
        "vocabulary": shape.vocabulary,
        **memory,
        **clocks.medians((spans[warm_up][0], spans[-1][1])),
    }


def competition(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for number in range(1, ROUNDS + 1):
        for name in COMPETITORS if number % 2 else reversed(COMPETITORS):
            shape = bench.shape
            if name == "HammerLLM's recipe tuned":
                shape = shape.at(_largest(bench, eager_attention=False, compiled=True))
            elif name == "Megatron core, local" and bench.cuda:
                shape = shape.at(UNFUSED_MICRO_BATCH)
            elif name.endswith("pieces"):
                shape = _small_vocabulary(bench)
            entry = f"{name} (round {number})"
            found[entry] = partial(measure, bench, entry, COMPETITORS[name], shape, former=f"{name} (round 1)")
    return found


def _small_vocabulary(bench: Bench) -> Shape:
    return replace(bench.shape, vocabulary=128 if bench.small else SMALL_VOCABULARY)


def _largest(bench: Bench, eager_attention: bool, compiled: bool) -> int:
    """Where the search for Hugging Face's largest begins: guessed to need at most a tenth more than is there."""
    if not bench.cuda:
        return bench.shape.micro_batch
    there = torch.cuda.get_device_properties(bench.device).total_memory / 2**30
    micro_batch = LARGEST_MICRO_BATCH
    while (
        micro_batch > 1
        and hugging_face_memory_gib(bench.shape.at(micro_batch), eager_attention, compiled) > 1.1 * there
    ):
        micro_batch //= 2
    return micro_batch


def choices(bench: Bench) -> dict[str, Item]:
    """Ours, one setting changed at a time from the default."""
    able = [row.name for row in TABLES["attention"] if not row.unusable(our_requirements(bench))]
    attention = {f"attention={name}": {"kernels": {"attention": name}} for name in able}
    found: dict[str, Item] = {}
    settings: dict[str, dict[str, dict[str, Any]]] = {"default": {}, **CHOICES, **attention}
    for name, groups in settings.items():
        shape = bench.shape.at(max(1, int(bench.shape.micro_batch * MICRO_BATCHES.get(name, 1))))
        found[name] = partial(measure, bench, name, ours(**groups), shape)
    return found


def tables(bench: Bench) -> dict[str, Item]:
    """HammerLLM's own: flash attention and compile, each alone and both, and both with a small vocabulary.

    Ours at both vocabularies is in ``competition``.
    """
    found: dict[str, Item] = {}
    for name, attention, compiled in (
        ("neither", "eager", False),
        ("flash attention", "flash", False),
        ("compile", "eager", True),
        ("both", "flash", True),
        ("both, 32,000 pieces", "flash", True),
    ):
        shape = _small_vocabulary(bench) if name.endswith("pieces") else bench.shape
        micro_batch = min(shape.micro_batch, _largest(bench, attention == "eager", compiled))
        who = hugging_face(attention, compiled)
        found[name] = partial(measure, bench, name, who, shape.at(micro_batch), 4, 6)
    return found


def clip_and_update(bench: Bench) -> Result:
    """Ours alone, with the copy to bf16, after a real backward each time."""
    shape = replace(bench.shape, micro_batch=1, accumulation=1)
    config, ctx = our_config(shape), ParallelContext.single(bench.device)
    model, optimizer = build(config, ctx)

    def run(mark: Callable[[], None]) -> None:
        windows = bench.tokens(shape.micro_batch, shape.sequence + 1, vocabulary=shape.vocabulary)
        loss_and_gradients(model, optimizer, [Batch.from_windows(windows)], config, ctx)
        mark()
        optimizer.clip_grad_norm(1.0)
        mark()
        optimizer.step(1e-4)
        mark()

    return _clip_and_update_times(bench, run)


def peer_clip_and_update(bench: Bench, make: Callable[[Sequence[Tensor]], torch.optim.Optimizer]) -> Result:
    """The same work with a library's fused AdamW and torch's clipping: fp32 masters, copied to bf16 weights."""
    shapes = logical_shapes(our_config(bench.shape).model).values()
    masters = [bench.random(*shape, dtype=torch.float32, scale=0.02).requires_grad_() for shape in shapes]
    weights = [master.detach().bfloat16() for master in masters]
    for master in masters:
        master.grad = bench.random(*master.shape, dtype=torch.float32, scale=0.02)
    optimizer = make(masters)

    @torch.no_grad()
    def run(mark: Callable[[], None]) -> None:
        mark()
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        mark()
        optimizer.step()
        torch._foreach_copy_(weights, masters)
        mark()

    return _clip_and_update_times(bench, run)


def _clip_and_update_times(bench: Bench, run: Callable[[Callable[[], None]], None]) -> Result:
    norm, update = (statistics.median(t) for t in marked_times(bench, run, bench.repeats(10)))
    return {"clip_ms": 1e3 * norm, "update_ms": 1e3 * update, "ms": 1e3 * (norm + update)}


def _torch_adamw(masters: Sequence[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(masters, lr=1e-4, fused=True)


def _apex_adamw(masters: Sequence[Tensor]) -> torch.optim.Optimizer:
    needed("apex.optimizers")
    from apex.optimizers import FusedAdam

    return FusedAdam(masters, lr=1e-4, adam_w_mode=True)  # type: ignore[no-any-return]


def optimizer(bench: Bench) -> dict[str, Item]:
    """Alone, beside its peers; and the step at accumulation 16, to check what the report computes from 4."""
    sixteen, entry = replace(bench.shape, accumulation=4 if bench.small else 16), "step at accumulation 16"
    return {
        "ours": partial(clip_and_update, bench),
        "torch": partial(peer_clip_and_update, bench, _torch_adamw),
        "apex": partial(peer_clip_and_update, bench, _apex_adamw),
        entry: partial(measure, bench, entry, ours(), sixteen, 2, 4),
    }


def memory(bench: Bench) -> dict[str, Item]:
    """Peak of two steps at each way to recompute."""
    found: dict[str, Item] = {}
    for recompute in ("none", "selective", "full"):
        groups = {} if recompute == "none" else {"train": {"recompute": recompute}}
        found[recompute] = partial(measure, bench, recompute, ours(**groups), bench.shape, 1, 1)
    return found
