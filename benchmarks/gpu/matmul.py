"""Every matrix product of the 1.4B step, as our layers call it; the head at the odd and at the padded vocabulary.

forward   x W^T                    dgrad   dy W
wgrad     dy^T x, added in fp32 to the optimizer's buffer (``add_wgrad``), and beside it the plain bf16 one
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from roofline import Product, products

from gpu.measure import Bench, Item, Result, summary, times
from megatron_hammer.kernels.linear import add_wgrad


def measure(bench: Bench, product: Product, plain: bool = False) -> Result:
    """Median time and rate of one product; ``plain``: a weight's gradient in bf16, nothing added."""
    kind, m, n, k = product.name.split()[0], product.m, product.n, product.k
    run: Callable[[], Any]
    if kind == "wgrad":
        grad_y, x = bench.random(k, m), bench.random(k, n)
        place = bench.random(m, n, dtype=torch.bfloat16 if plain else torch.float32)
        if plain:
            run = lambda: torch.mm(grad_y.t(), x, out=place)  # noqa: E731
        else:
            run = lambda: add_wgrad(grad_y, x, place, True)  # noqa: E731
    else:
        a = bench.random(m, k)
        b = bench.random(n, k, scale=0.02).t() if kind == "forward" else bench.random(k, n, scale=0.02)
        out = torch.empty((m, n), device=bench.device, dtype=torch.bfloat16)
        run = lambda: torch.mm(a, b, out=out)  # noqa: E731
    seconds = times(bench, run, bench.repeats(20))
    return {
        **summary(seconds),
        "tflops": product.flops / statistics.median(seconds) / 1e12,
        "calls": product.calls,
        "shape": f"{m} x {n} x {k}",
    }


def items(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for pad, suffix in ((True, ""), (False, ", odd vocabulary")):
        for product in products(bench.shape, pad=pad):
            if not pad and not product.name.endswith("head"):
                continue
            found[product.name + suffix] = partial(measure, bench, product)
            if product.name.startswith("wgrad"):
                found[f"{product.name}{suffix}, plain bf16"] = partial(measure, bench, product, plain=True)
    return found
