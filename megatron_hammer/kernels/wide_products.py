"""Products of bf16 on a processor that multiplies no bf16: widened to fp32 a block at a time, and rounded once.

Without avx512_bf16 and amx torch's products convert by themselves, at a quarter of the rate of fp32: 29 against 125
GFLOP/s a core of a Xeon with AVX-512. These reach 80 to 120, and the sums of the weights' gradients are never rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.system import processor_text
from megatron_hammer.kernels.linear import Products, accumulate
from megatron_hammer.kernels.native.cpu import empty
from megatron_hammer.kernels.newton_schulz import has_quick_bf16

BLOCK_ELEMENTS = 2**20  # of a weight that are in fp32 at a time: 4 MiB, while a head may have 2**28


def pay_here(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type are quicker so. Measured with AVX-512 alone; of AVX2 it is assumed."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return "avx2" in processor_text() and not has_quick_bf16()


class WideProducts(Products):
    """Operands and results are those of the plain products. Python calls are few: benchmarks/calls.py counts them."""

    def fprop(self, x: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        y = empty((*x.shape[:-1], weight.shape[0]), x) if out is None else out
        rows, results, size = x.flatten(0, -2).float(), y.flatten(0, -2), max(1, BLOCK_ELEMENTS // weight.shape[1])
        for i in range(0, weight.shape[0], size):
            results[:, i : i + size] = rows @ weight[i : i + size].float().t()
        return y

    def dgrad(self, grad: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        dx = empty((*grad.shape[:-1], weight.shape[1]), grad) if out is None else out
        rows, size = grad.flatten(0, -2), max(1, BLOCK_ELEMENTS // weight.shape[1])
        summed = rows[:, :size].float() @ weight[:size].float()
        for i in range(size, weight.shape[0], size):
            summed.addmm_(rows[:, i : i + size].float(), weight[i : i + size].float())
        dx.flatten(0, -2).copy_(summed)
        return dx

    def wgrad(self, grad: Any, kept: tuple[Tensor, ...], place: Tensor, begun: bool) -> None:
        transposed, x = grad.flatten(0, -2).t(), kept[0].flatten(0, -2).float()
        size = max(1, BLOCK_ELEMENTS // x.shape[1])
        for i in range(0, place.shape[0], size):
            accumulate(transposed[i : i + size].float() @ x, place[i : i + size], begun)
