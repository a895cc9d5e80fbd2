"""The gradient of a weight, summed in fp32 where the optimizer keeps it: no copy of it in another place or dtype.

For y = x W^T the gradient of W is dy^T x, summed over the chunks of a micro-batch and the micro-batches of a step::

    place [out, in] fp32   <-   (0 or place) + dy^T [out, r] x [r, in]

A GPU's matrix product does this in one pass, adding to fp32 from 16-bit inputs (``addmm`` with ``out_dtype``, torch
2.8 and newer). A CPU's writes 16 bits, so there the product takes a block of rows at a time and is added in cache.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# Elements of one block of the product on a CPU: 2 MiB in 16 bits, added while in cache (measured: 5-30 % against one
# block).
BLOCK_ELEMENTS = 2**20


class WeightGradients(Protocol):
    """Who keeps the sums: an operation that computes a weight's gradient adds it there instead of returning it.

    A weight says who: ``weight.gradients``, set by the optimizer. A weight without it is autograd's business.
    """

    weights_version: int
    """Counts the updates of the weights: what was computed from one holds until the next."""

    def place(self, weight: Tensor) -> tuple[Tensor, bool]:
        """The fp32 sum, shaped as the weight, and whether it already holds something of this step.

        Asking for it is a promise to write it before the backward of this micro-batch ends.
        """
        ...

    def arrived(self, weight: Tensor) -> None:
        """Say that nothing more is added in this micro-batch; not for weights that autograd brings a gradient too."""
        ...

    def place_in_graph(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """``place`` for layers that torch.compile makes a graph of: tensors, so that they are inputs of the graph.

        The sum (with a version counter of its own: it is written while other layers hold theirs for backward) and, on
        the host, whether it has begun. The end of the graph's backward is taken for ``arrived``.
        """
        ...


def add_weight_gradient(place: Tensor, grad_y: Tensor, x: Tensor, add: bool) -> None:
    """place = dy^T x, or += with ``add``.

    Args:
        place: [out, in] fp32, or the dtype of the others.
        grad_y: [r, out]. x: [r, in], of one dtype.
    """
    transposed = grad_y.t()
    if place.dtype == x.dtype:
        torch.addmm(place, transposed, x, beta=int(add), out=place)
    elif place.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.addmm(place, transposed, x, beta=int(add), out_dtype=place.dtype, out=place)
    else:
        rows = max(1, BLOCK_ELEMENTS // x.shape[1])
        for i in range(0, place.shape[0], rows):
            _put(place[i : i + rows], torch.mm(transposed[i : i + rows], x), add)


@torch.library.custom_op("megatron_hammer::add_weight_gradient", mutates_args={"place"})
def add_weight_gradient_in_graph(place: Tensor, begun: Tensor, grad_y: Tensor, x: Tensor) -> None:
    """``add_weight_gradient`` as one operation, which a compiler calls and does not look into.

    Args:
        begun: bool scalar on the host.
    """
    add_weight_gradient(place, grad_y, x, bool(begun))


@torch.library.custom_op("megatron_hammer::sum_weight_gradient", mutates_args={"place"})
def sum_weight_gradient_in_graph(place: Tensor, begun: Tensor, product: Tensor) -> None:
    """place = product, or += where the sum has begun, likewise: for products that cannot add."""
    _put(place, product, bool(begun))


add_weight_gradient_in_graph.register_fake(lambda place, begun, grad_y, x: None)
sum_weight_gradient_in_graph.register_fake(lambda place, begun, product: None)


def _put(place: Tensor, product: Tensor, add: bool) -> None:
    """place = product, or += with ``add``: 16 bits to fp32 on a CPU in half of torch's time where our kernels are."""
    from megatron_hammer.kernels.native import cpu  # which imports the tables

    if not add:
        place.copy_(product)
    elif place.device.type == "cpu" and product.dtype == torch.bfloat16 and not cpu.unavailable(place.device):
        cpu.library().accumulate(place, product, True)
    else:
        place.add_(product)


def embedding_gradient(weight: Tensor, tokens: Tensor, grad: Tensor) -> Tensor | None:
    """The gradient of an embedding: each row of ``grad`` added to its token's; None where ``weight.gradients`` took it.

    In the sum only rows that were looked up are touched, where a gradient of the whole table would be written, read and
    added (2 x 32,000 x 512 in bf16 on 2 Xeon cores: 0.5 ms against 50). Deterministic: on a CPU the rows are added in
    order, on a GPU they are sorted first.

    Args:
        weight: [v, h]. tokens: [n] int64. grad: [n, h].
    """
    keeper: WeightGradients | None = getattr(weight, "gradients", None)
    if keeper is None:
        return torch.ops.aten.embedding_dense_backward(grad, tokens, len(weight), -1, False)  # type: ignore[no-any-return]
    place, add = keeper.place(weight)
    if not add:
        place.zero_()
    if place.is_cuda:
        place.index_put_((tokens,), grad.to(place.dtype), accumulate=True)
    else:
        place.index_add_(0, tokens, grad.to(place.dtype))
    keeper.arrived(weight)
    return None
