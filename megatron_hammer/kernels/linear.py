"""Linear layers y = x W^T: three matrix products, where the gradient of the weight goes, and what ranks exchange.

The products are one object that a model is built with, ``Products``, with the field's names for them::

    fprop   y  [.., out]   = x W^T
    dgrad   dx [.., in]    = dy W
    wgrad   dW [out, in]  += dy^T x      summed in fp32 over the chunks of a micro-batch and the micro-batches of a step

Plain products take x, W and dy as they are, compute in their dtype, and are the reference. Others (``fp8.py``) first
make an operand of each, once for the two products that it takes part in (``Operands``).

A layer is given each weight together with a ``Gradient``, which says where wgrad is summed: in an fp32 buffer of the
optimizer's store, straight from the matrix product, without a copy in another place or dtype. A GPU's product
does this in one pass, adding to fp32 from 16-bit inputs (``addmm`` with ``out_dtype``, in every torch that the
package takes). A CPU's writes 16 bits, so there the product takes a block of rows at a time and is added in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import function as torch_function
from torch.nn import functional as F

from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.native.cpu import empty
from megatron_hammer.parallel.collectives import all_gather_rows, all_reduce, reduce_scatter_rows_async
from megatron_hammer.parallel.context import Group
from megatron_hammer.parallel.in_chunks import multiply_gathered, multiply_scattered

# Elements of one block of wgrad on a CPU: 2 MiB in 16 bits, added while in cache (measured: 5-30 % against one block).
# On an EPYC with 1 MiB of L2 smaller ones are no faster; there the sum costs 0 to 3 % of a layer's product, and 5 % of
# a head's of 32,000 x 512, which is what the memory gives one core (19 GB/s).
BLOCK_ELEMENTS = 2**20

Result = TypeVar("Result")


# ---- what the layers' autograd functions share: no Python call of torch's that they can do without ------------------
# (benchmarks/calls.py counts them)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator of this name, which refuses second derivatives; nine Python calls fewer where none are made."""
    refusing = torch_function.once_differentiable(backward)

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        return refusing(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return once


def direct(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without what torch does before it for functorch (vmap, jvp), under which no layer is run.

    That takes some ten Python calls. torch.compile knows ``apply`` only.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


class Gradient(Protocol):
    """The gradient of one weight, summed over the micro-batches of a step by a ``GradientStore``.

    A layer without one (None) returns the gradient to autograd, which leaves it in ``weight.grad``.
    """

    main_grad: Tensor
    """The sum, in fp32 and shaped as the weight; for graphs and libraries that write it by themselves, else ``add``."""

    @property
    def begun(self) -> Tensor:
        """Whether the sum holds earlier micro-batches of the step: a bool scalar on the host, an input of graphs."""
        ...

    @property
    def version(self) -> int | None:
        """Counts the updates of the weight: what was computed from the weight holds until the next one.

        None: the weight is there only while it is used, and nothing that was computed from it should be held longer.
        """
        ...

    def add(self, write: Callable[[Tensor, bool], Result], last: bool = True) -> Result:
        """Have ``write(place, begun)`` write what it computes over ``place``, or add it where ``begun``.

        Args:
            last: nothing more is added in this micro-batch; false for the head of a model whose embedding is the same
                weight.
        """
        ...

    def ready(self) -> None:
        """Say that a graph or a library has written all of this micro-batch into ``main_grad``."""
        ...


class GradientStore(Protocol):
    """Who owns the weights of a model and sums their gradients; ``optim/store.py`` has one.

    Another way of sharding is another store: a layer only ever sees these two classes.
    """

    def weight(self, *shape: int) -> tuple[nn.Parameter, Gradient]:
        """The next weight of the parameter table, of which this must be the shape, and its gradient.

        The parts of a model ask for their weights in the order of the table, which is the order of forward.
        """
        ...

    @property
    def needs_acquire(self) -> bool:
        """Whether weights may be on their way or given up, so that a part acquires them before it computes."""
        ...

    @property
    def weights_stay(self) -> bool:
        """Whether all weights are always there; else those of a part of the model are, from acquire to release."""
        ...

    @property
    def sums_are_new(self) -> bool:
        """Whether ``main_grad`` has no earlier micro-batches in it, and no room before ``add`` or ``open_sums``."""
        ...

    def acquire(self, part: str, then: Sequence[str] = ()) -> None:
        """Say that a part of the model (``Parameter.part``) computes next: its weights are there on return.

        Args:
            then: parts that come after it, whose weights may come meanwhile.
        """
        ...

    def release(self, part: str, last: bool = True) -> None:
        """Say that it has computed; last: and that its backward does not come later, or is over."""
        ...

    def open_sums(self, part: str) -> None:
        """Say that the backward of a part comes, which writes to ``main_grad`` by itself."""
        ...

    def writing(self, part: str) -> AbstractContextManager[None]:
        """Have the weights of a part, and keep what is written to them."""
        ...


class Operands(Protocol):
    """Makes what products take instead of the tensors themselves, and give to each other."""

    def input(self, x: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """x [.., in] as an operand, and what wgrad will need of it."""
        ...

    def weight(self, weight: Tensor, gradient: Gradient | None) -> Any:
        """W [out, in] as an operand; its ``Gradient`` knows when it was updated."""
        ...

    def gradient(self, grad_y: Tensor) -> Any:
        """dy [.., out] as an operand."""
        ...


class Products:
    """Products in the dtype of the tensors, accumulated in fp32 by the matrix library."""

    operands: Operands | None = None
    """Who makes the operands; None: the tensors are."""
    in_graph = False
    """Whether these are for layers that torch.compile makes a graph of (``GraphProducts``)."""

    def __init__(self) -> None:
        self.evaluation: Products = self
        """Those to use where no gradient is recorded."""

    def fprop(self, x: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        """y [.., out]; into ``out`` where it is given."""
        y = empty((*x.shape[:-1], weight.shape[0]), x) if out is None else out
        torch.mm(x.flatten(0, -2), weight.t(), out=y.flatten(0, -2))
        return y

    def dgrad(self, grad: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        """dx [.., in]; into ``out`` where it is given."""
        dx = empty((*grad.shape[:-1], weight.shape[1]), grad) if out is None else out
        torch.mm(grad.flatten(0, -2), weight, out=dx.flatten(0, -2))
        return dx

    def wgrad(self, grad: Any, kept: tuple[Tensor, ...], place: Tensor, begun: bool) -> None:
        """place [out, in] = dy^T x, or += where it has begun; kept: (x,), or what ``operands`` keeps of x."""
        add_wgrad(grad.flatten(0, -2), kept[0].flatten(0, -2), place, begun)

    def give_wgrad(
        self, weight: Tensor, gradient: Gradient | None, grad: Any, kept: tuple[Tensor, ...]
    ) -> Tensor | None:
        """Add dW to ``gradient``; without one return it, in the weight's dtype, for autograd."""
        if gradient is None:
            grad_weight = torch.empty_like(weight)
            self.wgrad(grad, kept, grad_weight, False)
            return grad_weight
        gradient.add(partial(self.wgrad, grad, kept))
        return None


PLAIN = Products()


class GraphProducts(Products):
    """The same in layers that torch.compile makes a graph of: the compiler finds the memory, and is told where each
    gradient goes. What it does not compile are evaluations.
    """

    in_graph = True

    def __init__(self) -> None:
        self.evaluation = PLAIN

    def fprop(self, x: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        return F.linear(x, weight)

    def dgrad(self, grad: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        return torch.matmul(grad, weight)

    def wgrad_in_graph(self, gradient: Gradient, grad: Any, kept: tuple[Tensor, ...]) -> None:
        """``wgrad`` into ``gradient.main_grad``."""
        x = kept[0].flatten(0, -2)
        add_wgrad_in_graph(gradient.main_grad, gradient.begun, grad.flatten(0, -2), x)

    def give_wgrad(
        self, weight: Tensor, gradient: Gradient | None, grad: Any, kept: tuple[Tensor, ...]
    ) -> Tensor | None:
        if gradient is None:
            return super().give_wgrad(weight, gradient, grad, kept)
        self.wgrad_in_graph(gradient, grad, kept)
        return None


def add_wgrad(grad_y: Tensor, x: Tensor, place: Tensor, begun: bool) -> None:
    """place = dy^T x, or += where it has begun.

    Args:
        grad_y: [r, out]. x: [r, in], of one dtype.
        place: [out, in] fp32, or the dtype of the others.
    """
    transposed = grad_y.t()
    if place.dtype == x.dtype:
        torch.addmm(place, transposed, x, beta=int(begun), out=place)
    elif place.is_cuda:
        torch.addmm(place, transposed, x, beta=int(begun), out_dtype=place.dtype, out=place)
    else:
        rows = max(1, BLOCK_ELEMENTS // x.shape[1])
        for i in range(0, place.shape[0], rows):
            write_or_add(torch.mm(transposed[i : i + rows], x), place[i : i + rows], begun)


def write_or_add(values: Tensor, place: Tensor, begun: bool) -> None:
    """place = values, or += where it has begun: 16 bits to fp32 on a CPU in half of torch's time by our kernels."""
    if not begun:
        place.copy_(values)
    elif place.device.type == "cpu" and values.dtype == torch.bfloat16 and cpu.COMPILED:
        cpu.library().accumulate(place, values, True)
    else:
        place.add_(values)


class _Stored(torch.autograd.Function):
    """The weight itself; backward adds its gradient to the store, and autograd gets none."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: Gradient) -> Tensor:
        ctx.gradient = gradient
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        gradient, (grad,) = ctx.gradient, grads
        if torch.compiler.is_compiling():
            write_or_add_in_graph(gradient.main_grad, gradient.begun, grad)
        else:
            gradient.add(partial(write_or_add, grad))
        return None, None


def stored(weight: Tensor, gradient: Gradient | None) -> Tensor:
    """A weight for an operation whose autograd returns its gradient: this hands it to the store."""
    return weight if gradient is None else _Stored.apply(weight, gradient)  # type: ignore[no-untyped-call]


# ---- the layer -------------------------------------------------------------------------------------------------------


Overlap = Literal["off", "bulk", "chunks"]


class Division:
    """How the matrix of a linear layer is divided over a group, and what it is computed with: made with the layer.

    column: by its rows, [out/t, in]; x [s, b, in], or [s/t, b, in] under sequence parallelism -> [s, b, out/t].
    row: by its columns, [out, in/t]; x [s, b, in/t] -> [s, b, out], or [s/t, b, out] under sequence parallelism.

    Args:
        overlap: how collectives run beside products: "off", each is waited for at once; "bulk", whole ones beside a
            product that does not need them, which backward has; "chunks", under sequence parallelism, in chunks beside
            those that do need them too (not for operands in 8 bits, nor in a graph).
    """

    def __init__(
        self, gradient: Gradient | None, products: Products, kind: Literal["column", "row"], group: Group,
        sequence_parallel: bool = False, overlap: Overlap = "bulk",
    ) -> None:  # fmt: skip
        self.gradient, self.products, self.group = gradient, products, group
        column, divided = kind == "column", group.size > 1
        by_rows = divided and sequence_parallel
        self.gathers, self.scatters = column and by_rows, not column and by_rows
        self.sums_input_gradient = column and divided and not by_rows
        self.sums_output = not column and divided and not by_rows
        self.waits = overlap == "off"
        self.function = _linear_in_chunks if overlap == "chunks" and by_rows else _linear


def linear(x: Tensor, weight: Tensor, division: Division) -> Tensor:
    """A linear layer whose weight is divided over a group."""
    products = division.products if torch.is_grad_enabled() else division.products.evaluation
    if products.in_graph:
        return _Linear.apply(x, weight, division, products)  # type: ignore[no-any-return, no-untyped-call]
    return division.function(x, weight, division, products)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """y = x W^T with the collectives of tensor parallelism, which backward hides behind the matrix products.

    ::

                               forward                 backward
        column                 fprop                   dgrad, all-reduce of dx beside wgrad
        column, rows divided   all-gather x, fprop     dgrad beside all-gather of x, reduce-scatter of dx beside wgrad
        row                    fprop, all-reduce       dgrad, wgrad
        row, rows divided      fprop, reduce-scatter   all-gather dy, dgrad, wgrad

    Of divided rows only the rank's own are kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, division: Division, products: Products) -> Tensor:
        ctx.weight, ctx.division, ctx.products = weight, division, products
        full: Any = all_gather_rows(x, division.group) if division.gathers else x
        kept: tuple[Tensor, ...] = (x,)
        if (operands := products.operands) is not None:
            (full, kept), weight = operands.input(full), operands.weight(weight, division.gradient)
        ctx.save_for_backward(*((x,) if division.gathers else kept))
        y = products.fprop(full, weight)
        if division.scatters:
            y, summed = reduce_scatter_rows_async(y, division.group)
            summed.wait()
        elif division.sums_output:
            all_reduce(y, division.group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        division, products, kept, weight = ctx.division, ctx.products, ctx.saved_tensors, ctx.weight
        summed = None
        if division.gathers:
            full, gathered = all_gather_rows(kept[0], division.group, async_op=True)  # launch
            if division.waits:
                gathered.wait()
        grad_y = all_gather_rows(grads[0], division.group) if division.scatters else grads[0]
        if (operands := products.operands) is not None:
            grad_y, weight = operands.gradient(grad_y), operands.weight(weight, division.gradient)
        grad_x: Any = products.dgrad(grad_y, weight) if ctx.needs_input_grad[0] else None
        if division.gathers:
            gathered.wait()
            grad_x, summed = reduce_scatter_rows_async(grad_x, division.group)  # launch
            kept = (full,) if operands is None else operands.input(full)[1]
        elif division.sums_input_gradient and grad_x is not None:
            summed = all_reduce(grad_x, division.group, async_op=True)  # launch
        if summed is not None and division.waits:
            summed.wait()
        grad_weight = products.give_wgrad(ctx.weight, division.gradient, grad_y, kept)
        if summed is not None:
            summed.wait()
        return grad_x, grad_weight, None, None


class _LinearInChunks(_Linear):
    """The same where rows are divided, with the three pairs "all-gather x, fprop", "fprop, reduce-scatter" and
    "all-gather dy, dgrad" in chunks beside each other too (``parallel/in_chunks.py``)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, division: Division, products: Products) -> Tensor:
        ctx.weight, ctx.division, ctx.products = weight, division, products
        ctx.save_for_backward(x)
        multiply, t = partial(_into, products.fprop, weight), division.group.size
        y = empty((len(x) * (t if division.gathers else 1), *x.shape[1:-1], len(weight)), x)
        if division.scatters:
            return multiply_scattered(multiply, x, y, division.group)
        multiply_gathered(multiply, x, y, division.group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        division, products, weight = ctx.division, ctx.products, ctx.weight
        if division.gathers:
            return _Linear.backward(ctx, *grads)  # type: ignore[no-any-return]
        grad_x = empty((len(grads[0]) * division.group.size, *grads[0].shape[1:-1], weight.shape[1]), grads[0])
        grad_y = multiply_gathered(partial(_into, products.dgrad, weight), grads[0], grad_x, division.group)
        return grad_x, products.give_wgrad(weight, division.gradient, grad_y, ctx.saved_tensors), None, None


_linear, _linear_in_chunks = direct(_Linear), direct(_LinearInChunks)


def _into(product: Callable[..., Tensor], weight: Tensor, rows: Tensor, out: Tensor) -> None:
    product(rows, weight, out)


# ---- in the graph of a compiled layer: operations that the compiler calls and does not look into --------------------


@torch.library.custom_op("megatron_hammer::add_wgrad", mutates_args={"place"})
def add_wgrad_in_graph(place: Tensor, begun: Tensor, grad_y: Tensor, x: Tensor) -> None:
    """``add_wgrad``; begun: bool scalar on the host."""
    add_wgrad(grad_y, x, place, bool(begun))


@torch.library.custom_op("megatron_hammer::write_or_add", mutates_args={"place"})
def write_or_add_in_graph(place: Tensor, begun: Tensor, values: Tensor) -> None:
    """``write_or_add``; begun: bool scalar on the host."""
    write_or_add(values, place, bool(begun))


add_wgrad_in_graph.register_fake(lambda place, begun, grad_y, x: None)
write_or_add_in_graph.register_fake(lambda place, begun, values: None)
