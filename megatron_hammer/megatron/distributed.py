"""``torch_dist`` checkpoints of Megatron-LM: torch's distributed checkpoint format, read without any process group.

::

    iter_0000100/metadata.json     {"sharded_backend": "torch_dist", ...}
    iter_0000100/common.pt         args, iteration: what all ranks have in common; since 2026-07 an object of the next
    iter_0000100/.metadata         a pickle: shape and chunks of each tensor, and where in which file a chunk lies
    iter_0000100/__R_N.distcp      chunks, each a torch file of one tensor, and objects

Tensors are stored by global shape, whatever ranks wrote them; those of all layers are one tensor with the layers as its
first dimension, unless layers differ. Gate and up of all ranks lie behind each other in one tensor, or in two whose
names end in _w and _v. This module reads what torch's own reader reads (tests compare the two), with an unpickler that
runs no code from the file and with one tensor in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.reading import open_regular
from megatron_hammer.checkpoint.dtypes import DTYPES
from megatron_hammer.config.settings import MAX_LAYERS
from megatron_hammer.megatron.legacy import arguments_of, iteration_of
from megatron_hammer.megatron.metadata import Chunk, ChunkPlace, StoredTensor, check_whole, read_metadata
from megatron_hammer.megatron.pickles import reading
from megatron_hammer.megatron.torch_files import load_part, load_pt
from megatron_hammer.megatron.translation import EMBEDDING_THERE, LAYERS, full_name, split_name

FULLY_RESHARDABLE = "fully_reshardable"
_COMMON, _COMMON_STATE = "common.pt", "common_state/shard_0_1"
_MOST_COMMON_BYTES = 2**24  # some hundred arguments and the groups of the optimizer take some ten thousand
_ELEMENT_BYTES, _FRAME_BYTES = 16, 2**20  # more than any type has, and than torch writes around a tensor
_PREFIXES = ("", "model.", "model.module.", "model.module.module.")


class DistributedReader:
    """Reads the tensors of a ``torch_dist`` checkpoint, by global shape (``importing.MegatronCheckpoint``).

    Raises:
        CheckpointError: a file is missing or damaged, or is no such checkpoint.
    """

    kind = "torch_dist"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata = read_metadata(folder / ".metadata")
        self.common, where = self._read_common(metadata.objects.get(_COMMON_STATE))
        self.args = arguments_of(self.common, where)
        self.iteration = iteration_of(self.common)
        prefix = next((p for p in _PREFIXES if p + EMBEDDING_THERE in metadata.entries), None)
        if prefix is None:
            raise CheckpointError(34, f"{folder}: {EMBEDDING_THERE}", "is missing", "name a checkpoint of a GPT model")
        self._where = metadata.places
        self._all, self._prefix = metadata.entries, prefix
        self._tensors = self._below(prefix)
        self.optimizer = _optimizer_format(metadata.names)

    def _read_common(self, place: ChunkPlace | None) -> tuple[dict[str, Any], Path]:
        """What all ranks have in common, and the file it is from: ``common.pt``, or an object among the chunks."""
        file = self.folder / _COMMON
        if place is None or file.exists():
            found = load_pt(file)
        else:
            file = self.folder / place.file
            self._check_end(_COMMON_STATE, place)
            if place.length > _MOST_COMMON_BYTES:
                raise self._bad(_COMMON_STATE, f"has {place.length:,} bytes, more than {_MOST_COMMON_BYTES:,}")
            whole = load_part(self._bytes_at(place), file)
            found = whole[0] if isinstance(whole, list) and len(whole) == 1 else None
        if not isinstance(found, dict):
            raise CheckpointError(33, f"{file}: what all ranks share", "is not a mapping", "restore the checkpoint")
        return found, file

    def _below(self, prefix: str) -> dict[str, StoredTensor]:
        return {key.removeprefix(prefix): value for key, value in self._all.items() if key.startswith(prefix)}

    def of_optimizer(self, kind: str) -> DistributedReader:
        """The tensors of one kind (param, exp_avg, exp_avg_sq), fully_reshardable, under the names of the model's."""
        view = copy(self)
        view._prefix = f"optimizer.state.{kind}.{self._prefix}"
        view._tensors = self._below(view._prefix)
        return view

    def names(self) -> Iterable[tuple[str, int | None]]:
        """All tensors of the model, each with its layer."""
        for name, entry in self._tensors.items():
            if (
                name.startswith(("optimizer.", "rng_state", "rerun_state", "opt_param_scheduler"))
                or "_extra_state" in name
            ):
                continue
            for suffix in ("_w", "_v"):
                name = name.removesuffix(suffix)
            short, layer = split_name(name)
            if layer is None and name.startswith(LAYERS):
                if not entry.shape or entry.shape[0] > MAX_LAYERS:
                    raise self._bad(name, f"has the shape {list(entry.shape)}, whose first dimension is no layers")
                yield from ((name.removeprefix(LAYERS), number) for number in range(entry.shape[0]))
            else:
                yield short, layer

    def dtype(self, name: str, layer: int | None) -> torch.dtype:
        """The type in which a tensor is stored."""
        keys = [name] if layer is None else [full_name(name, layer), LAYERS + name]
        entry = next(self._tensors[key] for base in keys for key in (base, f"{base}_w") if key in self._tensors)
        return DTYPES.get(entry.dtype) or self.tensor(name, layer).dtype

    def rows(self, name: str) -> int:
        """Of a tensor that belongs to no layer."""
        return self._tensors[name].shape[0] if self._tensors[name].shape else 0

    def tensor(self, name: str, layer: int | None) -> Tensor:
        """A whole tensor, padding included."""
        if layer is None:
            return self._read(name, None)
        for key, row in ((full_name(name, layer), None), (LAYERS + name, layer)):
            if key in self._tensors:
                return self._read(key, row)
            if f"{key}_w" in self._tensors:
                return torch.cat([self._read(key + half, row) for half in ("_w", "_v")])
        raise CheckpointError(34, f"{self.folder}: {full_name(name, layer)}", "is missing", "restore the checkpoint")

    def _read(self, key: str, layer: int | None) -> Tensor:
        """A tensor, or the part of one layer of a tensor of all layers."""
        entry = self._tensors[key]
        shape, chunks = entry.shape, entry.chunks
        if layer is not None:
            shape, chunks = shape[1:], tuple(c for c in chunks if c.offsets[0] <= layer < c.offsets[0] + c.sizes[0])
        held = chunks if layer is None else [Chunk(chunk.offsets[1:], chunk.sizes[1:]) for chunk in chunks]
        if wrong := check_whole(held, shape):
            raise self._bad(key, f"{wrong} (shape {list(shape)})")
        places = [self._place(key, chunk) for chunk in chunks]
        result: Tensor | None = None
        for chunk, box, place in zip(chunks, held, places, strict=True):
            part = self._chunk(key, chunk, place)
            if layer is not None:
                part = part[layer - chunk.offsets[0]]
            if result is None:
                self._check_room(key, chunks, places)
                result = torch.empty(shape, dtype=part.dtype)
            if part.dtype != result.dtype:
                raise self._bad(key, f"has chunks of {result.dtype} and of {part.dtype}")
            result[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes))] = part
        if result is None:
            raise self._bad(key, "has no chunk")
        return result

    def _place(self, key: str, chunk: Chunk) -> ChunkPlace:
        """Where a chunk lies, in a file that is as long."""
        place = self._where.get((self._prefix + key, chunk.offsets))
        if place is None:
            raise self._bad(key, f"has a chunk at {list(chunk.offsets)} that lies in no file")
        if place.length > _ELEMENT_BYTES * chunk.numel + _FRAME_BYTES:
            raise self._bad(key, f"has a chunk of {chunk.numel:,} elements in {place.length:,} bytes of {place.file}")
        self._check_end(key, place)
        return place

    def _check_end(self, key: str, place: ChunkPlace) -> None:
        with reading(self.folder / place.file), open_regular(self.folder / place.file, follow=False) as file:
            size = os.fstat(file.fileno()).st_size
        if place.offset + place.length > size:
            raise self._bad(key, f"has a chunk beyond the end of {place.file}")

    def _check_room(self, key: str, chunks: Sequence[Chunk], places: Sequence[ChunkPlace]) -> None:
        """Refuse chunks that have more elements than bytes, before there is memory for them."""
        for chunk, place in zip(chunks, places, strict=True):
            if chunk.numel > place.length:
                held = f"{chunk.numel:,} elements in {place.length:,} bytes"
                raise self._bad(key, f"has a chunk of {held} of {place.file}")

    def _bytes_at(self, place: ChunkPlace) -> bytearray:
        with reading(self.folder / place.file), open_regular(self.folder / place.file, follow=False) as file:
            file.seek(place.offset)
            content = bytearray(place.length)
            del content[file.readinto(content) :]
        return content

    def _chunk(self, key: str, chunk: Chunk, place: ChunkPlace) -> Tensor:
        part = load_part(self._bytes_at(place), self.folder / place.file)
        if not isinstance(part, Tensor) or part.layout != torch.strided or tuple(part.shape) != chunk.sizes:
            raise self._bad(key, f"has another shape in {place.file} than .metadata says")
        return part

    def _bad(self, key: str, rule: str) -> CheckpointError:
        return CheckpointError(33, f"{self.folder}: {key}", rule, "restore the checkpoint")


def _optimizer_format(names: Sequence[str]) -> str:
    """What there is of the optimizer, in words; empty: nothing."""
    keys = [name for name in names if "optimizer." in name]
    if any("optimizer.distributed.dp_group_idx" in key for key in keys):
        return "of the format dp_reshardable, flat buckets that only ranks of the same grouping can read"
    if any(".exp_avg" in key for key in keys):
        return f"of the format {FULLY_RESHARDABLE}"
    return "of a format that is not known" if keys else ""
