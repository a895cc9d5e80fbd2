"""The folders that checkpoints lie in: their names, which ones there are, and which of them is meant.

::

    RUN/checkpoints/
        step-00000100/               a checkpoint: complete by construction
        step-00000200.tmp-5f0c.../   being written, or left by a crash: never loaded, removed at the next start
        step-00000100.old-91ab.../   set aside while a step is saved again; counts if step-00000100 is not there

A folder becomes a checkpoint by one rename after everything in it was fsynced (``base/files.py``). The newest
checkpoint is found by looking at what is there; no file states it that could disagree.

Needs no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.files import remove_folder
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.manifest import MANIFEST, STEP_NAME, Manifest, read_manifest

FEWEST_KEPT = 2  # so that a checkpoint that turns out damaged is never the only one
_COMMITTED = re.compile(rf"(?:{STEP_NAME})(?:\.old-[0-9a-f]{{16}})?")
_NEVER_COMMITTED = re.compile(rf"(?:{STEP_NAME})\.tmp-[0-9a-f]+")

Note = Callable[[str], None]
"""Told what the user should know, one line at a time."""


def step_name(step: int) -> str:
    """``step-00000100``."""
    return f"step-{step:08d}"


def find_checkpoints(run_or_folder: str | Path) -> list[Path]:
    """Committed checkpoints of a run (or of its ``checkpoints`` folder), oldest first; none is opened."""
    folder = Path(run_or_folder)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        match = _COMMITTED.fullmatch(path.name)  # "step-N.old-..." comes before "step-N", which then wins
        if match and path.is_dir() and not path.is_symlink():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def readable_checkpoints(run_or_folder: str | Path, note: Note = say) -> Iterator[Manifest]:
    """Manifests of the committed checkpoints, newest first; what cannot be read is skipped and told to ``note``."""
    for path in reversed(find_checkpoints(run_or_folder)):
        try:
            yield read_manifest(path)
        except CheckpointError as error:
            note(f"skipped checkpoint {path}: {error}")


def newest_checkpoint(run_or_folder: str | Path, note: Note = say) -> Manifest | None:
    """The newest committed checkpoint with a readable manifest; None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is readable (starting afresh would hide the loss).
    """
    newest = next(readable_checkpoints(run_or_folder, note), None)
    if newest is None and (found := find_checkpoints(run_or_folder)):
        raise CheckpointError(
            3,
            str(found[-1].parent),
            f"has {len(found)} checkpoints, none with a readable manifest",
            "restore one, or move them away to start afresh",
        )
    return newest


def open_checkpoint(checkpoint_or_run: str | Path) -> Manifest:
    """The checkpoint that a user means: the folder itself, or the newest of a run or of its ``checkpoints`` folder.

    Raises:
        CheckpointError: there is none, or its manifest cannot be read.
    """
    path, remedy = Path(checkpoint_or_run), "name a checkpoint or the output folder of a run"
    if not path.is_dir():
        raise CheckpointError(1, str(path), "is not a folder", remedy)
    if _NEVER_COMMITTED.fullmatch(path.name):
        remedy = "name a committed step-NNNNNNNN folder"
        raise CheckpointError(2, str(path), "was never committed and may be incomplete", remedy)
    if os.path.lexists(path / MANIFEST):
        return read_manifest(path)
    newest = newest_checkpoint(path)
    if newest is None:
        rule = "holds no checkpoint (no manifest.json, no step-NNNNNNNN folder)"
        if (path / "config.json").is_file():
            remedy = "it is a Hugging Face model: make a checkpoint of it with tools/hf_to_checkpoint.py first"
        elif runs := [p.parent for p in sorted(path.glob("*/checkpoints"))]:
            remedy = f"name a run in it: {', '.join(map(str, runs[:3]))}"
        raise CheckpointError(1, str(path), rule, remedy)
    return newest


class KnownCheckpoints:
    """Which checkpoints have been found readable or not, so that a run reads each manifest at most once.

    To read and check one takes more than a second where hundreds of ranks have written, and all of them wait for it at
    each save. What is remembered holds for the manifest as it was; one that has been written again is read again.
    """

    def __init__(self) -> None:
        self._found: dict[Path, tuple[tuple[int, ...], bool]] = {}

    def add(self, checkpoint: Path) -> None:
        """Remember one whose manifest has just been read, or written."""
        self._found[checkpoint] = (_signature(checkpoint), True)

    def is_readable(self, checkpoint: Path, note: Note) -> bool:
        """Whether its manifest can be read; what cannot is told to ``note``, once."""
        signature = _signature(checkpoint)
        known = self._found.get(checkpoint)
        if known is None or known[0] != signature:
            try:
                read_manifest(checkpoint)
                known = (signature, True)
            except CheckpointError as error:
                note(f"skipped checkpoint {checkpoint}: {error}")
                known = (signature, False)
            self._found[checkpoint] = known
        return known[1]


def _signature(checkpoint: Path) -> tuple[int, ...]:
    """What changes when a manifest is written again; nothing where there is none."""
    try:
        status = os.lstat(checkpoint / MANIFEST)
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def prune(folder: Path, keep_last: int, note: Note = say, known: KnownCheckpoints | None = None) -> None:
    """Remove what is older than the ``keep_last`` (at least two) newest readable checkpoints.

    A folder that cannot be removed is only noted: the save that calls this has succeeded.

    Args:
        known: remembers from one call to the next which checkpoints can be read.
    """
    known = KnownCheckpoints() if known is None else known
    wanted, readable = max(FEWEST_KEPT, keep_last), 0
    found = find_checkpoints(folder)
    if len(found) <= wanted:
        return  # nothing to remove, so nothing to read
    for position in reversed(range(len(found))):
        readable += known.is_readable(found[position], note)
        if readable == wanted:
            break
    else:
        return
    for path in found[:position]:
        try:
            remove_folder(path)
        except OSError as error:
            note(f"could not remove the old checkpoint {path}: {error.strerror or error}")
