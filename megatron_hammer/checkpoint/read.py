"""Loading: any layout from any layout, because both sides speak of rectangles of logical tensors.

For each rectangle that a rank wants, the saved slices that intersect it are found in the manifest; each is read once,
its hash is compared, and the common part is copied. Files are opened one after the other and read in order.
``LogicalReader`` goes the other way, tensor by tensor in bands of rows, for an export that holds no whole tensor.

Memory: the rank's own state plus at most one saved slice; none where a slice fits its place (same layout, CPU), since
then it is read right there. Loading is strict: what is missing, of another shape or damaged ends it with file and
tensor named, and what is wanted must have been filled to the last element. Vocabulary padding belongs to no logical
tensor and is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint.digest import Factors
from megatron_hammer.checkpoint.dtypes import DTYPES
from megatron_hammer.checkpoint.fit import check_fits
from megatron_hammer.checkpoint.manifest import Manifest, SavedFile, SavedSlice
from megatron_hammer.checkpoint.one_pass import OnePass
from megatron_hammer.checkpoint.tensor_files import CHUNK_BYTES, ITEM_BYTES, TensorFileReader
from megatron_hammer.config import ModelConfig
from megatron_hammer.model.llama import Stage
from megatron_hammer.model.parameters import Parameter
from megatron_hammer.parallel.agreement import all_or_none
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import Range
from megatron_hammer.parallel.sharding import Shard, intersect, rectangles

MAX_OPEN_FILES = 16  # at a time for one export: more than the columns of a tensor are ever cut into on one machine


@dataclass(frozen=True)
class _Place:
    """Where a rectangle of a logical tensor is wanted: data is a [rows, cols] (or [rows]) view."""

    rows: Range
    cols: Range | None
    data: Tensor

    def common(self, saved: SavedSlice) -> tuple[Range, Range | None] | None:
        """Rows and columns that this place and a saved slice share."""
        rows = intersect(self.rows, saved.rows)
        if rows is None or self.cols is None or saved.cols is None:
            return None if rows is None else (rows, None)
        cols = intersect(self.cols, saved.cols)
        return None if cols is None else (rows, cols)


def _window(data: Tensor, origin: _Place | SavedSlice, rows: Range, cols: Range | None) -> Tensor:
    """The part of ``data``, which starts at ``origin``'s corner, that holds these logical rows and columns."""
    view = data[rows[0] - origin.rows[0] : rows[1] - origin.rows[0]]
    if cols is None or origin.cols is None:
        return view
    return view[:, cols[0] - origin.cols[0] : cols[1] - origin.cols[0]]


def load_shards(
    manifest: Manifest,
    shards: Sequence[Shard],
    *,
    model: ModelConfig,
    kinds: Collection[str],
    ctx: ParallelContext,
    filled: Callable[[int], None] = lambda at: None,
) -> None:
    """Fill the shards' tensors of these kinds, converting to their types. Called by all ranks of the world.

    Args:
        filled: called with a tensor's position in the manifest when this rank's part of it is all there, and nothing
            else is written to the memory that it lies in: where all that the rank wants is read right to its place.

    Raises:
        HammerError: on all ranks, when the checkpoint does not fit the model or one of them could not read its part.
    """
    with all_or_none(ctx, f"reading {manifest.folder}"):
        check_fits(manifest, model, kinds)
        wanted: dict[int, list[_Place]] = {}
        for shard in shards:
            for kind in (kind for kind in kinds if kind in shard.tensors):
                for part in shard.parameter.slices:
                    for box in rectangles(part, shard.start, shard.stop):
                        flat = shard.tensors[kind].detach()
                        view = flat[box.position : box.position + box.numel].view(box.shape)
                        place = _Place(box.rows, box.cols, view)
                        wanted.setdefault(_find(manifest, part.tensor, kind), []).append(place)
        _fill(manifest, wanted, filled)


def load_model(
    model: Stage,
    table: Sequence[Parameter],
    manifest: Manifest,
    ctx: ParallelContext,
    round_to: torch.dtype | None = None,
) -> None:
    """Fill a model's weights, without any optimizer. Communicates over the world.

    Args:
        table: of this rank; names and shapes as in the model.
        round_to: pass each weight through this type, as an export does, whatever type the model has.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    shards = [Shard(p, 0, p.numel, {"weight": weights[p.name].view(-1)}) for p in table]
    load_shards(manifest, shards, model=model.config, kinds=("weight",), ctx=ctx)
    if round_to is not None:
        for weight in weights.values():
            weight.copy_(weight.to(round_to))


def read_logical(manifest: Manifest, name: str, kind: str = "weight") -> Tensor:
    """One whole logical tensor, in the type in which it is stored.

    Memory: the tensor, and one of its slices where these are cut by columns.
    """
    at = _find(manifest, name, kind)
    tensor = manifest.tensors[at]
    data = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    cols = (0, tensor.shape[1]) if len(tensor.shape) == 2 else None
    _fill(manifest, {at: [_Place((0, tensor.shape[0]), cols, data)]})
    return data


class LogicalReader(AbstractContextManager["LogicalReader"]):
    """Whole logical tensors of a checkpoint as bands of rows, one after the other; a context manager.

    Memory: one band and one part of a slice (4 MiB each, or one row), and 8 MiB for each open file.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._places, self._readers = manifest.places, dict[str, TensorFileReader]()

    def bands(self, name: str, kind: str = "weight") -> Iterator[Tensor]:
        """The tensor's rows in order, ``[n, cols]`` (``[n]`` of a vector) in the type in which it is stored.

        A band is gone when the next is asked for. A slice can be verified only when its last row was read: what was
        given may be published only after the iteration has ended.

        Raises:
            CheckpointError: there is no such tensor, or a slice or file of it is not as it was saved.
        """
        places = self._places.get((name, kind))
        if places is None:
            raise _missing(self._manifest, name, kind)
        tensor = self._manifest.tensors[places[0][1].tensor]
        (rows, *cols), dtype = tensor.shape, DTYPES[tensor.dtype]
        height = min(rows, max(1, CHUNK_BYTES // (dtype.itemsize * math.prod(cols))))
        whole, scratch = (torch.empty((height, *cols), dtype=dtype) for _ in range(2))
        passes = [(*place, OnePass(math.prod(place[1].shape) * dtype.itemsize)) for place in places]
        for start in range(0, rows, height):
            band = whole[: rows - start]
            for file, saved, key, through in passes:
                first, last = max(start, saved.rows[0]), min(start + height, saved.rows[1])
                if first >= last:
                    continue
                target = band[first - start : last - start]
                target = target if saved.cols is None else target[:, saved.cols[0] : saved.cols[1]]
                data = target if target.is_contiguous() else scratch.view(-1)[: target.numel()].view(target.shape)
                reader = self._reader(file)
                reader.expect(key, tensor.dtype, saved.shape)
                view: Any = data.view(-1).view(torch.uint8).numpy()
                reader.read_part(key, (first - saved.rows[0]) * (view.nbytes // len(data)), view, through)
                if data is not target:
                    target.copy_(data)
                if last == saved.rows[1]:
                    _compare(reader, key, saved, through.hexdigest())
            yield band

    def _reader(self, file: SavedFile) -> TensorFileReader:
        """The open file; the least recently used is closed where there would be too many."""
        reader = self._readers.pop(file.name, None)
        if reader is None:
            if len(self._readers) == MAX_OPEN_FILES:
                self._readers.pop(next(iter(self._readers))).close()
            reader = TensorFileReader(self._manifest.folder / file.name, file.size, file.header_hash)
        self._readers[file.name] = reader
        return reader

    def __exit__(self, *rest: object) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()


def check_rank_file(
    manifest: Manifest, file: SavedFile, advance: Callable[[int], None] = lambda count: None
) -> list[tuple[int, int]]:
    """Compare every slice in one rank's file with its hash, keeping nothing.

    Args:
        advance: called with the bytes of each part that was read.

    Returns:
        of each slice, its tensor's position in the manifest, and its part of that tensor's sum (``digest.py``).

    Raises:
        CheckpointError: names the file, and the first tensor, that is not as it was saved.
    """
    parts = []
    with _open(manifest, file) as reader:
        for saved in file.slices:
            key, dtype = manifest.key_of(saved), manifest.tensors[saved.tensor].dtype
            reader.expect(key, dtype, saved.shape)
            through = OnePass(math.prod(saved.shape) * ITEM_BYTES[dtype], Factors(saved.rows, saved.cols, dtype))
            _compare(reader, key, saved, reader.hash_of(key, through, advance))
            parts.append((saved.tensor, through.total))
    return parts


def _fill(manifest: Manifest, wanted: dict[int, list[_Place]], filled: Callable[[int], None] = lambda at: None) -> None:
    """Read what is wanted, all of it: a place that no slice has filled would be a weight that nothing has given."""
    left = {at: sum(place.data.numel() for place in places) for at, places in wanted.items()}
    todo = []  # of each file that has something: what is wanted of which slice, and where it can be read right to
    for file in manifest.files:
        hits = [(s, [p for p in wanted.get(s.tensor, ()) if p.common(s)]) for s in file.slices if s.tensor in wanted]
        if found := [(saved, places, _own_place(manifest, saved, places)) for saved, places in hits if places]:
            todo.append((file, found))
    in_place = all(own is not None for _, found in todo for *_, own in found)
    for file, found in todo:
        with _open(manifest, file) as reader:
            for saved, places, own in found:
                left[saved.tensor] -= _read(manifest, reader, saved, places, own)
                if in_place and left[saved.tensor] == 0:
                    filled(saved.tensor)
    for at, elements in left.items():
        if elements:
            tensor = manifest.tensors[at]
            what, rule = f"{manifest.folder}: {tensor}", f"lacks {elements} elements that this rank needs"
            raise CheckpointError(13, what, rule, "use another checkpoint")


def _read(
    manifest: Manifest, reader: TensorFileReader, saved: SavedSlice, places: list[_Place], target: Tensor | None
) -> int:
    """Read one slice, verify it, and copy what each place wants of it; how many elements that were.

    Args:
        target: the only place that wants it, which it is read right to.
    """
    key, dtype = manifest.key_of(saved), manifest.tensors[saved.tensor].dtype
    reader.expect(key, dtype, saved.shape)
    data = torch.empty(saved.shape, dtype=DTYPES[dtype]) if target is None else target
    _compare(reader, key, saved, reader.read_into(key, data.view(-1).view(torch.uint8).numpy()))
    if target is not None:
        return target.numel()
    filled = 0
    for place in places:
        rows, cols = place.common(saved)  # type: ignore[misc]
        window = _window(place.data, place, rows, cols)
        window.copy_(_window(data, saved, rows, cols))
        filled += window.numel()
    return filled


def _own_place(manifest: Manifest, saved: SavedSlice, places: Sequence[_Place]) -> Tensor | None:
    """Where a slice can be read right to: the only place that wants it has it in one piece, in its type, on the CPU."""
    first = places[0]
    target = _window(first.data, first, *first.common(saved))  # type: ignore[misc]
    fits = len(places) == 1 and target.shape == saved.shape and target.is_contiguous()
    fits = fits and target.dtype == DTYPES[manifest.tensors[saved.tensor].dtype] and target.device.type == "cpu"
    return target if fits else None


def _open(manifest: Manifest, file: SavedFile) -> TensorFileReader:
    return TensorFileReader(manifest.folder / file.name, file.size, file.header_hash)


def _find(manifest: Manifest, name: str, kind: str) -> int:
    """Position of a tensor in the manifest."""
    at = manifest.index.get((name, kind))
    if at is None:
        raise _missing(manifest, name, kind)
    return at


def _missing(manifest: Manifest, name: str, kind: str) -> CheckpointError:
    return CheckpointError(13, f"{manifest.folder}: {kind} {name}", "is missing", "use another checkpoint")


def _compare(reader: TensorFileReader, key: str, saved: SavedSlice, found: str) -> None:
    if found != saved.hash:
        remedy = "restore the file or use another checkpoint"
        raise CheckpointError(11, f"{reader.path}: {key}", "has changed since it was saved", remedy)
