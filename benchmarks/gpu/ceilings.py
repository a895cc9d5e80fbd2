"""What the card at hand can do: the denominators of everything else.

copy        read + written bytes of a device-to-device copy of 4 GiB, so that 8.6 GB move
bf16, fp8   an 8192^3 product: the mean of a burst of ten, and of 5 s without a pause, when power limits the clock
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from gpu.measure import Bench, Clocks, Item, Result, times

SIDE = 8192
COPY_BYTES = 4 * 2**30
BURST, SUSTAINED_SECONDS = 10, 5.0


def copy(bench: Bench) -> Result:
    size = 2**20 if bench.small else COPY_BYTES
    source, target = bench.random(size // 4, dtype=torch.float32), torch.empty(size // 4, device=bench.device)
    seconds = statistics.median(times(bench, lambda: target.copy_(source), bench.repeats(20)))
    return {"tb_per_second": 2 * size / seconds / 1e12, "bytes": 2 * size}


def _bf16(bench: Bench, side: int) -> tuple[Tensor, Tensor]:
    return bench.random(side, side), bench.random(side, side)


def bf16(bench: Bench, sustained: bool) -> Result:
    side = 128 if bench.small else SIDE
    a, b = _bf16(bench, side)
    out = torch.empty_like(a)
    return _rate(bench, lambda: torch.mm(a, b, out=out), side, sustained)


def fp8(bench: Bench, sustained: bool) -> Result:
    side = 16 if bench.small else SIDE
    a, b = (x.to(torch.float8_e4m3fn) for x in _bf16(bench, side))
    one = torch.ones((), device=bench.device)

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _rate(bench, product, side, sustained)


def _rate(bench: Bench, product: Callable[[], Tensor], side: int, sustained: bool) -> Result:
    """TFLOP/s of the mean product."""
    for _ in range(3):
        product()
    bench.synchronise()
    limit, count = (0.05 if bench.small else SUSTAINED_SECONDS) if sustained else 0.0, 0
    with Clocks(bench) as clocks:
        began = time.perf_counter()
        while count == 0 or time.perf_counter() - began < limit:
            for _ in range(BURST):
                product()
            count += BURST
            bench.synchronise()  # once in 14 ms: 0.1 % of it
        ended = time.perf_counter()
    rate = 2 * side**3 * count / (ended - began) / 1e12
    return {"tflops": rate, "products": count, **clocks.medians((began, ended))}


def items(bench: Bench) -> dict[str, Item]:
    return {
        "copy": lambda: copy(bench),
        "bf16 burst": lambda: bf16(bench, False),
        "bf16 sustained": lambda: bf16(bench, True),
        "fp8 burst": lambda: fp8(bench, False),
        "fp8 sustained": lambda: fp8(bench, True),
    }
