"""The content of a distributed checkpoint's ``.metadata``, as plain numbers that have been checked.

A pickle may hold anything in the place of a shape, a chunk or a file name. So its records are turned at once into the
few values that reading needs, and a record of another form is an error that names its tensor. Needs no torch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.megatron.pickles import Record, load_metadata

_FILE = re.compile(r"__[0-9]{1,9}_[0-9]{1,9}\.distcp")
_MOST = 2**53  # elements of a tensor, bytes of a file: beyond every disk, and exact as any number


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, stored as one."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its global shape."""

    shape: tuple[int, ...]
    dtype: str
    """As the file names it, of torch's names what stands behind the point; empty: it does not say."""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class ChunkPlace:
    """Where a chunk lies."""

    file: str
    offset: int
    length: int
    """Bytes."""


@dataclass(frozen=True)
class Metadata:
    """What reading needs of a checkpoint's ``.metadata``."""

    names: tuple[str, ...]
    """Of everything, tensors or not."""
    entries: Mapping[str, StoredTensor]
    places: Mapping[tuple[str, tuple[int, ...]], ChunkPlace]
    """By tensor, and where the chunk begins in it."""
    objects: Mapping[str, ChunkPlace]
    """Of what is no tensor."""


def read_metadata(path: Path) -> Metadata:
    """The content of the file.

    Raises:
        CheckpointError: E430 chunks are stored in a form that is not read; E431 the pickle names what is not on our
            list; E433 it is no metadata, or of an impossible form.
    """
    record = load_metadata(path)
    described = record.state_dict_metadata
    entries = {_text(path, key): value for key, value in described.items()}
    tensors = {
        key: _entry(path, key, value) for key, value in entries.items() if isinstance(value, Record) and value.chunks
    }
    storage = record.storage_data or {}
    if not isinstance(storage, dict):
        raise _bad(path, "has no table of its chunks")
    places, objects = dict[tuple[str, tuple[int, ...]], ChunkPlace](), dict[str, ChunkPlace]()
    for index, info in storage.items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            continue
        key, place = _text(path, index.fqn), _place(path, info)
        if index.offset is None:
            objects[key] = place
        else:
            places[key, _counts(path, key, index.offset)] = place
    return Metadata(tuple(entries), tensors, places, objects)


def _entry(path: Path, key: str, value: Record) -> StoredTensor:
    shape = _counts(path, key, value.size)
    if not isinstance(value.chunks, list | tuple):
        raise _bad(path, f"has chunks of {key} that are no list")
    chunks = []
    for chunk in value.chunks:
        if not isinstance(chunk, Record):
            raise _bad(path, f"has a chunk of {key} that is none")
        found = Chunk(_counts(path, key, chunk.offsets), _counts(path, key, chunk.sizes))
        if not len(found.offsets) == len(found.sizes) == len(shape):
            raise _bad(path, f"has a chunk of {key} of another number of dimensions")
        if any(o + s > n for o, s, n in zip(found.offsets, found.sizes, shape, strict=True)):
            raise _bad(path, f"has a chunk of {key} beyond its shape")
        chunks.append(found)
    state = value.properties.state if isinstance(value.properties, Record) else None
    stated = state[0] if isinstance(state, tuple) and state else None
    return StoredTensor(shape, stated.removeprefix("torch.") if isinstance(stated, str) else "", tuple(chunks))


def _place(path: Path, info: Record) -> ChunkPlace:
    name, offset, length = info.relative_path, info.offset, info.length
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        raise _bad(path, f"names {_shown(name)}, which is no file of a distributed checkpoint")
    if not _is_count(offset) or not _is_count(length):
        raise _bad(path, f"has a chunk beyond the end of {name}, or before its start")
    if info.transform_descriptors:
        rule = f"has chunks that are compressed ({_shown(info.transform_descriptors)})"
        raise CheckpointError(30, str(path), rule, "save it without extensions")
    return ChunkPlace(name, offset, length)


def _text(path: Path, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise _bad(path, f"has a name that is none: {_shown(value)}")
    return value


def _counts(path: Path, key: str, value: Any) -> tuple[int, ...]:
    """A shape, or a place in one."""
    if not isinstance(value, tuple | list) or len(value) > 8 or not all(map(_is_count, value)):
        raise _bad(path, f"has no numbers for the shape or a chunk of {key}")
    if math.prod(value) >= _MOST:
        raise _bad(path, f"has a shape or a chunk of {key} that no tensor has")
    return tuple(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _shown(value: Any) -> str:
    """For an error; of what is no text its kind alone."""
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"


def _bad(path: Path, rule: str) -> CheckpointError:
    return CheckpointError(33, str(path), rule, "restore the checkpoint")


def check_whole(chunks: Sequence[Chunk], shape: tuple[int, ...]) -> str:
    """What is wrong with chunks that should cover a shape they lie in, each element once; empty: nothing.

    How often each element is covered follows from the chunks' corners alone, with signs, as a step function from its
    steps. So the corners must come to those of the shape; two by two, some thousand chunks would take minutes.
    """
    filled, numel = sum(chunk.numel for chunk in chunks), math.prod(shape)
    if filled != numel:
        return f"has chunks of {filled:,} elements, not all of its {numel:,}"
    corners, whole = Counter[tuple[int, ...]](), Chunk((0,) * len(shape), shape)
    for chunk, times in [(whole, -1), *((chunk, 1) for chunk in chunks)]:
        for ends in itertools.product((0, 1), repeat=len(shape)):
            at = tuple(o + n * end for o, n, end in zip(chunk.offsets, chunk.sizes, ends, strict=True))
            corners[at] += times * (-1) ** sum(ends)
    return "has chunks that lie over each other" if any(corners.values()) else ""
