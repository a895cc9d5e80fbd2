"""Memory for large results on a CPU that the same result of the next micro-batch fits into.

torch asks glibc for blocks that begin at a multiple of 64 bytes. To be sure of one, glibc looks for a hole that is
larger by the alignment, so the hole that a tensor leaves is always a little too small for the next tensor of its size,
and the heap grows: by 140 MB beside the 250 that a micro-batch keeps, at h 512, f 1408, 8 layers and 2,048 tokens in
bf16 (glibc 2.36). A request without an alignment takes a hole of exactly its size; here the beginning is moved to such
a multiple inside of it.

With the first such tensor the process stops to hand freed memory back to the system (``Memory`` in csrc/cpu): the next
micro-batch would pay for every page of it, 14 % of a step at that size in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from megatron_hammer.kernels.native import cpu

ALIGNMENT = 64  # bytes: torch's own, a cache line and the widest vector
LARGE_BYTES = 2**18  # smaller ones leave small holes, and 5 us a call would be felt


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A new contiguous tensor of any contents, with the dtype and device of ``like``; not a view, without gradient."""
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < LARGE_BYTES or cpu.COMPILED is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    memory = torch.frombuffer(cpu.COMPILED.Memory(size + ALIGNMENT), dtype=torch.uint8)
    offset = -memory.data_ptr() % ALIGNMENT // like.element_size()  # malloc's blocks begin at a multiple of 16
    new = torch.empty(0, dtype=like.dtype)
    return new.set_(memory.untyped_storage(), offset, tuple(shape))  # type: ignore[call-overload, no-any-return]
