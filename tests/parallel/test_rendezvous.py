"""How a rank joins torch's process group; what needs several processes is in tests/supervise/test_start.py."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.rendezvous import start_process_group


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="needs Linux")
@pytest.mark.parametrize("allowed", [True, False])
def test_threads_of_gloo_take_no_core_by_waking(allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is that of the thread that starts gloo, whose threads inherit it; a sandbox may forbid it."""
    seen: list[int] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append(os.sched_getscheduler(0)))
    if not allowed:

        def refuse(*_: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "sched_setscheduler", refuse)
    before = os.sched_getscheduler(0)
    arguments: Any = (None, 0, 2, torch.device("cpu"), 30, StatusSlot())
    thread = threading.Thread(target=start_process_group, args=arguments)  # so that this one stays as it is
    thread.start()
    thread.join()
    assert seen == [os.SCHED_BATCH if allowed else before] and os.sched_getscheduler(0) == before
