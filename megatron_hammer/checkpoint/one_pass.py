"""The hashes and sums by which a checkpoint knows its bytes again, made while they are copied: each is fetched once.

::

    memory, or a block of a file  --64 bytes at a time-->  core: XXH3-128, sum of a rectangle  -->  their new place

A core that copies waits for memory most of the time, and would wait as long again if it came back for the bytes to hash
them. So both are made of what the first cache has of a copy (``csrc/checkpoint/digest.cpp``). Without the compiled
part the library ``xxhash`` and NumPy do it, in pieces that the second cache still has.

A hash is of bytes in their order, of one slice as its file has them; a sum of the elements of a rectangle of a tensor,
whatever the order (``digest.py``). Needs neither torch nor, where nothing is added up, NumPy.
"""

from __future__ import annotations

from typing import Any, Protocol

import xxhash

from megatron_hammer.base.compiled import find_compiled

_SHORTEST = 241  # bytes that the compiled hash takes: those of fewer have a form of their own
_PIECE_BYTES = 2**18  # copied and then looked at where nothing is compiled: the core's second cache still has them
_native = find_compiled("megatron_hammer.checkpoint._digest", 2)
BACKEND = "NumPy" if _native is None else "C++"


class Elements(Protocol):
    """Which elements of a tensor the bytes are: ``digest.Factors``."""

    rows: Any
    """Factors, [rows] uint64."""
    cols: Any
    item_bytes: int

    def sum_of(self, piece: memoryview, start: int) -> int:
        """The sum over those from byte ``start`` on."""


class OnePass:
    """Takes the bytes of a slice, which come in flat buffers of any length, and hashes and adds up what it takes.

    Where neither is wanted, it copies.

    Args:
        size: how many bytes there will be, where their hash is wanted.
        elements: which they are, where their sum is wanted.
    """

    def __init__(self, size: int | None = None, elements: Elements | None = None) -> None:
        self._elements, self._total, self._at = elements, 0, 0  # of so many bytes
        by_library = size is not None and (_native is None or size < _SHORTEST)
        self._hasher = xxhash.xxh3_128() if by_library else None
        self._compiled: Any = None
        if _native is not None:
            factors = (None, None, 4) if elements is None else (elements.rows, elements.cols, elements.item_bytes)
            self._compiled = _native.OnePass(size is not None and not by_library, *factors)

    def take(self, source: Any, target: memoryview | None = None) -> None:
        """Take the next bytes, and copy them to ``target``, if given, which has as many."""
        if self._compiled is not None and self._hasher is None:
            if target is None:
                self._compiled.add(source)
            else:
                self._compiled.copy(target, source)
            return
        view = memoryview(source)
        for at in range(0, len(view), _PIECE_BYTES):
            piece = view[at : at + _PIECE_BYTES]
            if target is not None:
                target[at : at + len(piece)] = piece
            if self._hasher is not None:
                self._hasher.update(piece)
            if self._compiled is not None:
                self._compiled.add(piece)
            elif self._elements is not None:
                self._total = (self._total + self._elements.sum_of(piece, self._at)) % 2**64
                self._at += len(piece)

    @property
    def total(self) -> int:
        """The sum of what was taken."""
        return self._total if self._compiled is None else int(self._compiled.total)

    def hexdigest(self) -> str:
        """The XXH3-128 of what was taken."""
        return str(self._compiled.hexdigest()) if self._hasher is None else self._hasher.hexdigest()
