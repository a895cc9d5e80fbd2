"""The parallel layers in plain torch, on any device; ``layers_te.py`` has the same names on Transformer Engine.

Every layer takes global sizes and the tensor-parallel group, and holds its rank's part of the weight. Activations are
``[s, b, ...]``; under sequence parallelism what lies between the linear layers is ``[s/t, b, h]``::

    [s/t, b, h] --ColumnParallelLinear--> [s, b, out/t] --...--> [s, b, in/t] --RowParallelLinear--> [s/t, b, h]
                 gather rows, x W^T                               x W^T, sum and scatter rows

Legend: s sequence, b micro-batch, h hidden, n query heads, g query groups, d head_dim, v vocabulary, t TP size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_hammer.config import padded_vocab_size
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.parallel.collectives import (
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
    """Normalise [s/t, b, h] over h; the weight is the same on all ranks."""

    def __init__(self, hidden_size: int, eps: float, options: LayerOptions) -> None:
        super().__init__()
        self.eps, self.norm = eps, options.operations.rms_norm
        self.weight = options.weight(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.weight, self.eps)


class _SequenceParallelLinear(torch.autograd.Function):
    """y = gather(x) W^T, which keeps only the rank's own rows of x for backward and gathers them again there.

    Backward overlaps both of its collectives with the two matrix products.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return F.linear(all_gather_rows(x, group), weight)  # [s, b, out/t]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_y = grads[0]
        full, gathered = all_gather_rows_async(x, ctx.group)  # launch
        grad_full = grad_y.matmul(weight)  # [s, b, h], this rank's part of the sum
        gathered.wait()
        grad_x, scattered = reduce_scatter_rows_async(grad_full, ctx.group)  # launch
        grad_weight = grad_y.flatten(0, 1).t().matmul(full.flatten(0, 1))  # [out/t, h]
        scattered.wait()
        return grad_x, grad_weight, None


class _TensorParallelLinear(torch.autograd.Function):
    """y = x W^T for x that all ranks hold; the sum of its gradient overlaps the weight's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad_y = grads[0]
        grad_x = grad_y.matmul(weight)
        summed = all_reduce(grad_x, ctx.group, async_op=True)  # launch
        grad_weight = grad_y.flatten(0, 1).t().matmul(x.flatten(0, 1))
        summed.wait()
        return grad_x, grad_weight, None


def column_parallel(x: Tensor, weight: Tensor, options: LayerOptions) -> Tensor:
    """[s/t or s, b, h] x [out/t, h] -> [s, b, out/t]. Communicates over ``options.tp`` in both directions."""
    if options.tp.size == 1:
        return F.linear(x, weight)
    function = _SequenceParallelLinear if options.sequence_parallel else _TensorParallelLinear
    return function.apply(x, weight, options.tp)  # type: ignore[no-any-return]


class ColumnParallelLinear(nn.Module):
    """x W^T with the rows of W, the outputs, divided over the ranks: [s/t, b, in] -> [s, b, out/t]."""

    def __init__(self, in_features: int, out_features: int, options: LayerOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = options.weight(out_features // options.tp.size, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return column_parallel(x, self.weight, self.options)


class QKVLinear(nn.Module):
    """Queries, keys and values in one product: [s/t, b, h] -> [s, b, n/t, d] and twice [s, b, max(1, g/t), d].

    With more ranks than query groups, neighbouring ranks hold a copy of their group's key and value rows.
    """

    def __init__(self, hidden_size: int, heads: int, groups: int, head_dim: int, options: LayerOptions) -> None:
        super().__init__()
        self.options, self.head_dim = options, head_dim
        self.heads_local = heads // options.tp.size
        self.groups_local = max(1, groups // options.tp.size)
        self.weight = options.weight((self.heads_local + 2 * self.groups_local) * head_dim, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        qkv = column_parallel(x, self.weight, self.options)
        s, b, _ = qkv.shape
        return qkv.view(s, b, -1, self.head_dim).split((self.heads_local, self.groups_local, self.groups_local), dim=2)


class RowParallelLinear(nn.Module):
    """x W^T with the columns of W, the inputs, divided over the ranks: [s, b, in/t] -> [s/t, b, out], summed."""

    def __init__(self, in_features: int, out_features: int, options: LayerOptions) -> None:
        super().__init__()
        self.options = options
        self.weight = options.weight(out_features, in_features // options.tp.size)

    def forward(self, x: Tensor) -> Tensor:
        return _sum_parts(F.linear(x, self.weight), self.options)


def _sum_parts(partial: Tensor, options: LayerOptions) -> Tensor:
    """[s, b, h] parts -> their sum, [s/t, b, h] under sequence parallelism."""
    if options.sequence_parallel:
        return scatter_sum(partial, options.tp)
    return sum_over_ranks(partial, options.tp)


def forward_region(options: LayerOptions) -> Callable[[], AbstractContextManager]:
    """What to run a forward of the layers in: nothing here, fp8's context in ``layers_te.py``."""
    return nullcontext


class VocabParallelEmbedding(nn.Module):
    """Look up tokens in a table whose rows are divided over the ranks: [s, b] -> [s/t, b, h].

    The table is padded to a multiple of 128 rows a rank; no token reaches the padding.
    """

    def __init__(self, vocab_size: int, hidden_size: int, options: LayerOptions) -> None:
        super().__init__()
        self.options = options
        self.rows = padded_vocab_size(vocab_size, options.tp.size) // options.tp.size
        self.weight = options.weight(self.rows, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.options.tp.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.rows * self.options.tp.rank
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return _sum_parts(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.options)
