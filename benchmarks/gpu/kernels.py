"""Each memory-bound kernel of ours against its peers, as a share of the copy bandwidth by the bytes it must move.

The contestants of an operation are the rows of its table in ``megatron_hammer/kernels/``: ours, plain torch, and the
libraries that a row exists for (Liger, apex, Transformer Engine); plain torch compiled comes beside. Cross-entropy is
the kernel on a chunk of logits; Liger's works on all logits at once, so it gets the chunk as if it were all.

Ideal bytes, in hidden tensors of T x h x 2: norm + residual 4 forward, 4 backward; RoPE 2.25 and 2.25; SwiGLU 3 f/h and
5 f/h (gate and up are kept, their product is not written again). Cross-entropy: 4 a logit. AdamW: 30 a parameter; the
gradient's norm 4.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.measure import Bench, Item, Missing, Result, forward_and_backward, needed, summary, times
from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.argument_types import AdamWState, Columns
from megatron_hammer.kernels.backend import Backend, Requirements
from megatron_hammer.kernels.linear_cross_entropy import CHUNK_TOKENS
from megatron_hammer.kernels.selection import TABLES

COMPILED = "torch.compile"
PARAMETERS = 1_402_288_128
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """An operation with autograd: inputs, call, gradients of its outputs, and the bytes it must move."""

    leaves: Sequence[Tensor]
    call: Callable[..., Any]
    """(function, *leaves) -> outputs."""
    gradients: Sequence[Tensor]
    forward_bytes: float
    backward_bytes: float


def case(bench: Bench, operation: str) -> Case:
    shape = bench.shape
    s, b, h, f = shape.sequence, shape.micro_batch, shape.hidden, shape.ffn
    n, g, d = shape.heads, shape.groups, shape.hidden // shape.heads
    hidden = s * b * h * 2
    if operation == "norm":
        leaves = [bench.random(s, b, h).requires_grad_() for _ in range(2)]
        weight = bench.random(h).requires_grad_()
        gradients = [bench.random(s, b, h), bench.random(s, b, h)]
        return Case(
            [*leaves, weight], lambda norm, x, branch, w: norm(x, branch, w, EPS), gradients, 4 * hidden, 4 * hidden
        )
    if operation == "rope":
        qkv = bench.random(s, b, n + 2 * g, d).requires_grad_()
        cos, sin = bench.random(s, 1, 1, d // 2), bench.random(s, 1, 1, d // 2)
        gradients = [bench.random(s, b, heads, d) for heads in (n, g, g)]
        bytes_moved = 2 * hidden * (1 + g / n)
        return Case([qkv], lambda rope, x: tuple(rope(x, cos, sin, n, g)), gradients, bytes_moved, bytes_moved)
    gate_up = bench.random(s, b, 2 * f).requires_grad_()
    return Case([gate_up], lambda swiglu, x: swiglu(x), [bench.random(s, b, f)], 3 * hidden * f / h, 5 * hidden * f / h)


def our_requirements(bench: Bench, mask: str = "causal") -> Requirements:
    """What the 1.4B model asks of its kernels."""
    shape = bench.shape
    return Requirements(bench.device, torch.bfloat16, mask, shape.heads, shape.groups, shape.hidden // shape.heads)


def row_function(bench: Bench, operation: str, name: str) -> Any:
    """What a row of the operation's table loads, or plain torch compiled.

    Raises:
        Missing: this machine cannot run it, and why.
    """
    rows = {row.name: row for row in TABLES[operation]}
    row: Backend = rows["torch" if name == COMPILED else name]
    if reason := row.unusable(our_requirements(bench)):
        raise Missing(reason)
    if name in ("liger", "apex", "te"):
        needed({"liger": "liger_kernel", "apex": "apex.optimizers", "te": "transformer_engine.pytorch"}[name])
    function = row.load(bench.device)
    return torch.compile(function, dynamic=False) if name == COMPILED else function


def with_autograd(bench: Bench, operation: str, name: str) -> Result:
    function, job = row_function(bench, operation, name), case(bench, operation)
    seconds = forward_and_backward(
        bench, job.leaves, lambda *leaves: job.call(function, *leaves), job.gradients, bench.repeats(30)
    )
    result: Result = {}
    for way, taken, moved in zip(("forward", "backward"), seconds, (job.forward_bytes, job.backward_bytes)):
        result |= _bandwidth(way, taken, moved)
    return result


def _bandwidth(way: str, seconds: Sequence[float], moved: float) -> Result:
    rate = moved / statistics.median(seconds) / 1e9
    return {**summary(seconds, f"{way}_"), f"{way}_gb_per_second": rate}


def cross_entropy(bench: Bench, name: str) -> Result:
    """One chunk of logits, turned into their gradient in place."""
    tokens = 32 if bench.small else CHUNK_TOKENS["cuda"]
    vocabulary = bench.shape.vocabulary
    width = -(-vocabulary // 128) * 128
    logits, labels = bench.random(tokens, width), bench.tokens(tokens, vocabulary=vocabulary)
    weights = torch.full((tokens,), 1 / tokens, device=bench.device)
    columns = Columns.of(0, width, vocabulary)
    run: Callable[[], Any]
    if name == "liger":
        if not bench.cuda:
            raise Missing("Triton kernels need a GPU")
        needed("liger_kernel")
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        leaf = logits.requires_grad_()
        run = lambda: LigerCrossEntropyFunction.apply(leaf, labels, None)  # noqa: E731
    else:
        function = row_function(bench, "loss", name).loss_and_gradient_
        run = lambda: function(logits, labels, columns, weights)  # noqa: E731
    # Repeated calls read gradients as if they were logits: the values do not change the time.
    return _bandwidth("both", times(bench, run, bench.repeats(20)), 4.0 * tokens * width)


def optimizer_states(bench: Bench) -> tuple[list[AdamWState], Tensor]:
    """As many parameters as the 1.4B model in one flat state, and the flat gradient."""
    size = 100_003 if bench.small else PARAMETERS
    master, grad, exp_avg = (bench.random(size, dtype=torch.float32, scale=1e-2) for _ in range(3))
    exp_avg_sq = bench.random(size, dtype=torch.float32, scale=1e-2).square_()
    return [AdamWState(master, grad, exp_avg, exp_avg_sq, True, master.bfloat16())], grad


def optimizer(bench: Bench, name: str) -> Result:
    kernels = row_function(bench, "adamw", name)
    states, grad = optimizer_states(bench)
    one, zero, updates = (torch.full((), x, device=bench.device) for x in (1.0, 0.0, 5.0))
    out = torch.zeros((), device=bench.device)
    config, size = OptimizerConfig(), grad.numel()
    update = times(bench, lambda: kernels.update(states, updates, 1e-4, config, one, zero), bench.repeats(10))
    norm = times(bench, lambda: kernels.add_square_sum(grad, out), bench.repeats(10))
    return _bandwidth("update", update, 30.0 * size) | _bandwidth("norm", norm, 4.0 * size)


def items(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for operation in ("norm", "rope", "swiglu"):
        for name in [*(row.name for row in TABLES[operation]), COMPILED]:
            found[f"{operation}: {name}"] = partial(with_autograd, bench, operation, name)
    for name in [*(row.name for row in TABLES["loss"]), "liger"]:
        found[f"cross-entropy: {name}"] = partial(cross_entropy, bench, name)
    for name in (row.name for row in TABLES["adamw"]):
        found[f"adamw: {name}"] = partial(optimizer, bench, name)
    return found
