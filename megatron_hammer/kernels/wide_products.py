"""Products of bf16 on a processor that multiplies no bf16: widened to fp32 a block at a time, and rounded once.

Without avx512_bf16 and amx torch's products convert by themselves, at a quarter of the rate of fp32: 29 against 125
GFLOP/s a core of a Xeon with AVX-512. These reach 80 to 120, and the sums of the weights' gradients are never rounded.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.system import processor_text
from megatron_hammer.kernels.linear import Gradient, GraphProducts, Products, write_or_add
from megatron_hammer.kernels.native.cpu import empty
from megatron_hammer.kernels.newton_schulz import has_quick_bf16

BLOCK_ELEMENTS = 2**20  # of a weight that are in fp32 at a time: 4 MiB, while a head may have 2**28


def pay_here(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type are quicker so. Measured with AVX-512 alone; of AVX2 it is assumed."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return "avx2" in processor_text() and not has_quick_bf16()


def block_rows(rows: int, cols: int) -> int:
    """How many rows of a weight [rows, cols] are in fp32 at a time."""
    return min(rows, max(1, BLOCK_ELEMENTS // cols))


def scratch_elements(tokens: int, rows: int, cols: int) -> tuple[int, int, int]:
    """Of products of so many tokens with a weight [rows, cols] in fp32: an operand, a block of the other, results."""
    rows = block_rows(rows, cols)
    of_tokens, of_block = tokens * max(rows, cols), rows * max(tokens, cols)
    return of_tokens, of_block, max(of_tokens, of_block)


class _Scratch(threading.local):
    """Memory for what is in fp32 while a product is made: one set for each thread, which all its products use in turn.

    It goes with the thread. Until then it stays, since blocks of MiB that come and go leave holes in malloc's heap.
    """

    def __init__(self) -> None:
        self.whole = self.block = self.result = torch.empty(0, dtype=torch.float32)
        self.fitting = dict[tuple[int, torch.Size], int]()
        """(tokens, shape of a weight) for which it is large enough -> rows of a block."""

    def fit(self, tokens: int, shape: torch.Size) -> int:
        """Make it large enough for products of so many tokens with such a weight; rows of a block."""
        found, elements = [], scratch_elements(tokens, shape[0], shape[1])
        for memory, wanted in zip((self.whole, self.block, self.result), elements, strict=True):
            found.append(memory if memory.numel() >= wanted else torch.empty(wanted, dtype=torch.float32))
        self.whole, self.block, self.result = found
        return self.fitting.setdefault((tokens, shape), block_rows(shape[0], shape[1]))


SCRATCH = _Scratch()
"""Not an object's: a graph is given tensors, and head and layers would have a set each."""


class WideProducts(Products):
    """Operands and results are those of the plain products. Python calls are few: benchmarks/calls.py counts them."""

    def fprop(self, x: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        y = empty((*x.shape[:-1], weight.shape[0]), x) if out is None else out
        rows, results = x.flatten(0, -2), y.flatten(0, -2)
        size = SCRATCH.fitting.get((rows.shape[0], weight.shape)) or SCRATCH.fit(rows.shape[0], weight.shape)
        wide = SCRATCH.whole[: rows.numel()].view(rows.shape).copy_(rows)
        for i in range(0, weight.shape[0], size):
            part, found = weight[i : i + size], results[:, i : i + size]
            block = SCRATCH.block[: part.numel()].view(part.shape).copy_(part)
            found.copy_(torch.mm(wide, block.t(), out=SCRATCH.result[: found.numel()].view(found.shape)))
        return y

    def dgrad(self, grad: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        dx = empty((*grad.shape[:-1], weight.shape[1]), grad) if out is None else out
        rows, results = grad.flatten(0, -2), dx.flatten(0, -2)
        size = SCRATCH.fitting.get((rows.shape[0], weight.shape)) or SCRATCH.fit(rows.shape[0], weight.shape)
        summed = SCRATCH.result[: results.numel()].view(results.shape)
        for i in range(0, weight.shape[0], size):
            part, columns = weight[i : i + size], rows[:, i : i + size]
            block = SCRATCH.block[: part.numel()].view(part.shape).copy_(part)
            wide = SCRATCH.whole[: columns.numel()].view(columns.shape).copy_(columns)
            torch.addmm(summed, wide, block, beta=int(i > 0), out=summed)
        results.copy_(summed)
        return dx

    def wgrad(self, grad: Any, kept: tuple[Tensor, ...], place: Tensor, begun: bool) -> None:
        grad, x = grad.flatten(0, -2), kept[0].flatten(0, -2)
        size = SCRATCH.fitting.get((x.shape[0], place.shape)) or SCRATCH.fit(x.shape[0], place.shape)
        wide = SCRATCH.whole[: x.numel()].view(x.shape).copy_(x)
        for i in range(0, place.shape[0], size):
            part, columns = place[i : i + size], grad[:, i : i + size]
            block = SCRATCH.block[: columns.numel()].view(columns.shape).copy_(columns)
            if place.dtype == torch.float32:  # straight from the product, as those of fp32
                torch.addmm(part, block.t(), wide, beta=int(begun), out=part)
                continue
            product = torch.mm(block.t(), wide, out=SCRATCH.result[: part.numel()].view(part.shape))
            write_or_add(product, part, begun)


# ---- in the graph of a compiled layer: operations that the compiler calls and does not look into --------------------


class WideGraphProducts(GraphProducts):
    """The same in layers that torch.compile makes a graph of, bit for bit."""

    def __init__(self) -> None:
        self.evaluation = WideProducts()

    def fprop(self, x: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        return fprop_in_graph(x, weight)  # type: ignore[no-any-return]

    def dgrad(self, grad: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        return dgrad_in_graph(grad, weight)  # type: ignore[no-any-return]

    def wgrad_in_graph(self, gradient: Gradient, grad: Any, kept: tuple[Tensor, ...]) -> None:
        wgrad_in_graph(gradient.main_grad, gradient.begun, grad, kept[0])


_WIDE = WideProducts()


@torch.library.custom_op("megatron_hammer::wide_fprop", mutates_args=())
def fprop_in_graph(x: Tensor, weight: Tensor) -> Tensor:
    """``WideProducts.fprop``."""
    return _WIDE.fprop(x, weight)


@torch.library.custom_op("megatron_hammer::wide_dgrad", mutates_args=())
def dgrad_in_graph(grad: Tensor, weight: Tensor) -> Tensor:
    """``WideProducts.dgrad``."""
    return _WIDE.dgrad(grad, weight)


@torch.library.custom_op("megatron_hammer::wide_wgrad", mutates_args={"place"})
def wgrad_in_graph(place: Tensor, begun: Tensor, grad: Tensor, x: Tensor) -> None:
    """``WideProducts.wgrad``; begun: bool scalar on the host."""
    _WIDE.wgrad(grad, (x,), place, bool(begun))


fprop_in_graph.register_fake(lambda x, weight: x.new_empty((*x.shape[:-1], weight.shape[0])))
dgrad_in_graph.register_fake(lambda grad, weight: grad.new_empty((*grad.shape[:-1], weight.shape[1])))
wgrad_in_graph.register_fake(lambda place, begun, grad, x: None)
