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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hammer.kernels.arguments import Columns
from megatron_hammer.kernels.linear import Products
from megatron_hammer.kernels.linear_cross_entropy import combine_statistics
from megatron_hammer.kernels.native.cpu import empty
from megatron_hammer.model.layers import LayerOptions
from megatron_hammer.parallel.collectives import Done, all_gather_rows, all_reduce, reduce_scatter_rows_async


@dataclass(frozen=True)
class Objective:
    """What training minimises: the sum over tokens of weight x (loss + z_loss x lse^2).

    Backward must start from ``(losses * weight).sum()``. What z_loss adds shows in the gradient only.
    """

    weight: Tensor
    """fp32 on the device: a scalar, or [b, s] with 0 for tokens that do not count."""
    z_loss: float = 0.0
    """Keeps lse, the log of the sum of exponentials, near 0 (arXiv 2204.02311)."""


def head_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    options: LayerOptions,
    objective: Objective | None = None,
    shared: bool = False,
) -> Tensor:
    """Loss of each token, the same on all tensor-parallel ranks. Communicates over ``options.tp``.

    Args:
        x: [s/t or s, b, h] after the final norm. weight: [v/t, h], padding rows included.
        labels: [b, s] int64 of any shape [b', s'] with as many tokens in the same order as x's [b, s].
        shared: the weight is the embedding too, so that autograd brings it a gradient besides this one.

    Returns:
        shaped as ``labels``, fp32 (fp64 for fp64 weights).
    """
    batch = x.shape[1]
    rows = labels.reshape(batch, -1).t().flatten()  # [s b], as the model's rows
    parameter, weights, place, arrived = weight, None, None, None
    if objective is not None and torch.is_grad_enabled():
        weights = objective.weight.expand_as(labels).reshape(batch, -1).t().flatten()
        if (keeper := getattr(weight, "gradients", None)) is not None:
            place = keeper.place(weight)
            arrived = None if shared else lambda: keeper.arrived(parameter)
            weight = weight.detach()  # autograd has nothing to bring it
    products, z_loss = options.operations.head_products.now(), objective.z_loss if objective else 0.0
    job = _Job(vocab_size, options, products, parameter, z_loss, place, arrived)
    losses = _HeadLoss.apply(x, weight, rows, weights, job)
    return losses.view(-1, batch).t().reshape(labels.shape)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Job:
    vocab_size: int
    options: LayerOptions
    products: Products
    parameter: Tensor
    """The weight itself; what autograd is given may be another object."""
    z_loss: float
    place: tuple[Tensor, bool] | None
    arrived: Callable[[], None] | None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, job: _Job) -> Tensor:
        ctx.job, ctx.early = job, weights is not None
        if weights is None:
            ctx.save_for_backward(x, weight, labels)
            return _losses(x, labels, job)
        losses, *gradients = _losses_and_gradients(x, weight, labels, weights, job)
        ctx.save_for_backward(weights, *gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        job: _Job = ctx.job
        if ctx.early:
            weights, grad_x, grad_weight = ctx.saved_tensors
            wrong = "backward must start from (losses * objective.weight).sum(): the gradient is that of this sum"
            torch._assert_async((grads[0] == weights).all(), wrong)  # waits for no device
        else:
            x, weight, labels = ctx.saved_tensors
            _, grad_x, grad_weight = _losses_and_gradients(x, weight, labels, grads[0], job)
        if job.arrived is not None:
            job.arrived()
        return grad_x, grad_weight, None, None, None


def _losses(x: Tensor, labels: Tensor, job: _Job) -> Tensor:
    """Loss of each row, [s b], and no gradient."""
    rows = _all_rows(x, job.options)
    losses = _empty_losses(rows)
    for c, _, logits in _chunks(rows, job.products.weight(job.parameter), job):
        losses[c] = _chunk_losses(logits, labels[c], None, job)
    return losses


def _losses_and_gradients(
    x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, job: _Job
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss of each row [s b], gradient of x, and that of the weight unless it has its own place."""
    rows = _all_rows(x, job.options)
    losses, grad_rows = _empty_losses(rows), empty(rows.shape, rows)
    weights = weights.to(losses.dtype)
    # In fp32 only where something is added: one product rounds once by itself.
    dtype = losses.dtype if len(rows) > job.options.operations.loss.chunk_tokens else weight.dtype
    place, add = job.place or (torch.empty_like(weight, dtype=dtype), False)
    grad_x, summed = grad_rows, Done()
    products, operand = job.products, job.products.weight(job.parameter)
    for c, kept, logits in _chunks(rows, operand, job):
        losses[c] = _chunk_losses(logits, labels[c], weights[c], job)
        gradient = products.gradient(logits)
        products.input_gradient(gradient, operand, out=grad_rows[c])
        if c.stop >= len(rows):  # launch: the weight's gradient hides it
            grad_x, summed = _sum_over_ranks(grad_rows.view(-1, *x.shape[1:]), job.options)
        products.add_weight_gradient(place, gradient, kept, add)
        add = True
    summed.wait()
    return losses, grad_x, None if job.place else place.to(weight.dtype)


def _all_rows(x: Tensor, options: LayerOptions) -> Tensor:
    """[s/t or s, b, h] -> [s b, h]."""
    return (all_gather_rows(x, options.tp) if options.sequence_parallel else x).flatten(0, 1)


def _empty_losses(rows: Tensor) -> Tensor:
    return torch.empty(len(rows), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)


def _chunks(rows: Tensor, weight: Any, job: _Job) -> Iterator[tuple[slice, tuple[Tensor, ...], Tensor]]:
    """Each chunk's place, what its products keep of it, and its logits [n, v/t], which the next chunk overwrites."""
    products, size = job.products, min(job.options.operations.loss.chunk_tokens, len(rows))
    buffer = empty((size, job.parameter.shape[0]), rows)
    for start in range(0, len(rows), size):
        c = slice(start, min(start + size, len(rows)))
        chunk = products.input(rows[c])
        yield c, products.kept(chunk), products.forward(chunk, weight, out=buffer[: c.stop - c.start])


def _chunk_losses(logits: Tensor, labels: Tensor, weights: Tensor | None, job: _Job) -> Tensor:
    """Loss of a chunk's rows; with weights the logits become their gradient."""
    tp, kernel = job.options.tp, job.options.operations.loss
    columns = Columns.of(tp.rank, logits.shape[1], job.vocab_size)
    if weights is not None and tp.size == 1:
        return kernel.loss_and_gradient_(logits, labels, columns, weights, job.z_loss)
    parts = all_gather_rows(kernel.row_statistics(logits, labels, columns).unsqueeze(0), tp)  # [t, 3, n]
    lse, loss = combine_statistics(parts)
    if weights is not None:
        kernel.softmax_gradient_(logits, labels, columns, lse, loss, weights, job.z_loss)
    return loss


def _sum_over_ranks(grad: Tensor, options: LayerOptions) -> tuple[Tensor, Any]:
    """Start to sum the ranks' parts of dx: (result, handle)."""
    if options.sequence_parallel:
        return reduce_scatter_rows_async(grad, options.tp)
    return grad, all_reduce(grad, options.tp, async_op=True)
