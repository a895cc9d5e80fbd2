"""The output folder of a run: its lock, and what earlier starts have left in it.

::

    OUT/.lock          held by the one run that writes here, for as long as its process lives; empty
    OUT/.saved         says whether a checkpoint was ever committed: then a start that finds none has lost something
    OUT/checkpoints/   see checkpoint/folder.py
    OUT/*.aside-HEX    kept for people: damaged, or of steps that are computed again

A run takes the lock before it reads anything in the folder, so that two starts cannot find the same checkpoint and both
train on from it. It is two locks of the kernel, one on ``.lock`` and one on the folder itself, because a file can
be deleted and made again. Needs no torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.base.files import replace_file, set_aside, sync_folder
from megatron_hammer.base.locks import NO_LOCKS, take_lock
from megatron_hammer.base.reading import read_regular
from megatron_hammer.base.system import open_descriptors, sync
from megatron_hammer.checkpoint.folder import Damaged, clean_up, remove_left
from megatron_hammer.metrics.generations import GENERATIONS
from megatron_hammer.metrics.metrics_file import METRICS, copy_aside, read_lines
from megatron_hammer.metrics.starts import STARTS
from megatron_hammer.metrics.tracker_process import CLIENTS
from megatron_hammer.sampling.ledger import LEDGER, Ledger, ledger_bytes, read_ledger
from megatron_hammer.train.changes import FRESH
from megatron_hammer.train.evaluator import EVALUATIONS

LOCK, SAVED = ".lock", ".saved"
_NOTHING_SAVED = b"a run has begun in this folder and has no checkpoint yet\n"
_WRITTEN = {
    ".": "|".join(map(re.escape, (METRICS, STARTS, LEDGER, GENERATIONS, EVALUATIONS, SAVED))),
    "incidents": r"step-\d+[a-z0-9.-]*\.jsonl?",
    "trackers": rf"({'|'.join(CLIENTS)})\.json",
}
"""Folder in a run's -> names that the run itself writes there under a temporary name first. Other programs' are theirs:
report.html may be on its way while a run begins."""
_PROBE = re.compile(r"\.probe-[0-9a-f]{32}")
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


# ---- the lock -------------------------------------------------------------------------------------------------------


class LockedOutput:
    """The output folder, which no other run of this program writes to while this one lives."""

    def __init__(self, output: Path, folder: int, lock: int) -> None:
        self._output, self._folder, self._lock = output, folder, lock

    def check(self) -> None:
        """Make sure that folder and lock are still those that the run has taken: before each save.

        Raises:
            RefusedError: one of them was deleted, moved or replaced while the run went on.
        """
        for path, descriptor in ((self._output, self._folder), (self._output / LOCK, self._lock)):
            if not _is_still(path, descriptor):
                raise RefusedError(
                    87,
                    f"train.output={self._output}: {path}",
                    "was deleted, moved or replaced while the run went on: another run may write there",
                    "see who did that, bring the folder back if it was moved, then run the same command again",
                )


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether a path leads to what was opened there; the folder may be reached through a link."""
    try:
        found = path.lstat() if path.name == LOCK else path.stat()
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


@contextmanager
def only_writer(output: Path, is_new: bool = False) -> Iterator[LockedOutput]:
    """Make the folder, durably, and hold its lock, which ends with the process, however it ends.

    Args:
        is_new: the folder was not there when this run looked, and must not have come since.

    Raises:
        RefusedError: another process is writing to the same folder, or what bears the lock's name is no plain file.
    """
    if is_new and output.is_dir():
        raise _in_use(output)
    if not output.is_dir():
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            output.mkdir()
        except FileExistsError:
            if not output.is_dir():
                raise
            raise _in_use(output) from None  # another start was a moment faster
        sync_folder(output.parent)
    folder = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock, taken = _open_lock(output), None
        try:
            if not (_lock_folder(folder) and (taken := take_lock(lock, output / LOCK))):
                raise _in_use(output, is_ours=_is_open_here(lock))
            held = LockedOutput(output, folder, lock)
            held.check()
            sync(folder)
            yield held
        finally:
            if taken is not None:
                taken.give_up()
            os.close(lock)
    finally:
        os.close(folder)


def _open_lock(output: Path) -> int:
    """Open or make the lock's file, following no link and changing nothing in it."""
    path, flags = output / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    remedy = "remove it: a run makes its lock itself"
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError:
        if not (path.is_symlink() or path.is_dir()):
            raise
        what = "is a symbolic link" if path.is_symlink() else "is a folder"
        raise RefusedError(87, str(path), f"{what}, where the lock of the run belongs", remedy) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RefusedError(87, str(path), "is not a regular file, where the lock of the run belongs", remedy)
    return descriptor


def _lock_folder(descriptor: int) -> bool:
    """Lock the folder itself, where its file system can; the file's lock counts everywhere."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (*NO_LOCKS, errno.EBADF):  # NFS locks files that are open for writing
            raise
    return True


def _is_open_here(lock: int) -> bool:
    """Whether this very process has the lock's file open a second time, as a notebook that opens its run twice."""
    wanted = os.fstat(lock)
    for descriptor in open_descriptors():
        with contextlib.suppress(OSError):  # the listing's own descriptor is closed by now
            if descriptor != lock and os.path.samestat(os.fstat(descriptor), wanted):
                return True
    return False


def _in_use(output: Path, is_ours: bool = False) -> RefusedError:
    remedy = "wait for that run to end or choose another folder"
    if is_ours:
        remedy = "this very process holds it: close that run first (run.close()), or choose another folder"
    return RefusedError(81, f"train.output={output}", "is in use by another run", remedy)


def is_read_only(error: OSError) -> bool:
    """Whether a folder may not be written to: a finished run can still say that it is finished."""
    return error.errno in _READ_ONLY


# ---- what is there --------------------------------------------------------------------------------------------------


def clear_output(output: Path) -> list[str]:
    """Remove what programs that were killed have left; a line for each. For the holder of the lock."""
    lines = []
    for name, written in _WRITTEN.items():
        folder, left = output / name, re.compile(rf"({written})\.tmp-\w+")
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if left.fullmatch(path.name) or (folder == output and _PROBE.fullmatch(path.name)):
                lines.append(remove_left(path, "a run"))
    return lines + clean_up(output / "checkpoints")


def mark_saved(output: Path, step: int) -> None:
    """Remember that a checkpoint was committed here; only the first is written down. It never fails: that one counts.

    A disk that is full now says so at the next save, and the next start that finds the checkpoint tries again.
    """
    with contextlib.suppress(OSError):
        if _has_saved(output) is not True:
            replace_file(output / SAVED, f"step {step} was the first checkpoint of a run in this folder\n".encode())


def mark_begun(output: Path) -> None:
    """Remember that a run has begun here which has no checkpoint yet."""
    if _has_saved(output) is None:
        replace_file(output / SAVED, _NOTHING_SAVED)


def _has_saved(output: Path) -> bool | None:
    """Whether a run here has committed a checkpoint, as far as it was written down; None: by no run of ours."""
    try:
        return read_regular(output / SAVED, follow=False) != _NOTHING_SAVED
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return True  # something is there, and nobody begins anew by mistake


def refuse_traces(output: Path, save_interval_steps: int | None, accepted: Collection[str]) -> None:
    """Refuse to begin anew where a run has been that had checkpoints: they were deleted, or moved away.

    A run that was killed before its first checkpoint has left metrics only; where ``.saved`` is missing (an older
    version), these are of no more steps than lie between two.

    Raises:
        RefusedError: unless ``fresh`` is accepted.
    """
    traces, saved = [], _has_saved(output)
    if saved:
        traces.append(f"{output / SAVED} says that checkpoints were saved")
    last = _last_step(output / METRICS)
    if saved is not False and save_interval_steps is not None and last > save_interval_steps:
        traces.append(f"{output / METRICS} has steps up to {last}")
    if traces and FRESH not in accepted:
        raise RefusedError(
            86,
            f"train.output={output}",
            f"holds traces of a run ({'; '.join(traces)}), but {output / 'checkpoints'} holds no checkpoint",
            "bring the folders step-NNNNNNNN back, or choose another train.output; to begin anew here, --accept fresh",
        )


def _last_step(metrics: Path) -> int:
    """The last step of which there are metrics; 0 where there are none that can be read."""
    try:
        return read_lines(metrics).last_step
    except OSError:
        return 0


def put_in_order(
    output: Path,
    damaged: Sequence[Damaged],
    is_fresh: bool,
    resumed: int | None,
    taken_back: Sequence[Damaged] = (),
    rewinds: Ledger = (),
) -> list[str]:
    """Put aside what the run that now begins does not go on from; lines on that. For the holder of the lock.

    Args:
        damaged: checkpoints that were passed over.
        is_fresh: whether a new run takes the place of one whose checkpoints are lost.
        resumed: step of the checkpoint that it goes on from; None for a new run.
        taken_back: checkpoints of steps that a rewind has taken back.
        rewinds: the ledger that it goes on with.
    """
    lines = []
    found = [(one, "which is damaged") for one in damaged] + [(one, "which was taken back") for one in taken_back]
    for checkpoint, why in found:
        if os.path.lexists(checkpoint.path):
            kept = set_aside(checkpoint.path)
            lines.append(f"{checkpoint.path}, {why}, is kept as {kept.name}")
    ledger = output / LEDGER
    if is_fresh and os.path.lexists(ledger):
        lines.append(f"{ledger} is kept as {set_aside(ledger).name}")
    if rewinds and read_ledger(ledger) != rewinds:  # of a checkpoint that was copied here, or of another run
        replace_file(ledger, ledger_bytes(rewinds))
    metrics = output / METRICS
    if (damaged or is_fresh) and metrics.is_file() and not metrics.is_symlink():
        lines.append(f"{metrics} as it was is kept as {copy_aside(metrics).name}")
    if resumed is not None:
        mark_saved(output, resumed)
        return lines
    if is_fresh and os.path.lexists(output / SAVED):
        (output / SAVED).unlink()
    mark_begun(output)
    return lines
