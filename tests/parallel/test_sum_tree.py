"""The fixed tree: a rank's subtree and the ranks' subtrees make the same additions for every number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_hammer.parallel.sum_tree import fold, most_waiting, turns


def subtree(leaves: list[Tensor]) -> Tensor:
    """What a rank's turns make of its leaves, adding as a store does."""
    waiting: list[Tensor] = []
    for turn in turns(len(leaves)):
        node = leaves[turn.leaf]
        for _ in range(turn.additions):
            node = node + waiting.pop()
        waiting.append(node)
    (whole,) = waiting
    return whole


@pytest.mark.parametrize("leaves", [1, 2, 4, 8, 16, 24, 40])
def test_every_number_of_ranks_makes_the_same_sum(leaves: int) -> None:
    values = torch.randn(leaves, 1000, generator=torch.Generator().manual_seed(leaves)) * 3**0.5
    sums = []
    for ranks in (1, 2, 4, 8):
        if leaves % ranks == 0:
            sums.append(fold(torch.stack([subtree(list(values[rank::ranks])) for rank in range(ranks)])))
    assert all(torch.equal(each, sums[0]) for each in sums)
    torch.testing.assert_close(sums[0], values.sum(0), rtol=1e-4, atol=1e-4)
    if leaves & (leaves - 1) == 0:
        assert torch.equal(fold(values), sums[0])


def test_few_nodes_wait() -> None:
    for leaves in range(1, 70):
        order = turns(leaves)
        assert sorted(turn.leaf for turn in order) == list(range(leaves))
        assert sum(turn.additions for turn in order) == leaves - 1
        assert most_waiting(leaves) <= (leaves - 1).bit_length()
    assert [most_waiting(2**i) for i in range(6)] == list(range(6))
