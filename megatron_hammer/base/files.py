"""Writing files so that a crash never leaves half a file under its final name, and the checksums of files.

A file is written under a temporary name beside its final one, and renamed when it is complete and its content is on the
disk (``publish``; ``replace_file`` for short content). ``locks.open_alone`` keeps two processes from writing the same
temporary file. A folder is made in the same way (``staged_folder``), under one of these names::

    NAME.tmp-5f0c...   being written, or left by a program that crashed
    NAME.old-91ab...   what was there before, set aside while it is replaced; counts if there is no NAME
    NAME.aside-77d0... what was in the way, or damaged: kept for people to look at, read by no program

The system's own error names no file where an open file cannot grow. Files that ``open_new`` and ``open_existing`` open
add their name to such an error; ``writing`` adds it for a block of code that writes in another way.

No torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import xxhash

from megatron_hammer.base.errors import FULL, WriteFailed
from megatron_hammer.base.progress import Progress
from megatron_hammer.base.reading import open_descriptor, open_regular
from megatron_hammer.base.system import sync

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BUFFER_BYTES = 2**20  # read at once while hashing


class StaleState(Exception):
    """What an interrupted run left is gone, or another run's: its work cannot be gone on with."""


# ---- errors that name the file ----


@contextmanager
def writing(path: str | os.PathLike[str], needed: int) -> Iterator[None]:
    """While so many bytes are written to a file, a full disk, or an error without a name, becomes ``WriteFailed``."""
    try:
        yield
    except WriteFailed:
        raise
    except OSError as error:
        if error.errno in FULL or error.filename is None:
            raise WriteFailed(error, path, needed) from error
        raise


class _NamedFile(io.FileIO):
    """A file that knows its path, and whose errors of writing say it, and how large the file was to become."""

    def __init__(self, path: str | os.PathLike[str], mode: str, descriptor: int | None = None) -> None:
        super().__init__(path if descriptor is None else descriptor, mode)
        self.name = path  # also where it was open already, and Python knows the number alone

    def write(self, content: ReadableBuffer, /) -> int:
        """As of any file, if the system takes it."""
        try:
            return super().write(content)
        except OSError as error:
            raise WriteFailed(error, self.name, self.tell() + memoryview(content).nbytes) from error


def open_new(path: str | os.PathLike[str], buffering: int = io.DEFAULT_BUFFER_SIZE) -> IO[bytes]:
    """A new file, or one that is emptied, to be written and read."""
    return io.BufferedRandom(_NamedFile(path, "w+"), buffering)


def open_existing(path: str | os.PathLike[str], descriptor: int | None = None) -> IO[bytes]:
    """A file that is there, to be written and read from its start.

    Args:
        descriptor: of that file, where it is open already; closed with what is returned.
    """
    return io.BufferedRandom(_NamedFile(path, "r+", descriptor))


def make_durable(file: IO[bytes]) -> None:
    """Have all that was written to an open file on the disk; one over a network may be full only now."""
    file.flush()
    with writing(file.name, os.fstat(file.fileno()).st_size):
        sync(file.fileno())


class _Closes(Protocol):
    def close(self) -> object: ...


def close_after(file: _Closes, error: BaseException | None) -> None:
    """Close a file at the end of a ``with`` block: what cannot be written any more does not hide why the block failed.

    Args:
        error: why; None where it has not failed.
    """
    with suppress(OSError) if error is not None else nullcontext():
        file.close()


@contextmanager
def nameless_file(folder: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A temporary file without a name on the file system of a folder: it is gone when it is closed."""
    descriptor, path = tempfile.mkstemp(dir=folder)
    os.unlink(path)
    file = open_existing(path, descriptor)
    try:
        yield file
    except BaseException as error:
        close_after(file, error)
        raise
    file.close()


# ---- durable, whole or not at all ----


def sync_folder(path: Path) -> None:
    """Make the names in a folder (files made, renamed, removed) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    descriptor = open_descriptor(path)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet (in a staging folder, say) and make its content durable."""
    with writing(path, len(content)), open(path, "xb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def publish(staged: Path, path: Path) -> None:
    """Give a finished file or folder its final name, durably: readers see what was there before, or the new one whole.

    A file takes the place of a file. A folder takes the place of an empty folder, but never of one that was filled
    meanwhile (``OSError``). What is staged must lie on the same file system and have been synced.
    """
    os.rename(staged, path)
    sync_folder(path.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, make it durable, and rename: readers see the old one or the new one."""
    temporary = staging_path(path)  # not by our number: in a container, every start may have that of the one that died
    try:
        write_durably(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def staging_path(target: Path, identity: str | None = None) -> Path:
    """Where what will become ``target`` is put together: beside it, so that a rename moves it.

    Args:
        identity: 16 hex digits that tell it from what others write there; drawn where it is None.
    """
    return target.with_name(f"{target.name}.tmp-{identity or secrets.token_hex(8)}")


def exchange_folder(staged: Path, target: Path) -> Path | None:
    """Rename a finished folder to ``target``, durably.

    At every moment the old or the new content is there, under its name or as ``.old-``.

    Returns:
        where what was in the way is now, ``NAME.old-HEX``; None where nothing was.
    """
    sync_folder(staged)
    old = target.with_name(f"{target.name}.old-{secrets.token_hex(8)}") if os.path.lexists(target) else None
    if old is not None:
        os.rename(target, old)
    try:
        os.rename(staged, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    return old


def aside_path(path: Path) -> Path:
    """A new name for something beside it, ``NAME.aside-HEX``: what has it is kept for people to look at."""
    return path.with_name(f"{path.name}.aside-{secrets.token_hex(8)}")


def set_aside(path: Path, aside: Path | None = None) -> Path:
    """Rename a file, link or folder to ``NAME.aside-HEX`` beside it, durably; its new path. Nothing is removed."""
    aside = aside or aside_path(path)
    os.rename(path, aside)
    sync_folder(path.parent)
    return aside


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a crash half-way leaves a staging name, not half of what was there."""
    doomed = staging_path(folder)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(target: Path) -> None:
    """Remove what crashed programs left beside ``target``; bring back what was set aside and not replaced."""
    name = re.compile(rf"{re.escape(target.name)}\.(tmp|old)-[0-9a-f]{{16}}")
    for path in sorted(target.parent.iterdir()):
        match = name.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if match[1] == "old" and not os.path.lexists(target):
            os.rename(path, target)
        else:
            shutil.rmtree(path)


@contextmanager
def staged_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its name when the block ends; after an error nothing of it is left.

    Args:
        target: its parent is made where it is missing, what crashed programs left beside it is removed.
        replace: whether ``target`` may be there already. Otherwise it may only be an empty folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    staging = staging_path(target)
    staging.mkdir()
    try:
        yield staging
        if replace:
            if (old := exchange_folder(staging, target)) is not None:
                shutil.rmtree(old)
        else:
            sync_folder(staging)
            publish(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def copy_folder(source: Path, target: Path) -> None:
    """Copy all that is in a folder into another, which is there and empty, and make it durable: files and names."""
    paths = sorted(source.rglob("*"))  # a folder comes before what is in it
    sizes = {path: path.stat().st_size for path in paths if not path.is_dir()}
    with Progress(f"copying {source.name}", sum(sizes.values())) as progress:
        for path in paths:
            copy = target / path.relative_to(source)
            if path not in sizes:
                copy.mkdir()
                continue
            with writing(copy, sizes[path]):
                shutil.copy2(path, copy)
                sync_file(copy)
            progress.advance(sizes[path])
    for folder in (*target.rglob("*/"), target):
        sync_folder(folder)


# ---- content ----


def dump_json(value: Any) -> bytes:
    """JSON for people to read: indented, characters beyond ASCII as they are, with a line break at the end."""
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


def dump_names(value: Any) -> bytes:
    """``dump_json`` of a value that may name files: bytes that are no UTF-8 become text, so that every reader takes it.

    Python reads such a byte as half of a surrogate pair, which UTF-8 does not have; in the text stands ``\\udcff``.
    """
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return (re.sub(r"[\ud800-\udfff]", lambda half: rf"\\u{ord(half[0]):04x}", text) + "\n").encode()


def canonical_json(value: Any) -> bytes:
    """The one text of a JSON value, for its hash: sorted keys, no spaces, ASCII, finite numbers only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def hash_bytes(content: bytes | memoryview) -> str:
    """XXH3-128 of some bytes, as 32 hex digits: the checksum of everything that we write."""
    return xxhash.xxh3_128_hexdigest(content)


def hash_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """XXH3-128 of a file's content; ``advance`` is called with the bytes that were read."""
    with open_regular(path) as file:
        return hash_content(file, advance)


def hash_content(file: IO[bytes], advance: Callable[[int], None] = lambda count: None) -> str:
    """XXH3-128 of an open file, from where it stands to its end."""
    hasher = xxhash.xxh3_128()
    while chunk := file.read(BUFFER_BYTES):
        hasher.update(chunk)
        advance(len(chunk))
    return hasher.hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content: for manifests that other programs may check."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
