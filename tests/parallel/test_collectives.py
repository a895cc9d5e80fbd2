"""What a rank notes of its messages where the rank at their other end has died."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_hammer.parallel import collectives
from megatron_hammer.parallel.context import Group

X = torch.zeros(4)
RESET = RuntimeError("Connection closed by peer")  # gloo's, from the start of a message


@pytest.mark.parametrize(
    "start",
    [
        lambda group: collectives.start_send(X, group),
        lambda group: collectives.start_receive(X, group),
        lambda group: collectives.start_swap(X, 1, X, 1, group),
        lambda group: collectives.reduce_scatter_into(X[:2], X, group, room=torch.zeros(2)),
    ],
    ids=["send", "receive", "swap", "sum of parts"],
)
def test_a_message_that_cannot_start_is_no_fault_of_this_rank(start: Callable[[Group], Any]) -> None:
    """The launcher looks for the cause among the ranks that did not fail in a collective (``supervise/watch.py``)."""
    group = Group(0, 2, handle=object())
    fails = {name: mock.Mock(side_effect=RESET) for name in ("isend", "irecv", "batch_isend_irecv")}
    sizes = {"get_world_size.return_value": 2, "get_rank.return_value": 0}
    with mock.patch.object(collectives, "dist", mock.Mock(**fails, **sizes)), pytest.raises(RuntimeError, match="peer"):
        start(group)
    assert group.status.is_waiting and group.status.collectives == 1
