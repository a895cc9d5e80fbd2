"""The parallel layers in plain torch, on any device; ``layers_te.py`` has the same names on Transformer Engine.

Every layer takes the sizes of its rank's part of the weight, as the placement says (``parallel/placement.py``), and the
tensor-parallel group. Activations are ``[s, b, ...]``; under sequence parallelism what lies between the linear layers
is ``[s/t, b, h]``::

    [s/t, b, h] --ColumnParallelLinear--> [s, b, out/t] --...--> [s, b, in/t] --RowParallelLinear--> [s/t, b, h]
                 gather rows, x W^T                               x W^T, sum and scatter rows

Legend: s sequence, b micro-batch, h hidden, n query heads, g query groups, d size of a head, v vocabulary, t TP size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_hammer.kernels.embedding import look_up
from megatron_hammer.kernels.linear import (
    Division,
    Gradient,
    GradientStore,
    Overlap,
    linear,
    stored,
)
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.ranges import LINEAR, RangeOf, no_range, within
from megatron_hammer.parallel.collectives import scatter_sum, sum_over_ranks
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
    store: GradientStore | None = None
    """Who owns the weights and sums their gradients; None: each layer owns its own, and autograd leaves the gradients
    in ``weight.grad``, as in certificates and tests.
    """
    range_of: RangeOf = no_range
    """Entered around what a layer does, for a profiler."""
    tp_comm_overlap: Overlap = "bulk"
    """How a linear layer's collectives run beside its products (``Division``)."""

    def weight(self, *shape: int) -> tuple[nn.Parameter, Gradient | None]:
        """A zero weight of this local shape, filled by initialisation or a checkpoint, and where its gradient goes."""
        if self.store is not None:
            return self.store.weight(*shape)
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.device)), None


class _Ready(torch.autograd.Function):
    """The input itself; its backward comes after that of whatever reads it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: Sequence[Gradient]) -> Tensor:
        ctx.gradients = gradients
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        for gradient in ctx.gradients:
            gradient.ready()
        return grads[0], None


def ready_after(x: Tensor, gradients: Sequence[Gradient]) -> Tensor:
    """The input of a compiled layer or of a library's, which write gradients by themselves.

    When the gradient of x comes out of its backward, they have been written, and the store hears of it.
    """
    return _Ready.apply(x, gradients) if gradients else x  # type: ignore[no-untyped-call]


class RMSNorm(nn.Module):
    """Add what the last sublayer computed to the residual stream and normalise over h; the weight is on all ranks.

    x, branch [s/t, b, h] -> normed, x + branch; without a branch x itself is the second.
    """

    def __init__(self, hidden_size: int, eps: float, options: LayerOptions) -> None:
        super().__init__()
        self.eps, self.add_rms_norm = eps, options.operations.add_rms_norm
        self.weight, self.gradient = options.weight(hidden_size)

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.add_rms_norm(x, branch, self.weight, self.eps, self.gradient)


def column_parallel(x: Tensor, weight: Tensor, options: LayerOptions) -> Tensor:
    """``ColumnParallelLinear`` with a weight that another module holds: [s/t or s, b, h] -> [s, b, out/t]."""
    products = options.operations.products
    return linear(x, weight, Division(None, products, "column", options.tp, options.sequence_parallel))


class Bias(nn.Module):
    """What a linear layer adds to each row of its result, if anything: the base of the layers of both modules."""

    bias: nn.Parameter | None
    bias_gradient: Gradient | None

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.bias_gradient = None, None

    def add_bias_of(self, features: int, options: LayerOptions) -> None:
        """Have a bias; after the weight, as in the parameter table."""
        self.bias, self.bias_gradient = options.weight(features)

    def with_bias(self, y: Tensor) -> Tensor:
        """y + bias; of a row-parallel layer after the sum over ranks, so that it is added once."""
        assert self.bias is not None
        return y + stored(self.bias, self.bias_gradient)


class _Linear(Bias):
    """x W^T with a matrix [out_features, in_features] on this rank, divided by ``kind`` as ``linear`` says."""

    def __init__(
        self, in_features: int, out_features: int, kind: Literal["column", "row"], options: LayerOptions, bias: bool
    ) -> None:
        super().__init__()
        self.weight, self.gradient = options.weight(out_features, in_features)
        if bias:
            self.add_bias_of(out_features, options)
        products = options.operations.products
        self.division = Division(
            self.gradient, products, kind, options.tp, options.sequence_parallel, options.tp_comm_overlap
        )
        self.linear = within(options.range_of, LINEAR, linear)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x, self.weight, self.division)
        return y if self.bias is None else self.with_bias(y)


class ColumnParallelLinear(_Linear):
    """x W^T with the rows of W, the outputs, divided over the ranks: [s/t, b, in] -> [s, b, out/t]."""

    def __init__(self, in_features: int, out_local: int, options: LayerOptions, bias: bool = False) -> None:
        super().__init__(in_features, out_local, "column", options, bias)


class RowParallelLinear(_Linear):
    """x W^T with the columns of W, the inputs, divided over the ranks: [s, b, in/t] -> [s/t, b, out], summed."""

    def __init__(self, in_local: int, out_features: int, options: LayerOptions, bias: bool = False) -> None:
        super().__init__(in_local, out_features, "row", options, bias)


class QKVLinear(ColumnParallelLinear):
    """Queries, keys and values in one product: [s/t, b, h] -> [s, b, heads + 2 groups, d] of this rank, in this order.

    With more ranks than query groups, neighbouring ranks hold a copy of their group's key and value rows.
    """

    def __init__(
        self, hidden_size: int, heads_local: int, groups_local: int, head_size: int, options: LayerOptions,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, (heads_local + 2 * groups_local) * head_size, options, bias)
        self.head_size = head_size

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y.view(*y.shape[:-1], -1, self.head_size)


def _sum_parts(partial: Tensor, options: LayerOptions) -> Tensor:
    """[s, b, h] parts -> their sum, [s/t, b, h] under sequence parallelism."""
    if options.sequence_parallel:
        return scatter_sum(partial, options.tp)
    return sum_over_ranks(partial, options.tp)


def operations(chosen: Operations) -> Operations:
    """What these layers compute with: what was chosen; ``layers_te.py`` has a norm of its own."""
    return chosen


def forward_region(options: LayerOptions) -> Callable[[], AbstractContextManager[Any]]:
    """What to run a forward of the layers in: nothing here, fp8's context in ``layers_te.py``."""
    return nullcontext


class VocabParallelEmbedding(nn.Module):
    """Look up tokens in a table whose rows are divided over the ranks: [s, b] -> [s/t, b, h].

    The table is padded to a multiple of 128 rows a rank; no token reaches the padding.
    """

    def __init__(self, rows_local: int, hidden_size: int, options: LayerOptions) -> None:
        super().__init__()
        self.options, self.rows_local = options, rows_local
        self.weight, self.gradient = options.weight(rows_local, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.options.tp.size == 1:
            return look_up(self.weight, self.gradient, tokens)  # type: ignore[no-any-return]
        local = tokens - self.rows_local * self.options.tp.rank
        elsewhere = (local < 0) | (local >= self.rows_local)
        # Another rank's tokens look up any rows, whose gradient is zero; all the same one would be added to in turn.
        found = look_up(self.weight, self.gradient, local % self.rows_local)
        return _sum_parts(found.masked_fill(elsewhere.unsqueeze(-1), 0), self.options)
