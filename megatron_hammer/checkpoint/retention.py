"""Which checkpoints of a run are kept when a newer one has been committed, and which are removed.

::

    step-00000500   keep_every_steps=500: never removed
    step-00000800   pinned_steps=[800]: never removed
    step-00000900   removed, once two newer ones count
    step-00001000   counts        keep_last=2
    step-00001100   counts

A checkpoint counts if it is *sound*: this run has written it, reading every byte back, or it was complete when this run
found it (a manifest that can be read, all files of the sizes that it says, none changed after it was committed), and no
file of it has been touched since. One that does not count pushes nothing out, so that a damaged one is never among the
last that are left. The last two that count are never removed. Needs no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.files import remove_folder
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.folder import Note, find_checkpoints, step_of
from megatron_hammer.checkpoint.manifest import MANIFEST, Manifest, read_manifest

FEWEST_KEPT = 2  # so that a checkpoint that turns out damaged is never the only one
TENSOR_FILE = ".safetensors"
CLOCK_SECONDS = 2.0  # by which clocks of nodes that write into one folder may differ


@dataclass(frozen=True)
class Retention:
    """What is kept beside the newest one."""

    keep_last: int = FEWEST_KEPT
    """Newest sound checkpoints, the new one included; never fewer than two."""
    keep_every_steps: int | None = None
    """All of a multiple of so many steps."""
    pinned_steps: tuple[int, ...] = ()
    """These."""

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept however old it is."""
        every = self.keep_every_steps
        return step in self.pinned_steps or (every is not None and step % every == 0)


LAST_TWO = Retention()


class KnownCheckpoints:
    """Which checkpoints have been found sound or not, so that a run reads each manifest at most once.

    To read and check one takes more than a second where hundreds of ranks have written, and all of them wait for it at
    each save. What is remembered holds as long as the files are as they were.
    """

    def __init__(self) -> None:
        self._found: dict[Path, tuple[tuple[object, ...], bool]] = {}

    def add(self, checkpoint: Path) -> None:
        """Remember one that has just been written and read back, or loaded."""
        self._found[checkpoint] = (_signature(checkpoint), True)

    def is_sound(self, checkpoint: Path, note: Note, closely: bool = True) -> bool:
        """Whether it counts; why one does not is told to ``note``, once.

        Args:
            closely: look at each of its files again, not at its manifest only: a question to the file system for each.
        """
        known = self._found.get(checkpoint)
        signature = _signature(checkpoint) if closely or known is None else (_stamp(checkpoint / MANIFEST),)
        if known is None or known[0][: len(signature)] != signature:
            try:
                _check_complete(read_manifest(checkpoint), was_known=known is not None)
                sound = True
            except CheckpointError as error:
                note(f"skipped checkpoint {checkpoint}: {error}")
                sound = False
            known = (_signature(checkpoint), sound)
            self._found[checkpoint] = known
        return known[1]


def _check_complete(manifest: Manifest, was_known: bool) -> None:
    """Raise ``CheckpointError`` unless all files are there as they were when the checkpoint was committed."""
    remedy = "see what tools/inspect_checkpoint.py verify says of it"
    committed = os.stat(manifest.folder / MANIFEST).st_mtime
    for file in manifest.files:
        path = manifest.folder / file.name
        try:
            status = os.lstat(path)
        except OSError as error:
            raise CheckpointError(8, str(path), f"is missing ({error.strerror})", remedy) from None
        if status.st_size != file.size:
            raise CheckpointError(9, f"{path} of {status.st_size} bytes", f"must have {file.size}", remedy)
        if was_known or status.st_mtime > committed + CLOCK_SECONDS:
            raise CheckpointError(11, str(path), "was touched after the checkpoint was committed", remedy)


def _signature(checkpoint: Path) -> tuple[object, ...]:
    """What changes when a file is written again: the manifest's comes first."""
    try:
        names = sorted(entry.name for entry in os.scandir(checkpoint) if entry.name.endswith(TENSOR_FILE))
    except OSError:
        names = []
    return (_stamp(checkpoint / MANIFEST), *((name, _stamp(checkpoint / name)) for name in names))


def _stamp(path: Path) -> tuple[int, ...]:
    """Of one file; nothing where there is none."""
    try:
        status = os.lstat(path)
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def prune(folder: Path, retention: Retention, note: Note = say, known: KnownCheckpoints | None = None) -> None:
    """Remove what is older than the newest sound checkpoints and is not kept for another reason.

    A folder that cannot be removed is only noted: the save that calls this has succeeded.

    Args:
        known: remembers from one call to the next which checkpoints are sound.
    """
    known = KnownCheckpoints() if known is None else known
    wanted, sound = max(FEWEST_KEPT, retention.keep_last), 0
    found = find_checkpoints(folder)
    if len(found) <= wanted:
        return  # nothing to remove, so nothing to look at
    for position in reversed(range(len(found))):
        sound += known.is_sound(found[position], note, closely=sound < FEWEST_KEPT)
        if sound == wanted:
            break
    else:
        return
    for path in found[:position]:
        if retention.keeps(step_of(path)):
            continue
        try:
            remove_folder(path)
        except OSError as error:
            note(f"could not remove the old checkpoint {path}: {error.strerror or error}")
