"""The parallel layers in plain torch, on any device; ``layers_te.py`` has the same names on Transformer Engine.

Every layer takes the sizes of its rank's part of the weight, as the placement says (``parallel/placement.py``), and the
tensor-parallel group. Activations are
``[s, b, ...]``; under sequence parallelism what lies between the linear layers is ``[s/t, b, h]``::

    [s/t, b, h] --ColumnParallelLinear--> [s, b, out/t] --...--> [s, b, in/t] --RowParallelLinear--> [s/t, b, h]
                 gather rows, x W^T                               x W^T, sum and scatter rows

Legend: s sequence, b micro-batch, h hidden, n query heads, g query groups, d size of a head, v vocabulary, t TP size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_hammer.kernels.linear import Products
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.weight_gradient import embedding_gradient
from megatron_hammer.parallel.collectives import (
    Done,
    all_gather_rows,
    all_gather_rows_async,
    all_reduce,
    reduce_scatter_rows_async,
    scatter_sum,
    sum_over_ranks,
)
from megatron_hammer.parallel.context import Group


@dataclass(frozen=True)
class LayerOptions:
    """What all layers of one model share."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tp: Group = field(default_factory=Group)
    sequence_parallel: bool = False
    operations: Operations = field(default_factory=Operations)
    fp8: str = "off"
    """``kernels.fp8``; for ``layers_te.py`` only."""
    world: Group = field(default_factory=Group)
    """All ranks: those that must scale alike in fp8."""

    def weight(self, *shape: int) -> nn.Parameter:
        """A zero weight of this local shape; it is filled by initialisation or a checkpoint."""
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.device))


class RMSNorm(nn.Module):
    """Add what the last sublayer computed to the residual stream and normalise over h; the weight is on all ranks.

    x, update [s/t, b, h] -> normed, x + update; without an update x itself is the second.
    """

    def __init__(self, hidden_size: int, eps: float, options: LayerOptions) -> None:
        super().__init__()
        self.eps, self.add_rms_norm = eps, options.operations.add_rms_norm
        self.weight = options.weight(hidden_size)

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.add_rms_norm(x, update, self.weight, self.eps)


class _Linear(torch.autograd.Function):
    """y = x W^T for x that all ranks of the group hold; the weight's gradient goes where the products put it.

    The sum of dx over the group overlaps that gradient; a group of one never communicates.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Products, group: Group) -> Tensor:
        # The parameter itself: what a saved tensor comes back as may be another object, without ``gradients``.
        ctx.weight, ctx.products, ctx.group, operand = weight, products, group, products.input(x)
        ctx.save_for_backward(*products.kept(operand))
        return products.forward(operand, products.weight(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        products, grad_y, grad_x, summed = ctx.products, ctx.products.gradient(grads[0]), None, Done()
        if ctx.needs_input_grad[0]:
            grad_x = products.input_gradient(grad_y, products.weight(ctx.weight))
            summed = all_reduce(grad_x, ctx.group, async_op=True)  # launch
        grad_weight = products.weight_gradient(ctx.weight, grad_y, ctx.saved_tensors)
        summed.wait()
        return grad_x, grad_weight, None, None


class _SequenceParallelLinear(torch.autograd.Function):
    """y = gather(x) W^T, which keeps only the rank's own rows of x for backward and gathers them again there.

    Backward overlaps both of its collectives with the two matrix products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, products: Products, group: Group) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.products, ctx.group = weight, products, group
        return products.forward(products.input(all_gather_rows(x, group)), products.weight(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (x,), products = ctx.saved_tensors, ctx.products
        full, gathered = all_gather_rows_async(x, ctx.group)  # launch
        grad_y = products.gradient(grads[0])
        grad_full = products.input_gradient(grad_y, products.weight(ctx.weight))  # [s, b, h], a part of the sum
        gathered.wait()
        grad_x, scattered = reduce_scatter_rows_async(grad_full, ctx.group)  # launch
        kept = products.kept(products.input(full))
        grad_weight = products.weight_gradient(ctx.weight, grad_y, kept)  # [out/t, h]
        scattered.wait()
        return grad_x, grad_weight, None, None


def linear(x: Tensor, weight: Tensor, options: LayerOptions) -> Tensor:
    """[.., in] x [out, in] -> [.., out], without communication."""
    return _Linear.apply(x, weight, options.operations.products.now(), Group())  # type: ignore[no-any-return]


def column_parallel(x: Tensor, weight: Tensor, options: LayerOptions) -> Tensor:
    """[s/t or s, b, h] x [out/t, h] -> [s, b, out/t]. Communicates over ``options.tp`` in both directions."""
    if options.tp.size == 1:
        return linear(x, weight, options)
    function = _SequenceParallelLinear if options.sequence_parallel else _Linear
    return function.apply(x, weight, options.operations.products.now(), options.tp)  # type: ignore[no-any-return]


class ColumnParallelLinear(nn.Module):
    """x W^T with the rows of W, the outputs, divided over the ranks: [s/t, b, in] -> [s, b, out/t]."""

    def __init__(self, in_features: int, out_local: int, options: LayerOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = options.weight(out_local, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(x, self.weight, self.options)


class QKVLinear(ColumnParallelLinear):
    """Queries, keys and values in one product: [s/t, b, h] -> [s, b, heads + 2 groups, d] of this rank, in this order.

    With more ranks than query groups, neighbouring ranks hold a copy of their group's key and value rows.
    """

    def __init__(
        self, hidden_size: int, heads_local: int, groups_local: int, head_size: int, options: LayerOptions
    ) -> None:
        super().__init__(hidden_size, (heads_local + 2 * groups_local) * head_size, options)
        self.heads_local, self.groups_local, self.head_size = heads_local, groups_local, head_size

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unflatten(-1, (-1, self.head_size))


class RowParallelLinear(nn.Module):
    """x W^T with the columns of W, the inputs, divided over the ranks: [s, b, in/t] -> [s/t, b, out], summed."""

    def __init__(self, in_local: int, out_features: int, options: LayerOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = options.weight(out_features, in_local)

    def forward(self, x: Tensor) -> Tensor:
        return _sum_parts(linear(x, self.weight, self.options), self.options)


def _sum_parts(partial: Tensor, options: LayerOptions) -> Tensor:
    """[s, b, h] parts -> their sum, [s/t, b, h] under sequence parallelism."""
    if options.sequence_parallel:
        return scatter_sum(partial, options.tp)
    return sum_over_ranks(partial, options.tp)


def operations(chosen: Operations) -> Operations:
    """What these layers compute with: what was chosen; ``layers_te.py`` has a norm of its own."""
    return chosen


def forward_region(options: LayerOptions) -> Callable[[], AbstractContextManager]:
    """What to run a forward of the layers in: nothing here, fp8's context in ``layers_te.py``."""
    return nullcontext


class _Embedding(torch.autograd.Function):
    """Rows of a table; their gradient touches the rows that were looked up and no others."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight = weight
        return F.embedding(tokens, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (tokens,) = ctx.saved_tensors
        return embedding_gradient(ctx.weight, tokens.flatten(), grads[0].flatten(0, -2)), None


class VocabParallelEmbedding(nn.Module):
    """Look up tokens in a table whose rows are divided over the ranks: [s, b] -> [s/t, b, h].

    The table is padded to a multiple of 128 rows a rank; no token reaches the padding.
    """

    def __init__(self, rows_local: int, hidden_size: int, options: LayerOptions) -> None:
        super().__init__()
        self.options, self.rows_local = options, rows_local
        self.weight = options.weight(rows_local, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.options.tp.size == 1:
            return _Embedding.apply(self.weight, tokens)  # type: ignore[no-any-return]
        local = tokens - self.rows_local * self.options.tp.rank
        elsewhere = (local < 0) | (local >= self.rows_local)
        found = _Embedding.apply(self.weight, local.masked_fill(elsewhere, 0))
        return _sum_parts(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.options)
