"""Memory of large results: laid out as torch's own, and found again by the next micro-batch."""

from __future__ import annotations

import mmap
import os
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megatron_hammer.base.system import resident_bytes
from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.native.cpu import LARGE_BYTES, empty

ours = pytest.mark.skipif(
    bool(cpu.unavailable(torch.device("cpu"))) or "HAMMER_SANITIZED" in os.environ,
    reason="without our compiled kernels, or with a sanitizer, memory is malloc's",
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(LARGE_BYTES // 2 + 1,), (3, 1, 70_001), (511, 257, 2), (5,), (0, 7)])
def test_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = empty(shape, torch.zeros(1, dtype=dtype, requires_grad=True))
    own = torch.empty(shape, dtype=dtype)
    assert (x.shape, x.dtype, x.stride(), x.device) == (own.shape, own.dtype, own.stride(), own.device)
    assert x.data_ptr() % 64 == 0 and not x.requires_grad and not x._is_view()
    assert torch.equal(x.fill_(3), own.fill_(3))


def test_meta_tensors_have_no_memory() -> None:
    assert empty((2**40,), torch.empty(0, device="meta")).is_meta


def test_memory_outlives_the_call_and_no_longer() -> None:
    tensors = [empty((LARGE_BYTES,), torch.empty(0, dtype=torch.uint8)).fill_(i) for i in range(8)]
    views = [x[100:200] for x in tensors]
    del tensors
    assert [int(v.sum()) for v in views] == [100 * i for i in range(8)]


@ours
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_second_micro_batch_takes_the_holes_of_the_first() -> None:
    """Of any sizes, some of them beyond what malloc keeps (32 MiB), freed in another order, while one block stays."""
    like, sizes = torch.empty(0, dtype=torch.uint8), [3 * 2**20, LARGE_BYTES, 40 * 2**20, 2**20 + 1]

    def micro_batch() -> None:
        blocks = [empty((size,), like) for _ in range(4) for size in sizes]
        for i, block in enumerate(blocks):
            block.fill_(i)
        assert all(int(block[0]) == int(block[-1]) == i for i, block in enumerate(blocks))
        ends = sorted((block.data_ptr(), block.data_ptr() + block.nbytes) for block in blocks)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
        for i in (5, 0, 15, *range(14)):
            blocks[i] = like

    def mapped() -> int:
        """Bytes of this process, there or not."""
        return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE

    micro_batch()
    before = mapped()
    stays = empty((LARGE_BYTES,), like)
    for _ in range(3):
        micro_batch()
    assert mapped() - before < stays.nbytes + 2 * 2**21


@ours
def test_too_much_is_refused() -> None:
    with pytest.raises(MemoryError):
        empty((2**62,), torch.empty(0, dtype=torch.uint8))


@ours
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_holes_that_are_too_small_are_not_kept_in_memory() -> None:
    """Results that grow, where other memory lies in the way of each: one is alive at a time."""
    between, before = [], resident_bytes()
    for megabytes in range(200, 210):  # more than the holes of other tests
        empty((megabytes * 2**20,), torch.empty(0, dtype=torch.uint8))[: 8 * 2**20].fill_(1)
        between.append(mmap.mmap(-1, 256 * 2**20))  # untouched
    assert resident_bytes() - before < 30 * 2**20
