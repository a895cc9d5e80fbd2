"""Output head and cross-entropy in one: the logits of the whole micro-batch never exist.

The vocabulary is divided over the tensor-parallel ranks, the tokens are taken a chunk at a time::

    x [s/t or s, b, h] --gather rows--> [s b, h] --for each chunk of n rows-->  logits [n, v/t] = x W^T
                                                                    one all-gather of [3, n] statistics
        loss [n]                                    <-----------------------  logits become their gradient, in place
        dx [n, h] = gradient W                      <-----------------------
        dW [v/t, h] += gradient^T x, in fp32        <-----------------------
    dx [s/t or s, b, h] <--sum over the ranks, scatter rows (hidden behind the last chunk's dW)

So forward computes the gradient too, and backward hands it out; that takes knowing beforehand by what each token's loss
will be multiplied (``Objective``). Without an objective nothing is kept but the inputs, and a backward runs the same
pass again, with the weights that arrive: a product more, but any function of the losses can be differentiated.
Evaluation runs the forward half only. The size of a chunk does not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.kernels.argument_types import Columns
from megatron_hammer.kernels.linear import Division, Gradient, Products, once_differentiable
from megatron_hammer.kernels.linear_cross_entropy import combine_statistics
from megatron_hammer.kernels.native.cpu import empty
from megatron_hammer.model.layers import LayerOptions
from megatron_hammer.parallel.collectives import all_gather_rows, all_reduce, reduce_scatter_rows_async


@dataclass(frozen=True)
class Objective:
    """What training minimises: the sum over tokens of weight x (loss + z_loss x lse^2).

    Backward must start from ``(losses * weight).sum()``. What z_loss adds shows in the gradient only.
    """

    weight: Tensor
    """fp32 on the device: a scalar, or [b, s] with 0 for tokens that do not count."""
    z_loss: float = 0.0
    """Keeps lse, the log of the sum of exponentials, near 0 (arXiv 2204.02311)."""


class HeadAndLoss:
    """Output head and cross-entropy of a stage, made with it: what is the same in every micro-batch is given here.

    Args:
        weight: [v/t, h], padding rows included: the parameter itself.
        vocab_size: v, without the padding.
        gradient: where the weight's gradient is summed; None: autograd brings it to the weight.
        shared: the weight is the embedding too, which adds to the gradient later, when backward reaches it.
    """

    def __init__(
        self,
        weight: Tensor,
        vocab_size: int,
        options: LayerOptions,
        gradient: Gradient | None = None,
        shared: bool = False,
    ) -> None:
        self.weight, self.gradient, self.options, self.shared = weight, gradient, options, shared
        products = options.operations.head_products
        self._division = Division(gradient, products, "column", options.tp, options.sequence_parallel)
        self._columns = Columns.of(options.tp.rank, weight.shape[0], vocab_size)

    def __call__(self, x: Tensor, labels: Tensor, objective: Objective | None = None) -> Tensor:
        """Loss of each token, the same on all tensor-parallel ranks. Communicates over ``options.tp``.

        Args:
            x: [s/t or s, b, h] after the final norm.
            labels: [b, s] int64 of any shape [b', s'] with as many tokens in the same order as x's [b, s].

        Returns:
            shaped as ``labels``, fp32 (fp64 for fp64 weights).
        """
        batch, weights = x.shape[1], None
        rows = labels.reshape(batch, -1).t().flatten()  # [s b], as the model's rows
        if objective is not None and torch.is_grad_enabled():
            weights = objective.weight.expand_as(labels).reshape(batch, -1).t().flatten()
        products, z_loss = self._division.products, objective.z_loss if objective else 0.0
        products = products if torch.is_grad_enabled() else products.evaluation
        differentiable = self.weight if self.gradient is None else self.weight.detach()
        losses: Tensor = _HeadLoss.apply(x, differentiable, rows, weights, self, products, z_loss)  # type: ignore[no-untyped-call]
        return losses.view(-1, batch).t().reshape(labels.shape)

    def losses(self, x: Tensor, labels: Tensor, products: Products) -> Tensor:
        """Loss of each row, [s b], and no gradient."""
        rows, losses = self._rows_and_losses(x)
        for c, _, logits in self._chunks(rows, products, self._operand(products)):
            losses[c] = self._chunk_losses(logits, labels[c])
        return losses

    def losses_and_gradients(
        self, x: Tensor, labels: Tensor, weights: Tensor, products: Products, z_loss: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Loss of each row [s b], gradient of x, and that of the weight unless ``gradient`` has taken it."""
        division, (rows, losses) = self._division, self._rows_and_losses(x)
        grad_rows, weights = empty(rows.shape, rows), weights.to(losses.dtype)

        def write(place: Tensor, begun: bool) -> Tensor:
            """All of the losses and, of the gradients, the weight's into ``place``; returns that of x."""
            grad_x, operand = grad_rows.view(-1, *x.shape[1:]), self._operand(products)
            summed: Any = None
            for c, kept, logits in self._chunks(rows, products, operand):
                losses[c] = self._chunk_losses(logits, labels[c], weights[c], z_loss)
                grad_logits = logits if products.operands is None else products.operands.gradient(logits)
                products.dgrad(grad_logits, operand, out=grad_rows[c])
                if c.stop >= len(rows) and division.gathers:  # launch: the weight's gradient hides it
                    grad_x, summed = reduce_scatter_rows_async(grad_x, division.group)
                elif c.stop >= len(rows) and division.sums_input_gradient:
                    summed = all_reduce(grad_x, division.group, async_op=True)
                products.wgrad(grad_logits, kept, place, begun)
                begun = True
            if summed is not None:
                summed.wait()
            return grad_x

        if self.gradient is not None:
            return losses, self.gradient.add(write, last=not self.shared), None
        # In fp32 only where something is added: one product rounds once by itself.
        dtype = losses.dtype if len(rows) > self.options.operations.loss.chunk_tokens else self.weight.dtype
        place = torch.empty_like(self.weight, dtype=dtype)
        return losses, write(place, False), place.to(self.weight.dtype)

    def _rows_and_losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[s/t or s, b, h] -> [s b, h], and a place for the loss of each row."""
        rows = (all_gather_rows(x, self._division.group) if self._division.gathers else x).flatten(0, 1)
        return rows, torch.empty(len(rows), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)

    def _operand(self, products: Products) -> Any:
        """The weight, as the products take it."""
        return self.weight if products.operands is None else products.operands.weight(self.weight, self.gradient)

    def _chunks(
        self, rows: Tensor, products: Products, weight: Any
    ) -> Iterator[tuple[slice, tuple[Tensor, ...], Tensor]]:
        """Each chunk's place, what its products keep of it, and its logits [n, v/t], which the next one overwrites."""
        size = min(self.options.operations.loss.chunk_tokens, len(rows))
        buffer = empty((size, self.weight.shape[0]), rows)
        for start in range(0, len(rows), size):
            c = slice(start, min(start + size, len(rows)))
            chunk, kept = (rows[c], (rows[c],)) if products.operands is None else products.operands.input(rows[c])
            yield c, kept, products.fprop(chunk, weight, out=buffer[: c.stop - c.start])

    def _chunk_losses(
        self, logits: Tensor, labels: Tensor, weights: Tensor | None = None, z_loss: float = 0.0
    ) -> Tensor:
        """Loss of a chunk's rows; with weights the logits become their gradient."""
        tp, kernel, columns = self.options.tp, self.options.operations.loss, self._columns
        if weights is not None and tp.size == 1:
            return kernel.loss_and_gradient_(logits, labels, columns, weights, z_loss)
        parts = all_gather_rows(kernel.row_statistics(logits, labels, columns).unsqueeze(0), tp)  # [t, 3, n]
        lse, loss = combine_statistics(parts)
        if weights is not None:
            kernel.softmax_gradient_(logits, labels, columns, lse, loss, weights, z_loss)
        return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None,
        head: HeadAndLoss, products: Products, z_loss: float,
    ) -> Tensor:  # fmt: skip
        ctx.head, ctx.settings, ctx.early = head, (products, z_loss), weights is not None
        if weights is None:
            ctx.save_for_backward(x, weight, labels)
            return head.losses(x, labels, products)
        losses, *gradients = head.losses_and_gradients(x, labels, weights, products, z_loss)
        ctx.save_for_backward(weights, *gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.early:
            weights, grad_x, grad_weight = ctx.saved_tensors
            wrong = "backward must start from (losses * objective.weight).sum(): the gradient is that of this sum"
            # Private, the same in torch 2.11 to 2.15; waits for no device.
            torch._assert_async((grads[0] == weights).all(), wrong)
        else:
            x, _, labels = ctx.saved_tensors
            _, grad_x, grad_weight = ctx.head.losses_and_gradients(x, labels, grads[0], *ctx.settings)
        return grad_x, grad_weight, None, None, None, None, None
