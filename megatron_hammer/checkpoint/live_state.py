"""Compares the digest (``digest.py``) of the state that the ranks hold in memory with that of a checkpoint.

Each rank adds up the rectangles that it owns, as it would write them, while the rest is still being loaded or else
before the first step; one sum over all ranks makes the tensors' sums, which are compared before the first step. On a
GPU the sums are taken there, 64 MB at a time. What other ranks hold copies of is compared by the drift check of the
first step (``train/drift.py``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint.digest import MODULUS, Factors, as_matrix, col_numbers, row_numbers, state_digest
from megatron_hammer.checkpoint.dtypes import DTYPE_NAMES
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.checkpoint.one_pass import OnePass
from megatron_hammer.checkpoint.write import owned_views
from megatron_hammer.parallel.collectives import all_reduce, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import Range
from megatron_hammer.parallel.sharding import Shard

ELEMENTS_AT_ONCE = 2**23  # of 8 bytes on a GPU
ELEMENTS_OF_A_THREAD = 2**22  # at a time on a CPU


class LiveSums:
    """Sums of what this rank holds of every tensor of a checkpoint.

    ::

        load:  | from the disk: tensor 1 | tensor 2              | tensor 3       |        | check: tensor 3
                                         | threads add up tensor 1 | tensor 2     |

    A tensor is added up where it will be used from, as soon as it is all there, while the disk fetches the next. If
    torch has changed the memory that it lies in since (it counts what is done in place), it is added up again at the
    check. What numpy or compiled code write in between is not seen; before the first step nothing of ours does.

    Args:
        shards: of this rank, as they are loaded.
    """

    def __init__(self, manifest: Manifest, shards: Sequence[Shard]) -> None:
        where = {(t.name, t.kind): at for at, t in enumerate(manifest.tensors)}
        self._count = len(where)
        self._views: dict[int, list[_Part]] = {}
        for owned, view in zip(*owned_views(shards), strict=True):
            if (owned.name, owned.kind) in where:
                self._views.setdefault(where[owned.name, owned.kind], []).append((owned.rows, owned.cols, view))
        self._begun: dict[int, tuple[list[int], list[Future[int]]]] = {}
        self._pool = ThreadPoolExecutor(torch.get_num_threads(), "live-sums")

    def begin(self, at: int) -> None:
        """Have a tensor added up that is all there, by its place in the manifest; on a GPU that waits for the check."""
        views = self._views.get(at, [])
        if all(view.device.type == "cpu" for _, _, view in views):
            parts = [part for whole in views for part in _parts(*whole)]
            self._begun[at] = _versions(views), [self._pool.submit(_sum_of, *part) for part in parts]

    def totals(self) -> list[int]:
        """This rank's part of every tensor's sum, as signed numbers of 64 bits; 0 where it has no part."""
        totals, parts = [0] * self._count, deque[tuple[int, _Part]]()
        for at, views in self._views.items():
            versions, futures = self._begun.get(at, ([], []))
            if versions == _versions(views):
                totals[at] = sum(future.result() for future in futures)
            else:
                parts.extend((at, part) for whole in views for part in _parts(*whole))

        def add_up() -> list[int]:
            sums = [0] * self._count
            while True:
                try:
                    at, part = parts.popleft()
                except IndexError:
                    return sums
                sums[at] += _sum_of(*part)

        # One core alone does not fill the memory's channels; and a further thread beside one for each would only share
        # a core with another. On a GPU each would take its own room and wait for the same stream.
        here = all(part[2].device.type == "cpu" for _, part in parts)
        others = [self._pool.submit(add_up) for _ in range(torch.get_num_threads() - 1 if here else 0)]
        shares = [totals, add_up(), *(other.result() for other in others)]
        self.close()
        totals = [sum(share) for share in zip(*shares, strict=True)]
        return [(total + MODULUS // 2) % MODULUS - MODULUS // 2 for total in totals]

    def close(self) -> None:
        """End the threads, also where nothing was loaded in the end."""
        self._pool.shutdown(cancel_futures=True)


_Part = tuple[Range, Range | None, Tensor]
"""Rows and columns of a rectangle, and its elements, flat."""


def _versions(views: Sequence[_Part]) -> list[int]:
    return [view._version for _, _, view in views]


def check_live_state(
    manifest: Manifest,
    shards: Sequence[Shard],
    step: int,
    state: Mapping[str, Any],
    ctx: ParallelContext,
    sums: LiveSums | None = None,
) -> str | None:
    """Compare what the ranks hold with what the checkpoint says was saved. Communicates over the world.

    Args:
        step, state: as the loop will go on from them, in the form of the manifest.
        sums: of the shards, which were begun while these were loaded.

    Returns:
        a line where they cannot be compared.

    Raises:
        CheckpointError: on all ranks; names the first tensor, or the value, that is not what was saved.
    """
    saved = manifest.state_digest
    if saved is None:
        return f"{manifest.folder} is of a version without a digest of the state: it is not compared after loading"
    converted = sum(t.dtype != _dtype_of(shards, t.kind) for t in manifest.tensors if t.kind in _kinds(shards))
    totals = (LiveSums(manifest, shards) if sums is None else sums).totals()
    reduced = torch.tensor([*totals, converted], dtype=torch.int64).to(ctx.device)
    all_reduce(reduced, ctx.world)
    *found, converted = (value % MODULUS for value in read_back(reduced, ctx.world))
    if converted:
        return f"{manifest.folder} holds tensors in another type than this run: the state is not compared after loading"
    remedy = "run the same command again; the same error again is one of this program or of a machine's memory"
    for tensor, value, expected in zip(manifest.tensors, found, saved.sums):
        if f"{value:016x}" != expected:
            rule = "was loaded, but is not what was saved (its bytes in the file are)"
            raise CheckpointError(17, f"{manifest.folder}: {tensor}", rule, remedy)
    if state_digest(manifest.tensors, found, step, state) != saved.digest:
        what = f"{manifest.folder}: step {step}, {dict(state)}"
        raise CheckpointError(17, what, "is not the state that was saved", remedy)
    return None


def _parts(rows: Range, cols: Range | None, view: Tensor) -> Iterator[_Part]:
    """A rectangle in bands of rows, so that all threads end at about the same time; a GPU has none to share it."""
    width = 1 if cols is None else cols[1] - cols[0]
    height = max(1, ELEMENTS_OF_A_THREAD // width) if view.device.type == "cpu" else rows[1] - rows[0]
    for first in range(rows[0], rows[1], height):
        last = min(first + height, rows[1])
        yield (first, last), cols, view[(first - rows[0]) * width : (last - rows[0]) * width]


def _sum_of(rows: Range, cols: Range | None, view: Tensor) -> int:
    if view.device.type == "cpu":
        through = OnePass(None, Factors(rows, cols, DTYPE_NAMES[view.dtype]))
        through.take(view.detach().view(torch.uint8).numpy())
        return through.total
    return int(sum_on_device(view, rows, cols).item())


@torch.no_grad()
def sum_on_device(view: Tensor, rows: Range, cols: Range | None) -> Tensor:
    """The same with torch alone, where the tensor is: int64 scalar."""
    lines, columns = as_matrix(rows, cols)
    row, col = (torch.from_numpy(n.view("int64")).to(view.device) for n in (row_numbers(lines), col_numbers(columns)))
    bits = view.detach().view(torch.int16 if view.element_size() == 2 else torch.int32).view(len(row), len(col))
    mask, total = 2 ** (8 * view.element_size()) - 1, torch.zeros((), dtype=torch.int64, device=view.device)
    height, width = max(1, ELEMENTS_AT_ONCE // len(col)), min(len(col), ELEMENTS_AT_ONCE)
    for top in range(0, len(row), height):
        for left in range(0, len(col), width):
            part = (bits[top : top + height, left : left + width].long() & mask) * col[left : left + width]
            total += (part.sum(1) * row[top : top + height]).sum()
    return total


def _kinds(shards: Sequence[Shard]) -> set[str]:
    return {kind for shard in shards for kind in shard.tensors}


def _dtype_of(shards: Sequence[Shard], kind: str) -> str | None:
    return next((DTYPE_NAMES[s.tensors[kind].dtype] for s in shards if kind in s.tensors), None)
