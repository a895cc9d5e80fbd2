"""Maps that keep no descriptor, live as long as an array of theirs, and name their file when they fail."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.mapping import FileMap


def _map(path: Path) -> FileMap:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return FileMap(descriptor, os.fstat(descriptor).st_size, path)
    finally:
        os.close(descriptor)


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def test_an_array_keeps_the_map_and_nothing_keeps_a_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(100_000)
    path.write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))
    mapped = _map(path)
    part = np.frombuffer(mapped.array(), "<i8", 1000, 34)  # unaligned, as an index's are
    assert len(os.listdir("/proc/self/fd")) == before
    mapped.forget()
    del mapped
    gc.collect()
    assert part.tobytes() == content[34 : 34 + 8000] and not part.flags.writeable and _is_mapped(path)
    del part
    gc.collect()
    assert not _is_mapped(path)


def test_an_empty_file_maps_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    mapped = _map(tmp_path / "empty")
    mapped.forget()
    assert len(mapped.array()) == 0


def test_a_failure_names_the_file(tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="some/name") as caught:
        FileMap(folder, 10, "some/name")
    os.close(folder)
    assert caught.value.filename == "some/name"
