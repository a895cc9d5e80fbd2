"""A GPU, as far as the choice of backends can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_hammer.kernels import attention, selection
from megatron_hammer.kernels.native import cuda, triton_rows

Pretend = Callable[[tuple[int, int]], None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """An H100 with cuDNN, without our CUDA kernels and Triton; calling the fixture sets another capability."""
    asked = (attention._varlen_unavailable, attention._cudnn_unavailable)

    def pretend(capability: tuple[int, int]) -> None:
        for question in asked:
            question.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(attention, "_torch_can_use_cudnn", lambda required: required.head_size <= 256)
    monkeypatch.setattr(cuda, "unavailable", lambda device: "_cuda.so was not built")
    monkeypatch.setattr(triton_rows, "_missing", lambda: "the package triton is not installed")
    monkeypatch.setattr(selection, "_be_deterministic", lambda: None)  # which would be for the whole process
    pretend((9, 0))
    yield pretend
    for question in asked:
        question.cache_clear()
