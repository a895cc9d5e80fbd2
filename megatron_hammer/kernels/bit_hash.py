"""A hash of the bits of a tensor, which is a sum: ranks that hold parts of a tensor add theirs up.

    hash = sum over elements i of  bits_i * w_i   modulo 2^64        bits_i: the element, an integer of 16 or 32 bits

The weight of a place is odd, so that no change of a single element goes unseen, and two that change together (or
change places) have a chance of 2^-32 at most to cancel. It is the product of two random numbers that every rank knows,
one for the place in a block of 16,384 elements and one for the block: neither a table of the tensor's length is needed
nor more than one pass. An element of 64 bits is two of 32. Integers wrap around alike everywhere, so the order of the
sum is of no importance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xxhash
from torch import Tensor

BLOCK = 2**14  # elements; part of the definition
# Blocks taken at once: on a CPU their integers stay in a core's cache, on a GPU they are enough to fill it (64 MB).
BLOCKS_AT_ONCE = {"cpu": 4, "cuda": 512}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of an element."""


class BitHash:
    """Hashes tensors on one device.

    Args:
        longest: elements of the longest tensor.
    """

    def __init__(self, device: torch.device, longest: int) -> None:
        self.of_place = _odd_numbers(0, BLOCK).to(device)
        self.of_block = _odd_numbers(BLOCK, 2 * longest // BLOCK + 1).to(device)
        self.at_once = BLOCKS_AT_ONCE[device.type]

    @torch.no_grad()
    def __call__(self, part: Tensor, first: int = 0) -> Tensor:
        """The hash of a contiguous part of a tensor, whose first element is number ``first`` of that: int64 scalar."""
        bits = part.detach().reshape(-1).view(INTEGERS[min(4, part.element_size())])
        first *= max(4, part.element_size()) // 4
        whole = torch.zeros((), dtype=torch.int64, device=bits.device)
        at = 0
        while at < len(bits):
            block, place = divmod(first + at, BLOCK)
            blocks = min(self.at_once, (len(bits) - at) // BLOCK) if place == 0 else 0
            if blocks:
                rows = bits[at : at + blocks * BLOCK].view(blocks, BLOCK)
                sums = (rows * self.of_place).sum(1)  # in 64 bits
                whole += (sums * self.of_block[block : block + blocks]).sum()
                at += blocks * BLOCK
            else:  # less than a block, at the beginning or at the end
                rest = bits[at : at + BLOCK - place]
                whole += (rest * self.of_place[place : place + len(rest)]).sum() * self.of_block[block]
                at += len(rest)
        return whole


def whole_hash(device: torch.device, longest: int) -> Callable[[Tensor], Tensor | int]:
    """Hashes whole tensors, to be compared with those of tensors of the same form on the same device only.

    On a CPU that is XXH3, 0.08 ns for a byte where ``BitHash`` takes 0.33 to 0.6 (one core of an EPYC with AVX-512).

    Args:
        longest: elements of the longest tensor.
    """
    return _xxh3 if device.type == "cpu" else BitHash(device, longest)


def _xxh3(tensor: Tensor) -> int:
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return xxhash.xxh3_64_intdigest(data) - 2**63  # as int64 has it


def _odd_numbers(start: int, count: int) -> Tensor:
    """Numbers ``start`` and following of a sequence of odd 64-bit integers without a pattern (SplitMix64's output)."""
    x = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((x ^ (x >> np.uint64(31))) | np.uint64(1)).view(np.int64))
