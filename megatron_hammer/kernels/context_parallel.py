"""Attention under context parallelism: a rank has the queries of some tokens, and the keys and values of all ranks.

As in Llama 3 (arXiv 2407.21783, section 3.3.2) keys and values are gathered from all ranks at once, not passed on in a
ring: under grouped-query attention they are small, and any mask is possible. A rank's tokens are a few *spans*,
runs of neighbouring tokens of one document (``parallel/sequence_split.py``)::

    q [b s/cp, 1, n, d] -------------------------------------------------------------------------> attention
    k, v [b s/cp, 1, g, d] -- all-gather, one message --> [b s, 1, 2g, d] -- rows of each span --> of a backend

Backward sums the gradients of keys and values in fp32, first where a key belongs to two spans of a rank, then over
the ranks with a reduce-scatter. ``PackedSequences.keys`` says which rows each span attends to. To the backend a
span looks like a document whose earlier queries are missing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hammer.kernels.attention import AttentionFunction
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.parallel.collectives import all_gather_rows, reduce_scatter_rows_async
from megatron_hammer.parallel.context import Group


def across_ranks(attention: AttentionFunction, group: Group) -> AttentionFunction:
    """``attention`` over the keys and values of all ranks of a context-parallel group. Communicates over it."""
    if group.size == 1:
        return attention

    def gathering(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None) -> Tensor:
        assert documents is not None and documents.keys is not None, "a batch of context-parallel ranks is a share"
        assert documents.keys.shards == group.size, f"a share of {documents.keys.shards} ranks, not {group.size}"
        k, v = _KeysOfAllRanks.apply(k, v, documents.keys.rows, group)  # type: ignore[no-untyped-call]
        return attention(q, k, v, documents)

    return gathering


class _KeysOfAllRanks(torch.autograd.Function):
    """k and v [b s/cp, 1, g, d] -> the keys and the values of this rank's spans, [keys, 1, g, d] each."""

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, rows: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows)
        ctx.group, ctx.tokens, ctx.groups = group, len(k), k.shape[2]
        gathered = all_gather_rows(torch.cat((k, v), dim=2), group)
        keys, values = gathered.index_select(0, rows).split(k.shape[2], dim=2)
        return keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), (grad_k, grad_v), group = ctx.saved_tensors, grads, ctx.group
        dtype = torch.promote_types(grad_k.dtype, torch.float32)
        # [b s, 1, 2g, d], in the order in which the ranks' rows are gathered
        total = grad_k.new_zeros((ctx.tokens * group.size, 1, 2 * ctx.groups, grad_k.shape[3]), dtype=dtype)
        for grad, place in zip((grad_k, grad_v), total.split(ctx.groups, dim=2), strict=True):
            place.index_add_(0, rows, grad.to(dtype))  # at most two numbers a place: their order changes no bit
        shard, handle = reduce_scatter_rows_async(total, group)
        handle.wait()
        return *shard.to(grad_k.dtype).split(ctx.groups, dim=2), None, None
