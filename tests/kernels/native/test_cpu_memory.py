"""Memory of large results: laid out as torch's own, and found again by the next micro-batch."""

from __future__ import annotations

import ctypes

import pytest
import torch

from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.native.cpu import ALIGNMENT, LARGE_BYTES, empty

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(LARGE_BYTES // 2 + 1,), (3, 1, 70_001), (511, 257, 2), (5,), (0, 7)])
def test_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = empty(shape, torch.zeros(1, dtype=dtype, requires_grad=True))
    own = torch.empty(shape, dtype=dtype)
    assert (x.shape, x.dtype, x.stride(), x.device) == (own.shape, own.dtype, own.stride(), own.device)
    assert x.data_ptr() % ALIGNMENT == 0 and not x.requires_grad and not x._is_view()
    assert torch.equal(x.fill_(3), own.fill_(3))


def test_meta_tensors_have_no_memory() -> None:
    assert empty((2**40,), torch.empty(0, device="meta")).is_meta


def test_memory_outlives_the_call_and_no_longer() -> None:
    tensors = [empty((LARGE_BYTES,), torch.empty(0, dtype=torch.uint8)).fill_(i) for i in range(8)]
    views = [x[100:200] for x in tensors]
    del tensors
    assert [int(v.sum()) for v in views] == [100 * i for i in range(8)]


class _MallInfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "a", "b", "c", "mapped", "d", "e", "f", "g", "h")]


def test_a_second_micro_batch_takes_the_holes_of_the_first() -> None:
    """What stays is pinned by small blocks in between, as Python's objects are in a step; 3 MB: below glibc's limit for
    blocks of their own once a larger one was freed."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2") or cpu.unavailable(torch.device("cpu")):
        pytest.skip("without glibc 2.33 or our compiled kernels memory is torch's")
    libc.mallinfo2.restype = _MallInfo
    like, size = torch.empty(0, dtype=torch.uint8), 3 * 2**20
    empty((30 * 2**20,), like)  # glibc keeps blocks up to this size in the heap from now on

    def heap() -> int:
        info = libc.mallinfo2()
        return int(info.arena + info.mapped)

    def micro_batch() -> list[torch.Tensor]:
        blocks = []
        for _ in range(30):
            blocks.append(empty((size,), like))
            pins.append(torch.empty(4096, dtype=torch.uint8))
        return blocks

    pins: list[torch.Tensor] = []
    del micro_batch()[:]
    before = heap()
    for _ in range(3):
        del micro_batch()[:]
    assert heap() - before < 2 * size
