"""Causal attention at (8, 32/4, 2048, 64): every backend that can run here, and torch's kernels forced one by one.

Rates count FLOPs as attention papers do: causal 2 b n s^2 d forward (half of the square), backward 2.5 times that.
Documents: the sum over documents of their own squares.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.kernels import our_requirements
from gpu.measure import Bench, Item, Missing, Result, forward_and_backward, needed, summary
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.selection import TABLES

FORCED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SEED = 7


def documents_of(bench: Bench) -> PackedSequences:
    """Random lengths, mean about 500 tokens (80 at toy size: 20); the end of a sample is the end of a document."""
    shape, rng, bounds = bench.shape, np.random.default_rng(SEED), [0]
    mean = shape.sequence // 4
    for sample in range(shape.micro_batch):
        end = (sample + 1) * shape.sequence
        while bounds[-1] < end:
            bounds.append(min(end, bounds[-1] + 1 + int(rng.exponential(mean))))
    return PackedSequences.from_cu_seqlens(np.array(bounds, np.int32), bench.device)


def _measure(bench: Bench, attend: Callable[..., Tensor], packed: bool, squares: float) -> Result:
    shape = bench.shape
    s, b, d = shape.sequence, shape.micro_batch, shape.hidden // shape.heads
    rows = (s * b, 1) if packed else (s, b)
    fused = bench.random(*rows, shape.heads + 2 * shape.groups, d).requires_grad_()
    gradient = bench.random(*rows, shape.heads, d)

    def run(qkv: Tensor) -> Tensor:
        return attend(*qkv.split((shape.heads, shape.groups, shape.groups), dim=2))

    forward, backward = forward_and_backward(bench, [fused], run, [gradient], bench.repeats(20))
    flops = 2.0 * shape.heads * d * squares
    return {
        **summary(forward, "forward_"),
        **summary(backward, "backward_"),
        "forward_tflops": flops / statistics.median(forward) / 1e12,
        "backward_tflops": 2.5 * flops / statistics.median(backward) / 1e12,
    }


def backend(bench: Bench, name: str, mask: str) -> Result:
    """A row of our table, called as the layer calls it: views of the fused qkv in, [s, b, heads, d]."""
    shape = bench.shape
    row = next(row for row in TABLES["attention"] if row.name == name)
    if reason := row.unusable(our_requirements(bench, mask)):
        raise Missing(reason)
    if name == "te":
        needed("transformer_engine.pytorch")
    function = row.load(bench.device)
    if mask == "causal":
        squares = float(shape.micro_batch * shape.sequence**2)
        return _measure(bench, lambda q, k, v: function(q, k, v, None), False, squares)
    documents = documents_of(bench)
    squares = float(sum(n * n for n in documents.lengths))
    result = _measure(bench, lambda q, k, v: function(q, k, v, documents), True, squares)
    return {**result, "documents": len(documents.lengths), "longest": documents.max_length}


def forced(bench: Bench, kernel: str, grouped: bool) -> Result:
    """One of SDPA's own kernels; grouped: ``enable_gqa``, else keys and values are repeated before."""
    if not bench.cuda and kernel != "flash":
        raise Missing("this kernel needs a GPU")
    shape = bench.shape

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        if not grouped:
            k, v = (x.repeat_interleave(shape.heads // shape.groups, dim=1) for x in (k, v))
        with sdpa_kernel(FORCED[kernel]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3)

    return _measure(bench, attend, False, float(shape.micro_batch * shape.sequence**2))


def items(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for mask in ("causal", "document"):
        for row in TABLES["attention"]:
            required = Requirements(torch.device("cpu"), torch.bfloat16, mask)
            if not row.unsupported(required):  # what this mask is none of its business is no line of the table
                found[f"{mask}: {row.name}"] = partial(backend, bench, row.name, mask)
    for kernel in FORCED:
        for grouped in (True, False):
            how = "enable_gqa" if grouped else "repeated keys"
            found[f"causal: {kernel} forced, {how}"] = partial(forced, bench, kernel, grouped)
    return found
