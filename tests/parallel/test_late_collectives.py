"""Collectives that do nothing before somebody waits for them, as one may on a GPU that has other work on its streams.

gloo's are over soon after they were begun. So a result that is read before it is there, an input that is changed too
early, or memory that is given up, would show on a GPU only. Here each begun collective runs when it is waited for, on
what its tensors hold then; steps are the same bits as without, or something did not wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.config import Config
from megatron_hammer.parallel import collectives
from megatron_hammer.parallel.context import Group
from tests.distributed import run_distributed
from tests.model.tiny import tiny_config, train


class _Late:
    def __init__(self, begin: Callable[[], Any]) -> None:
        self.begin: Callable[[], Any] | None = begin

    def wait(self) -> None:
        begin, self.begin = self.begin, None
        if begin is not None:
            begin().wait()


def _start(group: Group, name: bytes, collective: Callable[..., Any], *tensors: Tensor, **more: Any) -> Any:
    return _Late(lambda: collective(*tensors, group=group.handle, async_op=True, **more))


def _trained(rank: int, config: Config, late: bool) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr(collectives, "_start", _start)
        return train(rank, config, 2)


@pytest.mark.parametrize(
    "changes",
    [
        dict(train__precision="bf16"),
        dict(parallel__shard="weights", train__recompute="full"),
        dict(parallel__shard="gradients", optimizer__style="muon"),
        dict(  # whose backward gathers as without chunks
            parallel__tensor_model_parallel_size=2,
            parallel__sequence_parallel=True,
            parallel__tp_comm_overlap="chunks",
        ),
    ],
    ids=str,
)
def test_everything_is_waited_for(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    for (numbers, weights), (late_numbers, late) in zip(
        *(run_distributed(2, _trained, config, late) for late in (False, True)), strict=True
    ):
        assert numbers == late_numbers
        assert all(torch.equal(weights[name].nan_to_num(7), late[name].nan_to_num(7)) for name in weights)
