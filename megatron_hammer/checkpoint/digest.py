"""A digest of the whole state of a run that does not depend on which rank holds what, nor on files.

::

    sum of a tensor = sum over its elements (r, c) of  bits(r, c) * row(r) * col(c)   modulo 2^64
    state digest    = XXH3-128 of the sums of all tensors, by name, and of the values that stand in the manifest's state

``bits`` is an element as an unsigned integer of 16 or 32 bits; ``row`` and ``col`` are fixed odd pseudo-random numbers
(SplitMix64's output). A vector is one row. The order of the sum is of no importance, so each rank
adds up what it owns, whatever the layout cuts, and the parts are added: no element is moved for it. A change of one
element is always seen, one of several with all but a chance of 2^-32 at most (2^-64 mostly). It guards against
mistakes and faults, not against a forger: for that keep the SHA-256 of ``tools/inspect_checkpoint.py digest``.

The sums are taken of the bytes that go to the file at a save, and of the live objects where a run goes on, once they
are loaded (``live_state.py``); ``one_pass.py`` adds them up. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_hammer.base.files import canonical_json, hash_bytes
from megatron_hammer.checkpoint.manifest import (
    LogicalTensor,
    StateDigest,
)
from megatron_hammer.checkpoint.tensor_files import ITEM_BYTES
from megatron_hammer.parallel.placement import Range

STATE_VALUES = ("consumed_samples", "samples_digest", "optimizer")  # of the manifest's state, beside the step
MODULUS = 2**64
_COLS_FROM = 2**40  # in the sequence of odd numbers: rows are counted from 0, columns from here


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


def as_matrix(rows: Range, cols: Range | None) -> tuple[Range, Range]:
    """Rows and columns of a rectangle; a vector (no columns) is part of one row."""
    return (rows, cols) if cols is not None else ((0, 1), rows)


class Factors:
    """The factors of a rectangle of a tensor.

    Args:
        cols: None of a vector.
    """

    def __init__(self, rows: Range, cols: Range | None, dtype: str) -> None:
        lines, columns = as_matrix(rows, cols)
        self.rows, self.cols, self.item_bytes = row_numbers(lines), col_numbers(columns), ITEM_BYTES[dtype]

    def sum_of(self, piece: Any, start: int) -> int:
        """The sum over the elements from byte ``start`` of the rectangle on; the twin of what is compiled."""
        bits: npt.NDArray[Any] = np.frombuffer(piece, np.uint16 if self.item_bytes == 2 else np.uint32)
        start //= self.item_bytes
        width, total, at = len(self.cols), np.uint64(0), 0
        with np.errstate(over="ignore"):
            while at < len(bits):
                row, col = divmod(start + at, width)
                whole = (len(bits) - at) // width if col == 0 else 0
                if whole:
                    part = bits[at : at + whole * width].reshape(whole, width).astype(np.uint64)
                    part *= self.cols
                    total += (part.sum(axis=1) * self.rows[row : row + whole]).sum()
                    at += whole * width
                else:  # the rest of a row, or its beginning
                    length = min(width - col, len(bits) - at)
                    part = bits[at : at + length].astype(np.uint64) * self.cols[col : col + length]
                    total += part.sum() * self.rows[row]
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
    """The digest as a manifest keeps it."""
    return StateDigest(state_digest(tensors, sums, step, state), tuple(f"{s:016x}" for s in sums))
