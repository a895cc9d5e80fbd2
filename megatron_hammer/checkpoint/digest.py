"""A digest of the whole state of a run that does not depend on which rank holds what, nor on files.

::

    sum of a tensor = sum over its elements (r, c) of  bits(r, c) * row(r) * col(c)   modulo 2^64
    state digest    = XXH3-128 of the sums of all tensors, by name, and of the values that stand in the manifest's state

``bits`` is an element as an unsigned integer of 16 or 32 bits; ``row`` and ``col`` are fixed odd pseudo-random numbers
(SplitMix64's output). A vector is one row. The order of the sum is of no importance, so each rank
adds up what it owns, whatever the layout cuts, and the parts are added: no element is moved for it. A change of one
element is always seen, one of several with all but a chance of 2^-32 at most (2^-64 mostly). It guards against
mistakes and faults, not against a forger: for that keep the SHA-256 of ``tools/inspect_checkpoint.py digest``.

The sums are taken of the bytes that go to the file at a save, and of the live objects right before the first step of a
run that goes on (``live_state.py``). C++ where it was built (``csrc/checkpoint``), else NumPy. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hammer.base.compiled import find_compiled
from megatron_hammer.base.files import hash_bytes
from megatron_hammer.checkpoint.manifest import (
    LogicalTensor,
    StateDigest,
    canonical_json,
)
from megatron_hammer.checkpoint.tensor_files import ITEM_BYTES
from megatron_hammer.parallel.placement import Range

STATE_VALUES = ("consumed_samples", "samples_digest", "optimizer")  # of the manifest's state, beside the step
MODULUS = 2**64
_COLS_FROM = 2**40  # in the sequence of odd numbers: rows are counted from 0, columns from here
_native = find_compiled("megatron_hammer.checkpoint._digest", 1)
BACKEND = "NumPy" if _native is None else "C++"


def odd_numbers(first: int, count: int) -> npt.NDArray[np.uint64]:
    """Numbers ``first`` and following of a sequence of odd 64-bit integers without a pattern; part of the format."""
    x = np.arange(first + 1, first + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)


@lru_cache(maxsize=64)
def row_numbers(rows: Range) -> npt.NDArray[np.uint64]:
    """The factors of these rows."""
    return odd_numbers(rows[0], rows[1] - rows[0])


@lru_cache(maxsize=64)
def col_numbers(cols: Range) -> npt.NDArray[np.uint64]:
    """The factors of these columns."""
    return odd_numbers(_COLS_FROM + cols[0], cols[1] - cols[0])


def places(rows: Range, cols: Range | None) -> tuple[Range, Range]:
    """Rows and columns of a rectangle; a vector (no columns) is part of one row."""
    return (rows, cols) if cols is not None else ((0, 1), rows)


class RectangleSum:
    """The sum over a rectangle of a tensor, whose bytes come row by row in buffers of any length."""

    def __init__(self, rows: Range, cols: Range | None, dtype: str) -> None:
        (first, last), columns = places(rows, cols)
        self.total = 0
        self._rows, self._cols = row_numbers((first, last)), col_numbers(columns)
        self._bits = np.uint16 if ITEM_BYTES[dtype] == 2 else np.uint32
        self._at = 0  # elements so far

    def add(self, buffer: Any) -> None:
        """Add the next elements."""
        bits = np.frombuffer(buffer, self._bits)
        add = _sum_numpy if _native is None else _native.rectangle_sum
        self.total = (self.total + int(add(bits, self._at, self._rows, self._cols))) % MODULUS
        self._at += len(bits)


def _sum_numpy(bits: npt.NDArray[Any], start: int, rows: npt.NDArray[np.uint64], cols: npt.NDArray[np.uint64]) -> int:
    """The sum over elements ``start`` and following of a rectangle with these factors: the reference for C++."""
    width, total, at = len(cols), np.uint64(0), 0
    with np.errstate(over="ignore"):
        while at < len(bits):
            row, col = divmod(start + at, width)
            whole = (len(bits) - at) // width if col == 0 else 0
            if whole:
                part = bits[at : at + whole * width].reshape(whole, width).astype(np.uint64)
                part *= cols
                total += (part.sum(axis=1) * rows[row : row + whole]).sum()
                at += whole * width
            else:  # the rest of a row, or its beginning
                length = min(width - col, len(bits) - at)
                part = bits[at : at + length].astype(np.uint64) * cols[col : col + length]
                total += part.sum() * rows[row]
                at += length
    return int(total)


def state_digest(tensors: Sequence[LogicalTensor], sums: Sequence[int], step: int, state: Mapping[str, Any]) -> str:
    """The digest of tensors with these sums, and of the values of the state."""
    named = sorted([t.name, t.kind, list(t.shape), t.dtype, f"{s:016x}"] for t, s in zip(tensors, sums, strict=True))
    values = {name: state[name] for name in STATE_VALUES if name in state}
    return hash_bytes(canonical_json({"tensors": named, "step": step, "state": values}))


def digest_of(
    tensors: Sequence[LogicalTensor], sums: Sequence[int], step: int, state: Mapping[str, Any]
) -> StateDigest:
    """What a manifest keeps."""
    return StateDigest(state_digest(tensors, sums, step, state), tuple(f"{s:016x}" for s in sums))
