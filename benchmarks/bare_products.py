"""The limit of the CPU step: its matrix products alone, without anything between them; same arguments as our_step.py.

Every weight's three products (y = x W^T, dx = dy W, dW = dy^T x) at the sizes of a micro-batch, on tensors that exist
already. The rate is FLOPs over seconds of a whole pass through them; passes of both kinds alternate. ``gflops`` is that
of the products that a run makes here, by the name in ``products``:

    torch's                each is one call of torch in the precision of the run
    bf16 by way of fp32    ``kernels/wide_products.py``, where a processor has no instructions for bf16; dW is fp32

``torch_gflops`` is the first kind's in any case.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from shapes import SHAPES
from torch import Tensor

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.fp8 import select_products
from megatron_hammer.kernels.linear import Products
from megatron_hammer.kernels.wide_products import WideProducts

ROUNDS = 9

Three = Callable[[Tensor, Tensor, Tensor], object]
"""Computes with x [r, in], W [out, in] and dy [r, out]."""


def by_torch(x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """One call each."""
    torch.mm(x, weight.t())
    torch.mm(grad, weight)
    torch.mm(grad.t(), x)


def by(products: Products) -> Three:
    """As a layer has them made, its weight's gradient the first of a step."""

    def three(x: Tensor, weight: Tensor, grad: Tensor) -> None:
        products.fprop(x, weight)
        products.dgrad(grad, weight)
        products.wgrad(grad, (x,), torch.empty(weight.shape, dtype=torch.float32), False)

    return three


def main() -> None:
    """Time one size and precision; the mode is taken and ignored."""
    size, _, precision = sys.argv[1:4]
    shape, dtype = SHAPES[size], torch.bfloat16 if precision == "bf16" else torch.float32
    rows, h, d = shape.micro_batch * shape.sequence, shape.hidden, shape.hidden // shape.heads
    layer = [((shape.heads + 2 * shape.groups) * d, h), (h, h), (2 * shape.ffn, h), (h, shape.ffn)]
    weights = [(w, shape.layers) for w in layer] + [((shape.vocabulary, h), 1)]
    tensors = [
        (
            torch.randn(rows, inputs).to(dtype),
            torch.randn(outputs, inputs).to(dtype),
            torch.randn(rows, outputs).to(dtype),
            times,
        )
        for (outputs, inputs), times in weights
    ]
    flops = sum(6 * rows * outputs * inputs * times for (outputs, inputs), times in weights)
    kinds: dict[str, Three] = {"torch's": by_torch}
    ours, _ = select_products(KernelsConfig(), torch.device("cpu"), dtype)
    if isinstance(ours, WideProducts):
        kinds["bf16 by way of fp32"] = by(ours)
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, three in kinds.items():
            start = time.perf_counter()
            for x, weight, grad, times in tensors:
                for _ in range(times):
                    three(x, weight, grad)
            seconds[kind].append(time.perf_counter() - start)
    rates = {kind: round(flops / statistics.median(each) / 1e9, 1) for kind, each in seconds.items()}
    made = list(kinds)[-1]
    print(json.dumps({"who": "bare products", "size": size, "precision": precision, "products": made,
                      "gflops": rates[made], "torch_gflops": rates["torch's"]}))  # fmt: skip


if __name__ == "__main__":
    main()
