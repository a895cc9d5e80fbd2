"""The folders that checkpoints lie in: their names, which ones there are, and which of them is meant.

::

    RUN/checkpoints/
        step-00000100/               a checkpoint: complete by construction
        step-00000200.tmp-5f0c.../   being written, or left by a crash: never loaded, removed at the next start
        step-00000100.old-91ab.../   set aside while a step is saved again; counts if step-00000100 is not there
        step-00000100.aside-77d0...  damaged, or in the way of a save: kept for people to look at, never loaded

A folder becomes a checkpoint by one rename after everything in it was fsynced (``base/files.py``). The newest
checkpoint is found by looking at what is there; no file states it that could disagree. A run looks with
``search_checkpoints``, which passes over what is damaged and says so; tools that are given a folder use
``open_checkpoint``.

Needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.base.errors import CheckpointError, HammerError
from megatron_hammer.base.files import exchange_folder, sync_folder
from megatron_hammer.base.paths import missing_remedy, what_is
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.manifest import (
    MANIFEST,
    STEP_NAME,
    Manifest,
    check_files,
    checked_tokenizer_folder,
    read_manifest,
)
from megatron_hammer.checkpoint.tensor_files import TensorFileReader

_COMMITTED = re.compile(rf"(?:{STEP_NAME})(?:\.old-[0-9a-f]{{16}})?")
_NEVER_COMMITTED = re.compile(rf"(?:{STEP_NAME})\.tmp-[0-9a-f]+")
_LEFT_BEHIND = re.compile(rf"(?P<target>{STEP_NAME})\.(?P<kind>tmp|old)-\w+")

# Numbers of CheckpointError that say that a checkpoint is not as it was saved. The others say that it is not the right
# one (of another version, of another model), where an older one is no remedy.
DAMAGE = frozenset({3, 4, 6, 7, 8, 9, 10, 11, 15})

Note = Callable[[str], None]
"""Called with each line that the user should read."""


def step_name(step: int) -> str:
    """``step-00000100``."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that the name of a checkpoint's folder, or of one that is set aside or staged, says; else 0."""
    found = re.match(STEP_NAME, checkpoint.name)
    return int(found[1]) if found else 0


def run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in; None of one that lies alone."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None


def _folder_of(run_or_folder: str | Path) -> Path:
    """A run's folder of checkpoints, or the folder itself."""
    folder = Path(run_or_folder) / "checkpoints"
    return folder if folder.is_dir() else Path(run_or_folder)


def find_checkpoints(run_or_folder: str | Path) -> list[Path]:
    """Committed checkpoints of a run (or of its ``checkpoints`` folder), oldest first; none is opened."""
    folder = _folder_of(run_or_folder)
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
        match = _COMMITTED.fullmatch(path.name)  # "step-N.old-..." comes before "step-N", which then wins
        if match and path.is_dir() and not path.is_symlink():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def kept_aside(run_or_folder: str | Path) -> list[Path]:
    """What was damaged, or in the way of a save, and was kept for people to look at."""
    folder = _folder_of(run_or_folder)
    return sorted(folder.glob("step-*.aside-*")) if folder.is_dir() else []


def readable_checkpoints(run_or_folder: str | Path, note: Note = say) -> Iterator[Manifest]:
    """Manifests of the committed checkpoints, newest first; what cannot be read is skipped and reported to ``note``."""
    for path in reversed(find_checkpoints(run_or_folder)):
        try:
            yield read_manifest(path)
        except CheckpointError as error:
            note(f"skipped checkpoint {path}: {error}")


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that was passed over."""

    path: Path
    step: int
    """As its name says."""
    reason: str
    """The line of the error: it names the file, and the tensor where one is concerned."""


@dataclass(frozen=True)
class FoundCheckpoints:
    """What a run found in its folder of checkpoints."""

    newest: Manifest | None
    """Of the newest one that is not damaged, as far as that shows before its tensors are read; None without any."""
    damaged: tuple[Damaged, ...] = ()
    """All newer ones, the newest first."""


def is_damage(error: HammerError) -> bool:
    """Whether an error says that a checkpoint is not as it was saved, so that an older one is the remedy."""
    return isinstance(error, CheckpointError) and error.number in DAMAGE


def search_checkpoints(checkpoints: Path, known_damage: Mapping[str, str] | None = None) -> FoundCheckpoints:
    """Look for the checkpoint to go on from: the newest whose manifest, tokenizer and sizes of files are as saved.

    Links and files that have the name of a step are damaged checkpoints too: whoever put them there moved the folder,
    and to go on without it in silence would hide that. The tensors are verified when they are loaded.

    Args:
        checkpoints: the folder of a run's checkpoints; nothing in it is changed.
        known_damage: name -> error of those that were found damaged when they were loaded.

    Raises:
        CheckpointError: the newest is intact, but cannot be used (one of another version).
    """
    if os.path.lexists(checkpoints) and not checkpoints.is_dir():
        rule, remedy = (
            "is not a folder (a file, or a link that leads nowhere)",
            "bring back what it led to, or remove it",
        )
        raise CheckpointError(1, str(checkpoints), rule, remedy)
    damaged: list[Damaged] = []
    for path, step in reversed(_candidates(checkpoints)):
        reason = (known_damage or {}).get(path.name)
        if reason is None:
            try:
                return FoundCheckpoints(_quickly_checked(path), tuple(damaged))
            except CheckpointError as error:
                if not is_damage(error):
                    raise
                reason = str(error)
        damaged.append(Damaged(path, step, reason))
    return FoundCheckpoints(None, tuple(damaged))


def _candidates(checkpoints: Path) -> list[tuple[Path, int]]:
    """Whatever has the name of a committed step, with the step, oldest first."""
    found: dict[int, Path] = {}
    for path in sorted(checkpoints.iterdir(), reverse=True) if checkpoints.is_dir() else ():
        match = _COMMITTED.fullmatch(path.name)  # "step-N.old-..." comes before "step-N", which then wins
        if match and (".old-" not in path.name or (path.is_dir() and not path.is_symlink())):
            found[int(match[1])] = path
    return [(found[step], step) for step in sorted(found)]


def _quickly_checked(path: Path) -> Manifest:
    """The manifest of a checkpoint, after everything but the content of its tensors has been checked."""
    if path.is_symlink() or not path.is_dir():
        rule = "is a symbolic link" if path.is_symlink() else "is not a folder"
        raise CheckpointError(8, str(path), rule, "put the folder of the checkpoint itself there")
    try:
        manifest = read_manifest(path)
        check_files(manifest)
        _check_a_slice(manifest)
        checked_tokenizer_folder(manifest)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise CheckpointError(8, str(path), "cannot be read: Input/output error", "suspect the disk") from None
    return manifest


def _check_a_slice(manifest: Manifest) -> None:
    """Compare one small slice with its hash: the manifest of another run fits in form, and would be judged as a change.

    A moment is taken where there is one: no two runs have the same, while norms may have kept their first values.
    """
    file = next((file for file in manifest.files if file.slices), None)
    if file is None:
        return
    saved = min(file.slices, key=lambda s: (manifest.tensors[s.tensor].kind == "weight", math.prod(s.shape)))
    key = manifest.key_of(saved)
    with TensorFileReader(manifest.folder / file.name, file.size, file.header_hash) as reader:
        if key not in reader.tensors or reader.hash_of(key) != saved.hash:
            rule = f"is not what {MANIFEST} there says: it has changed, or the manifest is that of another checkpoint"
            raise CheckpointError(11, f"{reader.path}: {key}", rule, "restore the file or use another checkpoint")


def remove_left(path: Path, by: str) -> str:
    """Remove what a program that was cut short has left, where the system lets us; a line on it."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:  # a mount point in it, say: nobody ever loads it
        return f"could not remove {path}, left by {by} that was cut short: {error.strerror or error}"
    return f"cleaned up {path}, left by {by} that was cut short"


def clean_up(checkpoints: Path) -> list[str]:
    """Remove what saves that were cut short have left; bring back, or keep aside, what they were replacing.

    Only for the one program that writes there.

    Returns:
        a line for each.
    """
    lines = []
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else ():
        match = _LEFT_BEHIND.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == "old":
            target = checkpoints / match["target"]
            if os.path.lexists(target):
                aside = path.with_name(path.name.replace(".old-", ".aside-"))
                os.rename(path, aside)
                lines.append(f"kept as {aside} what a save has replaced")
            else:
                os.rename(path, target)
                lines.append(f"brought back {target}, which a save that was cut short was replacing")
            continue
        lines.append(remove_left(path, "a save"))
    return lines


def publish_checkpoint(staging: Path, target: Path) -> Path | None:
    """Rename a finished staging folder to the checkpoint ``target``, durably. What is in the way is kept aside.

    At every moment the old or the new is there. Once the new one has its name, and that is durable, nothing fails.

    Returns:
        where what was in the way is now.
    """
    if (old := exchange_folder(staging, target)) is None:
        return None
    aside = target.with_name(old.name.replace(".old-", ".aside-"))
    with contextlib.suppress(OSError):  # then the next start does it
        os.rename(old, aside)
        sync_folder(target.parent)
    return aside


def newest_checkpoint(run_or_folder: str | Path, note: Note = say) -> Manifest | None:
    """The newest committed checkpoint with a readable manifest; None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none is readable (starting afresh would hide the loss).
    """
    newest = next(readable_checkpoints(run_or_folder, note), None)
    if newest is None and (found := find_checkpoints(run_or_folder)):
        raise _none_readable(found)
    return newest


def _none_readable(found: list[Path]) -> CheckpointError:
    rule = f"has {len(found)} checkpoints, none with a readable manifest"
    return CheckpointError(3, str(found[-1].parent), rule, "restore one, or move them away to start afresh")


def checkpoint_of_step(run_or_folder: str | Path, step: int) -> Path:
    """The checkpoint of one step of a run (or of its ``checkpoints`` folder).

    Raises:
        CheckpointError: E401 there is none of this step.
    """
    found = find_checkpoints(run_or_folder)
    for path in found:
        if step_of(path) == step:
            return path
    raise CheckpointError(1, f"{run_or_folder}: step {step}", "has no checkpoint", _steps_there(found))


def _steps_there(found: list[Path]) -> str:
    """A remedy: the steps that there are, the newest six of them."""
    steps = [str(step_of(path)) for path in found]
    if not steps:
        return "name a run that has checkpoints"
    return f"choose a step that is there: {'... ' if len(steps) > 6 else ''}{', '.join(steps[-6:])}"


def _missing_remedy(path: Path) -> str:
    """What a checkpoint's path that is not there probably means."""
    match = re.match(r"(?:step-?)?(\d+)$", path.name)  # step-00000100, step-100, 100; its folder left out, perhaps
    found = find_checkpoints(path.parent) if match else []
    same = [p for p in found if match and step_of(p) == int(match[1])]
    if same:
        return f"did you mean {same[0]}?"
    if path.is_file() and (
        of := [p for p in path.parents[:4] if what_is(p) in ("a checkpoint", "the folder of a run")]
    ):
        return f"did you mean {of[0]}?"
    return _steps_there(found) if found else missing_remedy(path, "name a checkpoint or the output folder of a run")


def open_checkpoint(checkpoint_or_run: str | Path, step: int | None = None) -> Manifest:
    """The checkpoint that a user means: the folder itself, or one of a run or of its ``checkpoints`` folder.

    Args:
        step: of a run, the checkpoint of this step; None: its newest.

    Raises:
        CheckpointError: there is none, or its manifest cannot be read.
    """
    path = Path(checkpoint_or_run) if step is None else checkpoint_of_step(checkpoint_or_run, step)
    if not path.is_dir() or _NEVER_COMMITTED.fullmatch(path.name):
        raise _no_checkpoint(path)
    if os.path.lexists(path / MANIFEST):
        return read_manifest(path)
    newest = newest_checkpoint(path)
    if newest is None:
        raise _holds_none(path)
    return newest


def _no_checkpoint(path: Path) -> CheckpointError:
    if path.is_dir():
        remedy = "name a committed step-NNNNNNNN folder"
        return CheckpointError(2, str(path), "was never committed and may be incomplete", remedy)
    rule = "is a file, not a folder" if path.exists() else "is not there"
    return CheckpointError(1, str(path), rule, _missing_remedy(path))


def _holds_none(folder: Path) -> CheckpointError:
    remedy = "name a checkpoint or the output folder of a run"
    if (folder / "config.json").is_file():
        remedy = "it is a Hugging Face model: make a checkpoint of it with tools/hf_to_checkpoint.py first"
    elif runs := [p.parent for p in sorted(folder.glob("*/checkpoints"))]:
        remedy = f"name a run in it: {', '.join(map(str, runs[:3]))}"
    return CheckpointError(1, str(folder), "holds no checkpoint (no manifest.json, no step-NNNNNNNN folder)", remedy)
