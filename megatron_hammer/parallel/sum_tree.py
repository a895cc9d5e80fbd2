"""One fixed binary tree over the micro-batches of a global batch: sums whose bits do not depend on the number of ranks.

The leaves are the values (gradients, say) of the micro-batches, by their number in the global batch. Numbers that agree
in their lowest bits are added first::

    node(k, r) = node(k + 1, r) + node(k + 1, r + 2^k)        all leaves whose number is r modulo 2^k

    8 leaves    ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))

Data-parallel rank r of 2^k computes micro-batches r, r + 2^k, r + 2 x 2^k ... (``sampling/loader.py``), which is
node(k, r): a rank adds up its own subtree, and the ranks' subtrees are added pair by pair. So the same additions are
made in the same order for 1, 2, 4, 8 ranks. Where the number of leaves is no power of two, nodes that would be empty
are left out. The idea of a fixed tree is that of pairwise summation, whose error grows with the logarithm only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_hammer.parallel.collectives import all_gather_rows
from megatron_hammer.parallel.context import Group


@dataclass(frozen=True)
class Turn:
    """One leaf of a subtree in the order of computing, and what can be added once it is there."""

    leaf: int
    """Number of the micro-batch among this rank's."""
    additions: int
    """How many of the nodes that wait are added to it, the last one first."""


def turns(leaves: int) -> list[Turn]:
    """The order in which a rank computes its leaves, so that few nodes wait: at most log2 of them, rounded up."""
    order: list[Turn] = []

    def node(first: int, step: int, additions: int) -> None:
        """All leaves ``first``, first + step, ...; with the last of them come the additions of the nodes above."""
        if first + step >= leaves:
            order.append(Turn(first, additions))
        else:
            node(first, 2 * step, 0)
            node(first + step, 2 * step, additions + 1)

    node(0, 1, 0)
    return order


def most_waiting(leaves: int) -> int:
    """How many nodes wait at most: the partial sums that a rank keeps beside the one it writes."""
    waiting = most = 0
    for turn in turns(leaves):
        waiting += 1 - turn.additions
        most = max(most, waiting)
    return most - 1 if leaves == 1 else most


def fold(leaves: Tensor) -> Tensor:
    """The sum over dimension 0 by the tree: [n, ...] -> [...]. Leaves to fill up to a power of two are zeros."""
    n = 1 << max(0, len(leaves) - 1).bit_length()
    if n > len(leaves):
        leaves = torch.cat([leaves, leaves.new_zeros((n - len(leaves), *leaves.shape[1:]))])
    while len(leaves) > 1:
        half = len(leaves) // 2
        leaves = leaves[:half] + leaves[half:]
    return leaves[0]


def tree_sum(mine: Sequence[Tensor], group: Group) -> Tensor:
    """The sum of scalars by the tree; ``mine`` are those of this rank's micro-batches, in their order.

    Communicates over the group, whose ranks have as many each.
    """
    gathered = all_gather_rows(torch.stack(list(mine)), group)  # [size x accumulated], rank by rank
    return fold(gathered.view(group.size, -1).t().reshape(-1))


def sum_over_copies(part: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of a group, added in the order of the tree whatever the length of the message."""
    return fold(all_gather_rows(part.unsqueeze(0), group))
