"""Maps that keep no descriptor, live as long as an array of theirs, and name their file when they fail."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.mapping import SURVIVES_CUTS, FileMap


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


def _write(path: Path) -> FileMap:
    path.write_bytes(bytes(range(1, 251)) * 400)  # 100,000 bytes, none of them 0
    return _map(path)


@pytest.mark.skipif(not SURVIVES_CUTS, reason="needs the compiled module")
def test_a_cut_file_reads_as_zeros_and_says_so_for_ever(tmp_path: Path) -> None:
    mapped, other = _write(tmp_path / "cut"), _write(tmp_path / "whole")
    mapped.check()
    os.truncate(tmp_path / "cut", 5000)
    array = mapped.array()
    assert array[:5000].all() and not array[8192:].any()
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes())
    assert not array[8192:].any()  # what was lost does not come back, and so is no surprise
    with pytest.raises(DataError, match=r"E350.*/cut was cut.*while it was in use"):
        mapped.check()
    other.check()
    assert other.array().all()


@pytest.mark.skipif(not SURVIVES_CUTS, reason="needs the compiled module")
def test_whoever_took_the_signal_since_does_not_matter(tmp_path: Path) -> None:
    """As a rank does that answers with its stacks, after files were mapped."""
    earlier = _write(tmp_path / "earlier")
    faulthandler.disable()
    faulthandler.enable(sys.__stderr__)
    mapped = _write(tmp_path / "cut")
    for name in ("cut", "earlier"):
        os.truncate(tmp_path / name, 5000)
    assert not mapped.array()[8192:].any() and not earlier.array()[8192:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: os.truncate(path, 99_999), "had 100,000 bytes when it was opened, and has 99,999 now"),
        (lambda path: path.open("ab").write(b"more"), "has 100,004 now"),
        (lambda path: path.open("r+b").write(b"other"), "was written to while it was in use"),
    ],
)
def test_a_changed_file_is_named(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "file"
    mapped = _write(path)
    os.utime(path, ns=(1, 1))
    mapped = _map(path)
    mapped.check()
    change(path)
    with pytest.raises(DataError, match=message) as caught:
        mapped.check()
    assert caught.value.what == str(path) and caught.value.exit_code == 3


def test_a_file_that_was_replaced_or_removed_is_still_the_one_that_was_mapped(tmp_path: Path) -> None:
    mapped = _write(tmp_path / "file")
    (tmp_path / "new").write_bytes(b"another")
    (tmp_path / "new").replace(tmp_path / "file")
    mapped.check()
    (tmp_path / "file").unlink()
    mapped.check()
    assert mapped.array().all()
