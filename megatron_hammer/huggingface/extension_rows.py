"""The rows of an extended embedding or head, computed block by block from the old matrix and a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.huggingface.extension_plan import ExtensionPlan

BLOCK_BYTES = 4 * 2**20  # of new rows in fp32 made at a time: three or four such blocks are alive at once


def mean_row(old: Tensor, ids: np.ndarray) -> Tensor:
    """Mean of the rows ``ids`` of ``old: [v, h]``, summed in fp64 (there may be 100,000), in ``old``'s type."""
    total = torch.zeros(old.shape[1], dtype=torch.float64)
    for part in np.array_split(ids, max(1, len(ids) * old.shape[1] * 8 // BLOCK_BYTES)):
        total += old[torch.from_numpy(part)].double().sum(0)
    return (total / len(ids)).to(old.dtype)


def grown_rows(old: Tensor, plan: ExtensionPlan, start: int, stop: int, mean: Tensor) -> Tensor:
    """Rows ``start : stop`` of the new matrix, ``[stop - start, h]`` in ``old``'s type.

    Args:
        old: ``[v, h]``, any of our types.
        mean: ``[h]``, for ids without sources.
    """
    offsets, counts = torch.from_numpy(plan.offsets[start:stop]), torch.from_numpy(np.diff(plan.offsets)[start:stop])
    sources = torch.from_numpy(plan.sources)
    rows = torch.empty((stop - start, old.shape[1]), dtype=old.dtype)
    rows[counts == 0] = mean
    one = counts == 1
    rows[one] = old[sources[offsets[one]]]  # not by way of fp32: every bit stays, a NaN's too
    many = torch.nonzero(counts > 1).view(-1)
    if len(many):
        total = torch.zeros((len(many), old.shape[1]), dtype=torch.float32)
        for position in range(int(counts.max())):  # in the order of the ids, so that the sum is one and the same
            having = torch.nonzero(counts[many] > position).view(-1)
            total[having] += old[sources[offsets[many[having]] + position]].float()
        rows[many] = total.div_(counts[many, None]).to(old.dtype)
    return rows


class GrownMatrix:
    """One new matrix, made block by block in order; the old one is in memory from the first block to the last."""

    def __init__(self, read: Callable[[], Tensor], plan: ExtensionPlan, hidden_size: int) -> None:
        self._read, self._plan = read, plan
        self._old: tuple[Tensor, Tensor] | None = None
        rows = max(1, BLOCK_BYTES // (4 * hidden_size))
        self.ranges = [(start, min(start + rows, plan.size)) for start in range(0, plan.size, rows)]

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows ``start : stop``, one of ``ranges``, in one tensor."""
        if self._old is None:
            old = self._read()
            self._old = old, mean_row(old, self._plan.old_ids)
        old, mean = self._old
        rows = grown_rows(old, self._plan, start, stop, mean)
        if stop == self._plan.size:
            self._old = None
        yield rows
