"""The folders that checkpoints lie in: their names, how one comes to be there, and which ones there are.

::

    RUN/checkpoints/
        step-00000100/               a checkpoint: complete by construction
        step-00000200.tmp-5f0c.../   staging: being written, or left by a crash; never loaded, removed at the next start
        step-00000100.old-91ab.../   set aside while a step is saved again; counts if step-00000100 is not there

A folder becomes a checkpoint by one rename after everything in it was fsynced. The newest checkpoint is found by
looking at what is there; no file states it that could disagree.

Needs no torch.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.files import sync_folder
from megatron_hammer.checkpoint.manifest import MANIFEST, STEP_NAME, Manifest, read_manifest

_STEP_LEFTOVER = re.compile(r"(step-\d{8,12})\.(tmp|old)-[0-9a-f]+")

FEWEST_KEPT = 2  # so that a checkpoint that turns out damaged is never the only one

Note = Callable[[str], None]


def print_note(text: str) -> None:
    """Tell the user something on stderr."""
    print(text, file=sys.stderr, flush=True)


def step_name(step: int) -> str:
    """``step-00000100``."""
    return f"step-{step:08d}"


def new_id() -> str:
    """Random hex digits that tell one staging folder from another."""
    return secrets.token_hex(8)


def staging_folder(target: Path, identity: str) -> Path:
    """Where what will become ``target`` is put together: beside it, so that a rename moves it."""
    return target.with_name(f"{target.name}.tmp-{identity}")


def publish(staging: Path, target: Path) -> None:
    """Rename ``staging`` to ``target``, durably. What is in the way is set aside first and removed last.

    At every moment the old or the new content is there, under its name or as ``.old-``.
    """
    sync_folder(staging)
    old = target.with_name(f"{target.name}.old-{new_id()}") if os.path.lexists(target) else None
    if old is not None:
        os.rename(target, old)
    try:
        os.rename(staging, target)
    except OSError:
        if old is not None:
            os.rename(old, target)
        raise
    sync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def remove_folder(folder: Path) -> None:
    """Remove a committed folder so that a crash half-way leaves a staging name, not half a checkpoint."""
    doomed = staging_folder(folder, new_id())
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path, pattern: re.Pattern[str] = _STEP_LEFTOVER) -> list[str]:
    """Remove what crashed programs left in ``folder``; bring back what was set aside and not replaced.

    Only for the one program that writes there.

    Args:
        pattern: of leftover names; its groups are the target's name and ``tmp`` or ``old``.

    Returns:
        the names found, for a note.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        found.append(path.name)
        target = folder / match[1]
        if match[2] == "old" and not os.path.lexists(target):
            os.rename(path, target)
        else:
            shutil.rmtree(path)
    return found


def find_checkpoints(run_or_folder: str | Path) -> list[Path]:
    """Committed checkpoints of a run (or of its ``checkpoints`` folder), oldest first; none is opened."""
    folder = Path(run_or_folder)
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir():
        return []
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True):  # "step-N.old-..." comes before "step-N", which then wins
        match = STEP_NAME.fullmatch(path.name) or _STEP_LEFTOVER.fullmatch(path.name)
        if match and ".tmp-" not in path.name and path.is_dir() and not path.is_symlink():
            found[int(path.name[5:].partition(".")[0])] = path
    return [found[step] for step in sorted(found)]


def readable_checkpoints(run_or_folder: str | Path, note: Note = print_note) -> Iterator[Manifest]:
    """Manifests of the committed checkpoints, newest first; what cannot be read is skipped and told to ``note``."""
    for path in reversed(find_checkpoints(run_or_folder)):
        try:
            yield read_manifest(path)
        except CheckpointError as error:
            note(f"skipped checkpoint {path}: {error}")


def latest_checkpoint(run_or_folder: str | Path, note: Note = print_note) -> Path | None:
    """The newest committed checkpoint with a readable manifest; None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is readable (starting afresh would hide the loss).
    """
    for manifest in readable_checkpoints(run_or_folder, note):
        return manifest.folder
    found = find_checkpoints(run_or_folder)
    if found:
        raise CheckpointError(
            3,
            str(found[-1].parent),
            f"has {len(found)} checkpoints, none with a readable manifest",
            "restore one, or move them away to start afresh",
        )
    return None


def resolve_checkpoint(checkpoint_or_run: str | Path) -> Path:
    """The checkpoint folder that a user means: itself, or the latest of a run or of its ``checkpoints`` folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(checkpoint_or_run)
    if not path.is_dir():
        raise CheckpointError(1, str(path), "is not a folder", "name a checkpoint or the output folder of a run")
    if ".tmp-" in path.name and _STEP_LEFTOVER.fullmatch(path.name):
        raise CheckpointError(
            2, str(path), "was never committed and may be incomplete", "name a committed step-NNNNNNNN folder"
        )
    if os.path.lexists(path / MANIFEST):
        return path
    latest = latest_checkpoint(path)
    if latest is None:
        raise CheckpointError(
            1,
            str(path),
            "holds no checkpoint (no manifest.json, no step-NNNNNNNN folder)",
            "name a checkpoint or the output folder of a run",
        )
    return latest


def prune(folder: Path, keep_last: int, note: Note = print_note) -> None:
    """Remove what is older than the ``keep_last`` (at least two) newest readable checkpoints.

    A folder that cannot be removed is only noted: the save that calls this has succeeded.
    """
    readable = [m.folder for m in readable_checkpoints(folder, note)]
    wanted = max(FEWEST_KEPT, keep_last)
    if len(readable) <= wanted:
        return
    found = find_checkpoints(folder)
    for path in found[: found.index(readable[wanted - 1])]:
        try:
            remove_folder(path)
        except OSError as error:
            note(f"could not remove the old checkpoint {path}: {error.strerror or error}")
