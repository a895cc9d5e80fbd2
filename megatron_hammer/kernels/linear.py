"""The three matrix products of a linear layer y = x W^T, as one object that a model is built with.

::

    forward           y  [.., out]   = x W^T
    input_gradient    dx [.., in]    = dy W
    weight_gradient   dW [out, in]  += dy^T x      in fp32, straight into the optimizer's buffer where there is one

x, W and dy first become operands, each once for the two products it takes part in: ``input``, ``weight``, ``gradient``.
Plain products take the tensors as they are, compute in their dtype, and are the reference; ``fp8.py`` has others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.kernels.native.cpu import empty
from megatron_hammer.kernels.weight_gradient import add_weight_gradient, add_weight_gradient_in_graph


class Products:
    """Products in the dtype of the tensors, accumulated in fp32 by the matrix library."""

    def now(self) -> Products:
        """Those to use at this moment: others may differ between training and evaluation."""
        return self

    # ---- operands ------------------------------------------------------------------------------------------------

    def input(self, x: Tensor) -> Any:
        """x [.., in] as an operand."""
        return x

    def kept(self, x: Any) -> tuple[Tensor, ...]:
        """What backward needs of an input."""
        return (x,)

    def weight(self, weight: Tensor) -> Any:
        """W [out, in] as an operand."""
        return weight

    def gradient(self, grad_y: Tensor) -> Any:
        """dy [.., out] as an operand."""
        return grad_y

    # ---- products ------------------------------------------------------------------------------------------------

    def forward(self, x: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        """y [.., out]; into ``out`` where it is given."""
        if torch.compiler.is_compiling():  # which finds the memory
            return F.linear(x, weight)
        y = empty((*x.shape[:-1], len(weight)), x) if out is None else out
        torch.mm(x.flatten(0, -2), weight.t(), out=y.flatten(0, -2))
        return y

    def input_gradient(self, grad: Any, weight: Any, out: Tensor | None = None) -> Tensor:
        """dx [.., in]; into ``out`` where it is given."""
        if torch.compiler.is_compiling():
            return torch.matmul(grad, weight)
        dx = empty((*grad.shape[:-1], weight.shape[1]), grad) if out is None else out
        torch.mm(grad.flatten(0, -2), weight, out=dx.flatten(0, -2))
        return dx

    def add_weight_gradient(self, place: Tensor, grad: Any, kept: tuple[Tensor, ...], add: bool) -> None:
        """place [out, in] = dy^T x, or += with ``add``."""
        add_weight_gradient(place, grad.flatten(0, -2), kept[0].flatten(0, -2), add)

    def add_in_graph(self, place: Tensor, begun: Tensor, grad: Any, kept: tuple[Tensor, ...]) -> None:
        """``add_weight_gradient`` where torch.compile makes a graph; begun: bool on the host."""
        add_weight_gradient_in_graph(place, begun, grad.flatten(0, -2), kept[0].flatten(0, -2))

    def weight_gradient(self, weight: Tensor, grad: Any, kept: tuple[Tensor, ...]) -> Tensor | None:
        """dW in the weight's dtype; None where ``weight.gradients`` has taken it.

        ``weight.gradients`` (a ``WeightGradients``) is set by whoever sums the gradients: the optimizer.
        """
        keeper = getattr(weight, "gradients", None)
        if keeper is None:
            grad_weight = torch.empty_like(weight)
            self.add_weight_gradient(grad_weight, grad, kept, False)
            return grad_weight
        if torch.compiler.is_compiling():
            place, begun = keeper.place_in_graph(weight)
            self.add_in_graph(place, begun, grad, kept)
            return None
        place, add = keeper.place(weight)
        self.add_weight_gradient(place, grad, kept, add)
        keeper.arrived(weight)
        return None
