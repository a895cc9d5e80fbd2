"""Compares the digest (``digest.py``) of the state that the ranks hold in memory with that of a checkpoint.

Each rank adds up the rectangles that it owns, as it would write them; one sum over all ranks makes the tensors' sums.
On a GPU the sums are taken there, 64 MB at a time. What other ranks hold copies of is compared by the drift check of
the first step (``train/drift.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint.digest import MODULUS, Factors, col_numbers, places, row_numbers, state_digest
from megatron_hammer.checkpoint.dtypes import DTYPE_NAMES
from megatron_hammer.checkpoint.manifest import Manifest
from megatron_hammer.checkpoint.one_pass import OnePass
from megatron_hammer.checkpoint.write import owned_views
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import Range
from megatron_hammer.parallel.sharding import Shard

ELEMENTS_AT_ONCE = 2**23  # of 8 bytes on a GPU
ELEMENTS_OF_A_THREAD = 2**22  # at a time on a CPU


def check_live_state(
    manifest: Manifest, shards: Sequence[Shard], step: int, state: Mapping[str, Any], ctx: ParallelContext
) -> str | None:
    """Compare what the ranks hold with what the checkpoint says was saved. Communicates over the world.

    Args:
        step, state: as the loop will go on from them, in the form of the manifest.

    Returns:
        a line where they cannot be compared.

    Raises:
        CheckpointError: on all ranks; names the first tensor, or the value, that is not what was saved.
    """
    saved = manifest.state_digest
    if saved is None:
        return f"{manifest.folder} is of a version without a digest of the state: it is not compared after loading"
    converted = sum(t.dtype != _dtype_of(shards, t.kind) for t in manifest.tensors if t.kind in _kinds(shards))
    where = {(t.name, t.kind): at for at, t in enumerate(manifest.tensors)}
    sums = torch.tensor([*live_sums(shards, where), converted], dtype=torch.int64).to(ctx.device)
    all_reduce(sums, ctx.world)
    *found, converted = (value % MODULUS for value in sums.tolist())
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


def live_sums(shards: Sequence[Shard], where: Mapping[tuple[str, str], int]) -> list[int]:
    """This rank's part of every tensor's sum, as signed numbers of 64 bits; of tensors that it has no part of, 0."""
    sums = [0] * len(where)
    parts = [
        (where[owned.name, owned.kind], *part)
        for owned, view in zip(*owned_views(shards), strict=True)
        if (owned.name, owned.kind) in where
        for part in _parts(owned.rows, owned.cols, view)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # one core alone does not fill the memory's channels
        for (at, *_), value in zip(parts, pool.map(lambda part: _sum_of(*part[1:]), parts)):
            sums[at] += value
    return [(value + MODULUS // 2) % MODULUS - MODULUS // 2 for value in sums]


def _parts(rows: Range, cols: Range | None, view: Tensor) -> Iterator[tuple[Range, Range | None, Tensor]]:
    """A rectangle in bands of rows, so that all threads end at about the same time; a GPU has none to share it."""
    width = 1 if cols is None else cols[1] - cols[0]
    height = max(1, ELEMENTS_OF_A_THREAD // width) if view.device.type == "cpu" else rows[1] - rows[0]
    for first in range(rows[0], rows[1], height):
        last = min(first + height, rows[1])
        yield (first, last), cols, view[(first - rows[0]) * width : (last - rows[0]) * width]


def _sum_of(rows: Range, cols: Range | None, view: Tensor) -> int:
    if view.device.type == "cpu":
        through = OnePass(None, Factors(rows, cols, DTYPE_NAMES[view.dtype]))
        through.add(view.detach().view(torch.uint8).numpy())
        return through.total
    return int(sum_on_device(view, rows, cols).item())


@torch.no_grad()
def sum_on_device(view: Tensor, rows: Range, cols: Range | None) -> Tensor:
    """The same with torch alone, where the tensor is: int64 scalar."""
    lines, columns = places(rows, cols)
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
