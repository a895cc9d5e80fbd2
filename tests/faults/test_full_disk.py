"""A disk that is full at each file in turn: nothing half under a final name, a line that says it all, and it goes on.

Where the tests may mount a tmpfs (as root), it is made so small that one page more is there in each trial; elsewhere
files may not grow beyond a limit that rises. What is written must then be what it is on a disk with room.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_hammer.base.errors import HammerError, from_exception
from megatron_hammer.base.files import copy_folder, replace_file, staged_folder, write_durably
from megatron_hammer.base.pictures import save_png
from megatron_hammer.corpus.reformat import reformat_corpus
from megatron_hammer.corpus.sample import sample_corpus
from megatron_hammer.corpus.shuffle import Shuffle
from megatron_hammer.corpus.split import split_corpus
from megatron_hammer.dataset.make.merge import merge_datasets
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.sampling.cache import write_index
from megatron_hammer.tokenizer.load import load_tokenizer
from tests.dataset.built import build_datasets

PAGES = 64
PAGE = 4096
MS_RDONLY, MS_REMOUNT = 1, 32  # linux/mount.h
TEMPORARY = re.compile(r"\.tmp|^\.|\.partial|\.journal|lock$")
Case = Callable[[dict[str, Path], Path], Any]


class Picture:
    """In place of a figure of matplotlib, whose import takes a second."""

    axes: tuple[Any, ...] = ()

    def findobj(self, kind: type) -> list[Any]:
        return []

    def savefig(self, content: Any, format: str) -> None:
        content.write(bytes(9_000))


def dataset(given: dict[str, Path], folder: Path) -> None:
    with IndexedWriter(folder / "p", vocab_size=50_000) as writer:
        for length in (3_000, 0, 9_000):
            writer.add(np.arange(length) % 50_000, np.array([length]))


def preprocess(given: dict[str, Path], folder: Path) -> None:
    build_datasets([given["corpus"]], ["text"], given["tokenizer"], folder / "p", True, workers=1, on_error="skip")


def index(given: dict[str, Path], folder: Path) -> None:
    write_index(folder / "a.index", "kind", {"a": 1}, {"x": np.arange(2_000), "y": np.arange(3_000)})


def shuffle(given: dict[str, Path], folder: Path) -> None:
    work = Shuffle([given["corpus"]], folder / "shuffled.jsonl", 1)
    work.block_bytes, work.partition_weight, work._check_room = 2_000, 4_000, lambda: None  # type: ignore[method-assign]
    with work:
        work.scatter()
        work.gather()


def picture(given: dict[str, Path], folder: Path) -> None:
    save_png(Picture(), folder / "a.png")


def folder_of_files(given: dict[str, Path], folder: Path) -> None:
    with staged_folder(folder / "export", replace=True) as staging:
        for name in "abc":
            write_durably(staging / name, name.encode() * 5_000)


def copy_of_a_folder(given: dict[str, Path], folder: Path) -> None:
    with staged_folder(folder / "copy", replace=True) as staging:
        copy_folder(given["export"], staging)


CASES: dict[str, Case] = {
    "dataset": dataset,
    "datasets of a corpus": preprocess,
    "datasets joined": lambda given, folder: merge_datasets([given["p"], given["p"]], folder / "both"),
    "index": index,
    "corpus shuffled": shuffle,
    "corpus split": lambda given, folder: split_corpus([given["corpus"]], folder / "s", 1, valid_fraction=0.3),
    "corpus sampled": lambda given, folder: sample_corpus([given["corpus"]], folder / "s", 4_000, 3_000, 1),
    "corpus reformatted": lambda given, folder: reformat_corpus("jsonl", [given["corpus"]], folder / "r.jsonl.gz"),
    "tokenizer": lambda given, folder: load_tokenizer(given["tokenizer"]).save_files(folder),
    "picture": picture,
    "one file": lambda given, folder: replace_file(folder / "incident.json", bytes(10_000)),
    "folder": folder_of_files,
    "folder copied": copy_of_a_folder,
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> dict[str, Path]:
    """Inputs, on a disk with room."""
    folder = tmp_path_factory.mktemp("given")
    lines = [f'{{"text": "line {n} {"word " * (n % 50)}"}}\n' for n in range(120)]
    (folder / "corpus.jsonl").write_text("".join(lines))
    dataset({}, folder)
    (folder / "export" / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (folder / "export" / name).write_bytes(name.encode() * 5_000)
    return {"corpus": folder / "corpus.jsonl", "p": folder / "p", "tokenizer": tokenizer, "export": folder / "export"}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A small file system; None where none can be mounted."""
    folder, libc = tmp_path_factory.mktemp("disk"), ctypes.CDLL(None, use_errno=True)
    options = f"size={PAGES * PAGE}".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options):
        yield None
        return
    yield folder
    libc.umount2(os.fsencode(folder), 2)  # lazily: whatever a failed test has left open


@contextmanager
def room(disk: Path | None, number: int) -> Iterator[None]:
    """Little room, the more the higher the number is."""
    if disk is not None:
        filler = disk / "filler"
        with open(filler, "wb") as file:
            free = os.statvfs(disk).f_bavail
            os.posix_fallocate(file.fileno(), 0, max(1, free - number) * PAGE)
        yield
        filler.unlink()
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700 * number, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def published(folder: Path) -> dict[str, bytes]:
    """All files under final names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if not any(TEMPORARY.search(part) for part in path.relative_to(folder).parts)
    }


@pytest.mark.parametrize("name", CASES)
def test_full_at_each_file_in_turn(given: dict[str, Path], disk: Path | None, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case(given, tmp_path)
    whole, failures = published(tmp_path), 0
    folder = (tmp_path / "small" if disk is None else disk) / "out"
    for number in range(PAGES):
        folder.mkdir(parents=True, exist_ok=True)
        error: HammerError | None = None
        with room(disk, number):
            try:
                case(given, folder)
            except Exception as caught:
                error = from_exception(caught, "the test")
                assert error is not None, repr(caught)
        if error is None:
            break
        failures += 1
        line = str(error)
        assert error.exit_code == 6 and str(folder) in line, line
        assert re.search(r"[\d,]+ bytes needed", line), line
        assert disk is None or " MB free" in line, line
        for path, content in published(folder).items():
            assert content == whole[path], f"{path} with {number} pages of room"
        if number % 3 == 0:  # with room: the same command goes on, or begins again
            case(given, folder)
            assert published(folder) == whole
            shutil.rmtree(folder)
    assert failures and published(folder) == whole
    shutil.rmtree(folder)


@contextmanager
def read_only(disk: Path | None, folder: Path) -> Iterator[None]:
    """A folder that nothing can be written to; of the small file system, where there is one."""
    libc = ctypes.CDLL(None)
    if disk is not None:
        libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", MS_REMOUNT | MS_RDONLY, b"")
    else:
        folder.chmod(0o555)
    try:
        yield
    finally:
        if disk is not None:
            libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", MS_REMOUNT, b"")
        else:
            folder.chmod(0o755)


@pytest.mark.parametrize("name", CASES)
def test_read_only_and_missing_folders(given: dict[str, Path], disk: Path | None, tmp_path: Path, name: str) -> None:
    folder = (tmp_path / "small" if disk is None else disk) / "out"
    folder.mkdir(parents=True)
    with read_only(disk, folder), pytest.raises(Exception) as caught:
        CASES[name](given, folder)
    line = str(from_exception(caught.value, "the test"))
    assert "E601" in line and str(folder) in line and re.search("Read-only|Permission", line), line
    assert not list(folder.iterdir())
    folder.rmdir()
    try:
        CASES[name](given, folder)  # many make it
    except Exception as absent:
        line = str(from_exception(absent, "the test"))
        assert str(folder) in line and re.search("E601.*is not there|E288.*is no folder; make it first", line), line
    shutil.rmtree(folder, ignore_errors=True)
