"""Attention within documents as one operation of a compiled layer (``kernels.compile=layers``).

How many documents a micro-batch has and how long they are is another matter every time, and a graph is made for shapes
and host numbers that stay. So the graph sees documents as tensors of one shape, and attention as an operation that it
calls and does not look into. Any backend can be that operation::

    forward     out = attention(q, k, v)                      keeps q, k, v
    backward    attention again, with its record; then that record's backward

which costs one forward pass of attention more than it does outside of a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_hammer.kernels.attention import AttentionFunction
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.table import Backend


class GraphPackedSequences(NamedTuple):
    """``PackedSequences`` in tensors whose shapes depend on the size of the micro-batch alone."""

    lengths: Tensor
    """[b s] int64 on the host: rows of each document, then zeros."""
    cu_seqlens: Tensor
    """[b s + 1] int32 on the device, the last value repeated."""
    positions: Tensor
    """[b s] int64 on the device."""

    @classmethod
    def of(cls, documents: PackedSequences) -> GraphPackedSequences:
        """Without waiting for the device."""
        rows, count = len(documents.positions), len(documents.lengths)
        lengths = torch.zeros(rows, dtype=torch.int64)
        lengths[:count] = torch.tensor(documents.lengths)
        cu_seqlens = torch.cat((documents.cu_seqlens, documents.cu_seqlens[-1:].expand(rows - count)))
        return cls(lengths, cu_seqlens, documents.positions)

    def documents(self) -> PackedSequences:
        """The inverse of ``of``."""
        count = int(self.lengths.count_nonzero())
        return PackedSequences(tuple(self.lengths[:count].tolist()), self.cu_seqlens[: count + 1], self.positions)


def in_graph(row: Backend, device: torch.device) -> AttentionFunction:
    """A backend's attention for layers that are compiled; as it is where documents are ``PackedSequences``."""
    plain, operation = row.load(device), _operation(row, device)

    def attention(q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Tensor:
        if isinstance(documents, GraphPackedSequences):
            return operation(q, k, v, *documents)
        return plain(q, k, v, documents)

    return attention


@cache
def _operation(row: Backend, device: torch.device) -> Callable[..., Tensor]:
    """Operations of torch are known by name in a process, so each is made once."""
    plain, name = row.load(device), f"megatron_hammer::{row.name.replace('-', '_')}_attention_{device.type}"

    @torch.library.custom_op(name, mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = plain(q, k, v, GraphPackedSequences(lengths, cu_seqlens, positions).documents())
        return out.contiguous()

    @torch.library.custom_op(f"{name}_backward", mutates_args=())
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, cu_seqlens: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # An operation runs below autograd; leaving "inference mode" is how torch lets it come back.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = plain(*inputs, GraphPackedSequences(lengths, cu_seqlens, positions).documents())
            grad_q, grad_k, grad_v = torch.autograd.grad(out, inputs, grad)
        return grad_q.contiguous(), grad_k.contiguous(), grad_v.contiguous()

    @forward.register_fake
    def _(q: Tensor, *others: Tensor) -> Tensor:
        return q.new_empty(q.shape)

    @backward.register_fake
    def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(grad, *ctx.saved_tensors), None, None, None

    forward.register_autograd(gradient, setup_context=keep)
    return forward
