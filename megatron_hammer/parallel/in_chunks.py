"""Overlaps the all-gather and reduce-scatter of linear layers with their matrix products, chunk by chunk.

For sequence parallelism (``parallel.tp_comm_overlap=chunks``). Otherwise a product waits until all rows are gathered,
and a sum waits until the whole product is there. Here rank r of t computes with the chunk that it has while the others
travel (Wang et al., "Overlap Communication with Dependent Computation via Decomposition", 2023)::

    multiply_gathered    product of r (own) | of r-1, which has arrived | of r-2 | ...
                         send r to r+1, ... ; receive r-1, r-2, ...
    multiply_scattered   product of r+1     | of r+2                    | ...    | of r (own), then the sum
                                              send r+1 to its rank, receive r-1's part of r's sum, ...

Every rank sends the others as many bytes as in the one collective, straight from one to the other, so t - 1 messages a
rank. The sum is made here, in the order of the ranks and in fp32 where the parts are of 16 bits: the same bits whatever
arrives first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hammer.parallel.collectives import start_swap
from megatron_hammer.parallel.context import Group

Product = Callable[[Tensor, Tensor], object]
"""Computes the second tensor, row by row, from the rows of the first."""


def multiply_gathered(product: Product, shard: Tensor, out: Tensor, group: Group) -> Tensor:
    """Gather [r, ...] of each rank, and ``product`` of it into ``out`` [r t, ...]: what was gathered, [r t, ...]."""
    rows, t = len(shard), group.size
    full = shard.new_empty((rows * t, *shard.shape[1:]))
    chunks, results = full.split(rows), out.split(rows)
    chunks[group.rank].copy_(shard)
    arriving = {
        source: start_swap(chunks[group.rank], (group.rank + i) % t, chunks[source], source, group)
        for i in range(1, t)
        for source in ((group.rank - i) % t,)
    }
    product(chunks[group.rank], results[group.rank])
    for source, handle in arriving.items():
        handle.wait()
        product(chunks[source], results[source])
    return full


def multiply_scattered(product: Product, full: Tensor, like: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of ``product`` of [r t, ...], of which this rank gets its r rows.

    Args:
        like: an empty tensor shaped and placed as what the product of all rows would be.
    """
    t, rank = group.size, group.rank
    rows = len(full) // t
    chunks, parts = full.split(rows), like.view(t, rows, *like.shape[1:])
    sent = torch.empty_like(parts[1:])
    handles = []
    for i in range(1, t):
        target, source = (rank + i) % t, (rank - i) % t
        product(chunks[target], sent[i - 1])
        handles.append(start_swap(sent[i - 1], target, parts[source], source, group))
    product(chunks[rank], parts[rank])
    for handle in handles:
        handle.wait()
    return parts.sum(0)
