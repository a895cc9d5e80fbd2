"""The limit of the CPU step: its matrix products alone, without anything between them; same arguments as our_step.py.

Every weight's three products (y = x W^T, dx = dy W, dW = dy^T x) at the sizes of a micro-batch, each as one call of
torch on tensors that exist already. The rate is FLOPs over seconds of a whole pass through them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from shapes import SHAPES

ROUNDS = 9


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
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for x, weight, grad, times in tensors:
            for _ in range(times):
                torch.mm(x, weight.t())
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"who": "bare products", "size": size, "precision": precision,
                      "gflops": round(flops / statistics.median(seconds) / 1e9, 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
