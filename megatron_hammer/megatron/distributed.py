"""``torch_dist`` checkpoints of Megatron-LM: torch's distributed checkpoint format, read without any process group.

::

    iter_0000100/metadata.json     {"sharded_backend": "torch_dist", ...}
    iter_0000100/common.pt         args, iteration: what all ranks have in common
    iter_0000100/.metadata         a pickle: shape and chunks of each tensor, and where in which file a chunk lies
    iter_0000100/__R_N.distcp      chunks, each a torch file of one tensor

Tensors are stored by global shape, whatever ranks wrote them; those of all layers are one tensor with the layers as its
first dimension, unless layers differ. Gate and up of all ranks lie behind each other in one tensor, or in two whose
names end in _w and _v. This does what torch's own reader does (tests compare the two), with a guarded unpickler and one
tensor in memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.reading import open_regular
from megatron_hammer.checkpoint.dtypes import DTYPES
from megatron_hammer.megatron.layout import EMBEDDING_THERE, LAYERS, full_name, split_name
from megatron_hammer.megatron.legacy import arguments_of, iteration_of
from megatron_hammer.megatron.pickles import Record, load_metadata, load_pt, load_tensor, reading

FULLY_RESHARDABLE = "fully_reshardable"
_FILE = re.compile(r"__\d+_\d+\.distcp")
_PREFIXES = ("", "model.", "model.module.", "model.module.module.")


class DistributedSource:
    """The tensors of a checkpoint, by global shape.

    Raises:
        CheckpointError: a file is missing or damaged, or is no such checkpoint.
    """

    kind = "torch_dist"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        common = load_pt(folder / "common.pt")
        if not isinstance(common, dict):
            raise CheckpointError(33, str(folder / "common.pt"), "is not a mapping", "restore the checkpoint")
        self.args = arguments_of(common, folder / "common.pt")
        self.iteration = iteration_of(common)
        metadata = load_metadata(folder / ".metadata")
        self.common = common
        tensors = {
            str(key): value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, Record) and value.chunks
        }
        prefix = next((p for p in _PREFIXES if p + EMBEDDING_THERE in tensors), None)
        if prefix is None:
            raise CheckpointError(34, f"{folder}: {EMBEDDING_THERE}", "is missing", "name a checkpoint of a GPT model")
        self._where = _index(metadata, folder)
        self._all, self._prefix = tensors, prefix
        self._tensors = self._below(prefix)
        self.optimizer = _optimizer_format(metadata.state_dict_metadata)

    def _below(self, prefix: str) -> dict[str, Record]:
        return {key.removeprefix(prefix): value for key, value in self._all.items() if key.startswith(prefix)}

    def of_optimizer(self, kind: str) -> DistributedSource:
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
                yield from ((name.removeprefix(LAYERS), number) for number in range(int(entry.size[0])))
            else:
                yield short, layer

    def dtype(self, name: str, layer: int | None) -> torch.dtype:
        """Of a tensor."""
        keys = [name] if layer is None else [full_name(name, layer), LAYERS + name]
        entry = next(self._tensors[key] for base in keys for key in (base, f"{base}_w") if key in self._tensors)
        state = None if entry.properties is None else entry.properties.state
        stated = state[0] if isinstance(state, tuple) and state else None
        return DTYPES.get(str(stated)) or self.tensor(name, layer).dtype

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
        shape = tuple(map(int, entry.size))
        filled = 0
        result: Tensor | None = None
        for chunk in entry.chunks:
            offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            part = self._chunk(key, offsets, sizes)
            if layer is not None:
                part, offsets, sizes = part[layer - offsets[0]], offsets[1:], sizes[1:]
            if result is None:
                result = torch.empty(shape if layer is None else shape[1:], dtype=part.dtype)
            if any(o < 0 or o + s > n for o, s, n in zip(offsets, sizes, result.shape, strict=True)):
                raise self._bad(key, "has a chunk beyond its shape")
            result[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))] = part
            filled += part.numel()
        if result is None or filled != result.numel():
            raise self._bad(key, f"has chunks of {filled:,} elements, not all of its shape {list(shape)}")
        return result

    def _chunk(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        place = self._where.get((self._prefix + key, offsets))
        if place is None:
            raise self._bad(key, f"has a chunk at {list(offsets)} that lies in no file")
        name, offset, length = place
        with reading(self.folder / name), open_regular(self.folder / name, follow=False) as file:
            if offset + length > os.fstat(file.fileno()).st_size:
                raise self._bad(key, f"has a chunk beyond the end of {name}")
            file.seek(offset)
            content = file.read(length)
        part = load_tensor(content, self.folder / name)
        if not isinstance(part, Tensor) or tuple(part.shape) != sizes:
            raise self._bad(key, f"has another shape in {name} than .metadata says")
        return part

    def _bad(self, key: str, rule: str) -> CheckpointError:
        return CheckpointError(33, f"{self.folder}: {key}", rule, "restore the checkpoint")


def _index(metadata: Record, folder: Path) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """(tensor, where a chunk begins) -> (file, first byte, bytes)."""
    found: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, info in (metadata.storage_data or {}).items():
        if not isinstance(index, Record) or not isinstance(info, Record) or index.offset is None:
            continue
        name, offset, length = str(info.relative_path), info.offset, info.length
        if not _FILE.fullmatch(name) or type(offset) is not int or type(length) is not int or min(offset, length) < 0:
            rule = f"names {name[:80]!r}, which is no file of a distributed checkpoint"
            raise CheckpointError(33, str(folder / ".metadata"), rule, "restore the checkpoint")
        if info.transform_descriptors:
            rule = f"has chunks that are compressed ({info.transform_descriptors})"
            raise CheckpointError(30, str(folder / ".metadata"), rule, "save it without extensions")
        found[str(index.fqn), tuple(map(int, index.offset))] = name, offset, length
    return found


def _optimizer_format(entries: Mapping[Any, Any]) -> str:
    """What there is of the optimizer, in words; empty: nothing."""
    keys = [str(key) for key in entries if "optimizer." in str(key)]
    if any("optimizer.distributed.dp_group_idx" in key for key in keys):
        return "of the format dp_reshardable, flat buckets that only ranks of the same grouping can read"
    if any(".exp_avg" in key for key in keys):
        return f"of the format {FULLY_RESHARDABLE}"
    return "of a format that is not known" if keys else ""
