"""Products in chunks beside what brings or takes the rows: what is computed, and in which order things begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.parallel import in_chunks
from megatron_hammer.parallel.context import Group
from megatron_hammer.parallel.in_chunks import multiply_gathered, multiply_scattered
from tests.model.tiny import tiny_config

RANK, RANKS, ROWS = 1, 3, 2
SHARDS = torch.arange(RANKS * ROWS * 4, dtype=torch.float64).view(RANKS, ROWS, 4)


class Rows:
    """Plays the other ranks of a group: what they send arrives when it is waited for."""

    def __init__(self, comes: Callable[[int], Tensor]) -> None:
        self.comes, self.events = comes, list[tuple[str, int]]()
        self.sent: dict[int, Tensor] = {}

    def start(self, sent: Tensor, target: int, received: Tensor, source: int, group: Group) -> Any:
        self.events.append(("send", target))
        self.sent[target] = sent.clone()

        def wait() -> None:
            self.events.append(("wait", source))
            received.copy_(self.comes(source))

        received.fill_(torch.nan)
        return mock.Mock(wait=wait)

    def product(self, rows: Tensor, out: Tensor) -> None:
        self.events.append(("product", int(rows[0, 0]) // (4 * ROWS)))
        out.copy_(rows * 2)


def test_rows_of_other_ranks_are_computed_with_as_they_arrive() -> None:
    rows, out = Rows(lambda source: SHARDS[source]), torch.empty(RANKS * ROWS, 4, dtype=torch.float64)
    with mock.patch.object(in_chunks, "start_swap", rows.start):
        full = multiply_gathered(rows.product, SHARDS[RANK], out, Group(RANK, RANKS))
    assert torch.equal(full, SHARDS.flatten(0, 1)) and torch.equal(out, 2 * full)
    assert all(torch.equal(sent, SHARDS[RANK]) for sent in rows.sent.values()) and set(rows.sent) == {0, 2}
    assert rows.events == [
        ("send", 2), ("send", 0), ("product", 1), ("wait", 0), ("product", 0), ("wait", 2), ("product", 2)
    ]  # fmt: skip


def test_parts_of_other_ranks_sums_leave_as_they_are_computed() -> None:
    """Rank r adds r to all that it computes, so that it is seen whose sum a part belongs to."""
    full = SHARDS.flatten(0, 1)
    rows = Rows(lambda source: 2 * SHARDS[RANK] + source)
    with mock.patch.object(in_chunks, "start_swap", rows.start):
        total = multiply_scattered(rows.product, full, torch.empty_like(full), Group(RANK, RANKS))
    assert torch.equal(total, 3 * 2 * SHARDS[RANK] + 0 + 2)
    assert all(torch.equal(sent, 2 * SHARDS[target]) for target, sent in rows.sent.items())
    assert rows.events == [
        ("product", 2), ("send", 2), ("product", 0), ("send", 0), ("product", 1), ("wait", 0), ("wait", 2)
    ]  # fmt: skip


@pytest.mark.parametrize("setting", [{}, dict(kernels__layers="te"), dict(kernels__compile="layers")])
def test_where_chunks_cannot_be_they_are_refused_by_name(setting: dict[str, Any]) -> None:
    layout = dict(parallel__tensor_model_parallel_size=2, parallel__tp_comm_overlap="chunks", train__device="cuda")
    sequence = dict(parallel__sequence_parallel=True) if setting else {}
    with pytest.raises(ConfigError, match=r"parallel\.tp_comm_overlap=chunks"):
        tiny_config(**layout, **sequence, **setting).validate(2)
