"""Indices that take long to build, kept in files: built once per file system, then mapped by every process.

::

    F.index   0   "HMRINDEX"   u32 version   u32 H bytes of JSON   u64 XXH3-64 of the JSON
              24  JSON: kind, key, arrays (name, dtype, shape, offset), bytes and XXH3-128 of all from `start` on
              ..  zeros up to `start`, then the arrays, each at a multiple of 64

A file is named and keyed by what its content follows from (fingerprint of the dataset, seed, epoch ...), so it never
goes stale: other data look for another file. It is accepted only if its key, its size and its checksum are right; a
damaged one is built anew, with a note. The first process that misses a file builds it under a lock, writes it beside
and renames it; the others wait, with a message and a limit. Where nothing can be written the index is built in memory,
and a note says so.

Memory: the token counts of an epoch are 8 bytes for 64 documents, and lengths are read from the map, so 10^9 documents
take 125 MB. Megatron-LM's order needs its arrays whole while it builds them: 4 bytes a document and epoch, 12 a sample.

Small indices are not kept: below ``SMALLEST`` documents and samples they are built faster than a file is looked for on
a network disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.files import make_durable, open_new, publish
from megatron_hammer.base.locks import take_lock
from megatron_hammer.base.mapping import FileMap
from megatron_hammer.base.progress import say
from megatron_hammer.base.reading import open_regular, parse_json

MAGIC = b"HMRINDEX"
VERSION = 1
SMALLEST = 1 << 20  # documents, or samples of a mix: some 25 ms of work
WAIT_SECONDS = 1800.0  # for another process that builds: ten times what 10^9 documents take
_START = struct.Struct("<8sIIQ")
_ALIGNMENT = 64
_ARRAYS = ("<i4", "<i8", "<u4")  # what indices are made of; nothing else is believed
_POLL_SECONDS = 0.1

Key = Mapping[str, int | str]
Arrays = dict[str, np.ndarray]


class BadIndexFile(Exception):
    """Why a file is not the index it should be."""


class IndexStore:
    """The indices in one folder.

    Args:
        folder: made when the first index is kept.
        note: gets what the user should know: damaged files, waiting, a folder that cannot be written; stderr, where
            nobody collects it.
        smallest: work (documents or samples) from which an index is kept.
        wait_seconds: how long to wait for another process that builds.
        check_built: raises where what indices are built from changed meanwhile: then none is kept.
    """

    def __init__(
        self,
        folder: str | Path,
        note: Callable[[str], None] = say,
        smallest: int = SMALLEST,
        wait_seconds: float = WAIT_SECONDS,
        *,
        check_built: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.note = Path(folder), note
        self.smallest, self.wait_seconds, self.check_built = smallest, wait_seconds, check_built
        self.maps: list[weakref.ref[FileMap]] = []
        """Of the files of indices that are in use: ``FileMap.check`` says whether one is still what was mapped."""

    def path(self, kind: str, key: Key) -> Path:
        """The file of an index."""
        text = json.dumps([VERSION, kind, dict(sorted(key.items()))])
        return self.folder / f"{kind}-{xxhash.xxh3_128_hexdigest(text.encode())}.index"

    def get(self, kind: str, key: Key, work: int, build: Callable[[], Arrays]) -> Arrays:
        """The arrays of an index, read-only: from its file, or built now and kept there.

        Args:
            kind: names the sort of index.
            key: everything its content follows from.
            work: documents or samples that ``build`` goes through.
            build: makes the arrays, int32, int64 or uint32.

        Raises:
            DataError: another process builds it for longer than the limit.
        """
        if work < self.smallest:
            return build()
        path = self.path(kind, key)
        found = self._find(path, kind, key, lambda text: None)  # whoever builds it anew says so
        if found is not None:
            return found
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._lock(path):
                found = self._find(path, kind, key, self.note)  # the process we waited for may have built it
                if found is not None:
                    return found
                for left in self.folder.glob("*.tmp"):  # by a process that was killed: we hold the lock
                    left.unlink(missing_ok=True)
                arrays = build()
                self.check_built()
                try:
                    write_index(path, kind, key, arrays)
                except OSError as error:
                    return self._unkept(arrays, error)
        except OSError as error:
            return self._unkept(build(), error)
        # Mapped: shared with other processes, unlike what was built.
        return self._find(path, kind, key, self.note) or arrays

    def _unkept(self, arrays: Arrays, error: OSError) -> Arrays:
        self.note(
            f"{self.folder}: an index cannot be kept ({error.strerror or error}), so every process builds its own in "
            "memory; set data.index_folder to a folder that can be written"
        )
        return arrays

    def _find(self, path: Path, kind: str, key: Key, note: Callable[[str], None]) -> Arrays | None:
        try:
            arrays, mapped = read_index(path, kind, key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (BadIndexFile, OSError) as error:
            note(f"{path} {error}; it is built anew")
            return None
        self.maps = [known for known in self.maps if known() is not None] + [weakref.ref(mapped)]
        return arrays

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        taken = None
        try:
            waited, since = False, time.monotonic()
            while (taken := take_lock(descriptor, self.folder / "lock", self.note)) is None:
                if not waited:
                    self.note(f"{path}: waiting for another process that builds it (at most {self.wait_seconds:g} s)")
                    waited = True
                if time.monotonic() - since > self.wait_seconds:
                    raise DataError(
                        57,
                        f"{self.folder / 'lock'}",
                        f"has been held by another process for {self.wait_seconds:g} s",
                        "see what that process does, or set data.index_folder to another folder",
                    )
                time.sleep(_POLL_SECONDS)
            yield
        finally:
            if taken is not None:
                taken.give_up()
            os.close(descriptor)


def write_index(path: Path, kind: str, key: Key, arrays: Arrays) -> None:
    """Write a file under a temporary name, make it durable, and rename it."""
    place, entries = 0, []
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, array in contiguous.items():
        assert array.dtype.str in _ARRAYS, f"{name} is of {array.dtype}"
        entries.append({"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "offset": place})
        place += array.nbytes + -array.nbytes % _ALIGNMENT
    digest = xxhash.xxh3_128()
    for array in contiguous.values():
        digest.update(array.data.cast("B") if array.size else b"")
        digest.update(bytes(-array.nbytes % _ALIGNMENT))
    tree = {"kind": kind, "key": dict(key), "arrays": entries, "payload": place, "xxh3": digest.hexdigest()}
    text = json.dumps(tree).encode()
    temporary = path.with_suffix(".tmp")  # nobody else writes here: the caller holds the lock
    try:
        with open_new(temporary) as file:
            file.write(_START.pack(MAGIC, VERSION, len(text), xxhash.xxh3_64_intdigest(text)) + text)
            file.write(bytes(-file.tell() % _ALIGNMENT))
            for array in contiguous.values():
                file.write(array.data.cast("B") if array.size else b"")
                file.write(bytes(-array.nbytes % _ALIGNMENT))
            make_durable(file)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_index(path: Path, kind: str, key: Key) -> tuple[Arrays, FileMap]:
    """Map a file and check all of it; the arrays are read-only views of the map, which is returned too.

    Raises:
        FileNotFoundError: there is none.
        BadIndexFile: it is cut, damaged, or another index.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _START.size:
            raise BadIndexFile(f"is cut to {size} bytes")
        mapped = FileMap(file.fileno(), size, path)
        content = mapped.array()
    magic, version, length, checksum = _START.unpack_from(content.data)
    if magic != MAGIC or version != VERSION:
        raise BadIndexFile(f"is not an index of version {VERSION}")
    text = content[_START.size : _START.size + length].tobytes()
    if xxhash.xxh3_64_intdigest(text) != checksum:
        raise BadIndexFile("has a damaged header")
    tree: dict[str, Any] = parse_json(text)  # ours, as its checksum says
    if tree["kind"] != kind or tree["key"] != dict(key):
        raise BadIndexFile("is the index of something else")
    start = _START.size + length
    start += -start % _ALIGNMENT
    if size != start + tree["payload"]:
        raise BadIndexFile(f"has {size:,} bytes where {start + tree['payload']:,} belong")
    if xxhash.xxh3_128_hexdigest(content[start:].data) != tree["xxh3"]:
        raise BadIndexFile("does not have the checksum it should")
    arrays = {}
    for entry in tree["arrays"]:
        count = int(np.prod(entry["shape"], dtype=np.int64))
        array = np.frombuffer(content, entry["dtype"], count, start + entry["offset"])
        arrays[entry["name"]] = array.reshape(entry["shape"])
    return arrays, mapped
