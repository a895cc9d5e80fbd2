"""The exceptions for what a user or the machine can cause: each becomes one line on stderr and a documented exit code.

Every message has the same four parts, so that a reader always finds the same things in the same place::

    error[E205]: parallel.tensor_model_parallel_size=3 must divide model.num_attention_heads=32; use 1, 2, 4, 8 or 16
          |      what (field or file, with its value)  rule                                      remedy
          +-- exit code (2) and number within it (05)

Exit codes of every program of this project (``docs/errors.md`` lists the numbers):

    0 done | 2 usage or config | 3 data or input text | 4 checkpoint | 5 refused (fingerprint, certificate)
    6 disk or I/O | 7 a rank died | 8 a rank hung | 9 non-finite | 10 out of memory | 11 unequal bits
    75 stopped by a signal, saved: run the same command again

What only a mistake in this code can cause is an ``assert``, and ends in a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping
from typing import Any

from megatron_hammer.base import system
from megatron_hammer.base.shipped import OF_A_WHEEL

EXIT_STOPPED_BY_SIGNAL = 75


class HammerError(Exception):
    """Base of all mistakes that end a program with one line; never raised itself.

    Args:
        number: which error of its class, 1 to 99; with the exit code it makes the code ``Exyy``.
        what: the field or file, with the value found: ``data.seq_length=0`` or ``corpus.jsonl:17``.
        rule: what is wrong, as the predicate of ``what``: ``must be at least 1``.
        remedy: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, number: int, what: str, rule: str, remedy: str) -> None:
        super().__init__(number, what, rule, remedy)
        self.number, self.what, self.rule, self.remedy = number, what, rule, remedy

    @property
    def code(self) -> str:
        """``E205``: exit code 2, number 05."""
        return f"E{self.exit_code}{self.number:02d}"

    def __str__(self) -> str:
        line = f"error[{self.code}]: {shortened(self.what)} {shortened(self.rule)}; {shortened(self.remedy)}"
        return " ".join(line.split())  # a value with a line break must not break the one-line promise

    def _render_traceback_(self) -> list[str]:
        """What a notebook (IPython) shows in place of a traceback: the line."""
        return [str(self)]


_LONGEST_PART = 1200
"""Characters of one part of a message: four long paths, or the names of all settings of a group."""


def shortened(text: str) -> str:
    """A part of a message, with the middle of an overlong value left out, and nothing that a terminal would obey."""
    if (over := len(text) - _LONGEST_PART) > 0:
        half = _LONGEST_PART // 2
        text = f"{text[:half]}... ({over:,} characters left out) ...{text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c.isspace() else c.encode("unicode_escape").decode() for c in text)


class UnfitFile(OSError):
    """A path that leads to something else than a regular file of a size that can be meant (``reading.open_regular``).

    An ``OSError``, so that whoever reads files says it in the words that it has for one that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], why: str, remedy: str) -> None:
        super().__init__(errno.EINVAL, why, os.fspath(path))
        self.remedy = remedy

    def __str__(self) -> str:
        return str(self.strerror)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system answers where a file cannot grow."""


class WriteFailed(OSError):
    """An error of writing that names its file, and the bytes that it was to have (``files.writing``)."""

    def __init__(self, error: OSError, path: str | os.PathLike[str], needed: int) -> None:
        super().__init__(error.errno, error.strerror or str(error), os.fspath(path))
        self.needed = needed


class ConfigError(HammerError):
    """Bad usage or configuration."""

    exit_code = 2


class DataError(HammerError):
    """Missing, empty or malformed input text, corpus or indexed dataset."""

    exit_code = 3


class CheckpointError(HammerError):
    """Missing, incomplete, damaged or ill-fitting checkpoint or Hugging Face folder."""

    exit_code = 4


class RefusedError(HammerError):
    """Everything is readable, but two things that must belong together do not."""

    exit_code = 5


class DiskError(HammerError):
    """The operating system refused a read or write (disk full, permission)."""

    exit_code = 6


class ParallelError(HammerError):
    """A rank died."""

    exit_code = 7


class HangError(HammerError):
    """A rank does nothing any more, and the others wait for it."""

    exit_code = 8


class NonFiniteError(HammerError):
    """The loss or the gradient stayed infinite or NaN."""

    exit_code = 9


class MemoryShortage(HammerError):
    """The device or the machine has no memory left."""

    exit_code = 10


class DriftError(HammerError):
    """Bits differ that must be the same: of what ranks hold in common, or of what is computed twice."""

    exit_code = 11


ERRORS_BY_EXIT_CODE: dict[int, type[HammerError]] = {
    cls.exit_code: cls
    for cls in (
        ConfigError,
        DataError,
        CheckpointError,
        RefusedError,
        DiskError,
        ParallelError,
        HangError,
        NonFiniteError,
        MemoryShortage,
        DriftError,
    )
}


def to_fields(error: HammerError) -> dict[str, int | str]:
    """What ``from_fields`` needs to raise the same error in another process."""
    return {
        "exit_code": error.exit_code,
        "number": error.number,
        "what": error.what,
        "rule": error.rule,
        "remedy": error.remedy,
    }


def from_fields(fields: Mapping[str, Any]) -> HammerError:
    """The inverse of ``to_fields``."""
    cls = ERRORS_BY_EXIT_CODE[int(fields["exit_code"])]
    return cls(int(fields["number"]), fields["what"], fields["rule"], fields["remedy"])


# What a user can do about a refusal of the operating system, by errno.
_OS_REMEDIES: dict[int, str] = {
    errno.ENOSPC: "free space there, then run the same command again",
    errno.EDQUOT: "free space within your quota, then run the same command again",
    errno.EFBIG: "write to a file system (or raise `ulimit -f`) that takes files of this size",
    errno.EACCES: "mend its permissions, or name a path that you may use",
    errno.EPERM: "mend its permissions, or name a path that you may use",
    errno.EROFS: "name a path on a file system that can be written to",
    errno.ENOENT: "check the path: a file or one of its folders is not there",
    errno.ENOTDIR: "check the path: a part of it is a file, not a folder",
    errno.EISDIR: "name a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EINVAL: "check the path and whether its file system can do this",
    errno.ELOOP: "mend the symbolic links, which lead in a circle",
    errno.EEXIST: "move away what is there, or name another path",
    errno.ENOTEMPTY: "move away what is there, or name another path",
    errno.EXDEV: "keep both paths on one file system",
    errno.EBUSY: "end the program that uses it, then run the same command again",
    errno.ETXTBSY: "end the program that uses it, then run the same command again",
    errno.EMFILE: "raise the limit of open files of this process (`ulimit -n`)",
    errno.ENFILE: "raise the limit of open files of this machine (fs.file-max), or end other programs",
    errno.EAGAIN: "raise the limit of processes and threads (`ulimit -u`), or end other programs",
    errno.EIO: "the device or its connection is failing: see dmesg, and copy what can still be read",
    errno.ENXIO: "the device is gone: see dmesg",
    errno.ENODEV: "use a file system that can map files, or connect the device again",
    errno.ESTALE: "the network file system lost the file: mount it again, then run the same command again",
    errno.ENOTCONN: "mount the network file system again, then run the same command again",
    errno.ENOLCK: "the file system has no locks (see its mount options): use another one",
    errno.ENOSYS: "use a file system that can do this",
    errno.EOPNOTSUPP: "use a file system that can do this",
}
_OS_REMEDY = "see to the cause that the system names, then run the same command again"
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


def os_remedy(error: OSError) -> str:
    """What a user can do about what the operating system refused."""
    if isinstance(error, UnfitFile):
        return error.remedy
    return _OS_REMEDIES.get(error.errno or 0, _OS_REMEDY)


def from_os_error(
    error: OSError, doing: str, who: str | None = None, place: str | os.PathLike[str] | None = None
) -> DataError | DiskError | MemoryShortage:
    """What the operating system refused, why, and what helps against that.

    Args:
        doing: what was under way, such as "reading X" or "rank 0 was running".
        who: the subject where the error names no file; None: ``doing`` itself.
        place: a path on the file system that was in use, where the error names none.
    """
    if isinstance(error, UnfitFile):
        return DataError(99, str(error.filename), f"cannot be read: {error}", error.remedy)
    why = error.strerror or " ".join(str(error).split()) or type(error).__name__
    paths = [os.fsdecode(p) for p in (error.filename, error.filename2) if isinstance(p, str | bytes | os.PathLike)]
    if error.errno == errno.ENOMEM:
        return MemoryShortage(
            1,
            paths[0] if paths else who or doing,
            f"found no memory ({why})",
            "use less memory or more ranks; where memory is free, raise vm.max_map_count and `ulimit -v`",
        )
    used = paths[0] if paths else place
    if error.errno in _OUT_OF_SPACE and used is not None and (free := _free_bytes(used)) is not None:
        why += f", {free / 1e6:,.1f} MB free"
    if isinstance(error, WriteFailed) and error.errno in FULL:
        why += f", {error.needed:,} bytes needed for this file"
    remedy = os_remedy(error)
    if not paths:
        return DiskError(1, who or doing, f"failed: {why}", remedy.replace("free space there", "free disk space"))
    return DiskError(1, " -> ".join(paths), f"could not be used while {doing}: {why}", remedy)


def _free_bytes(path: str | os.PathLike[str]) -> int | None:
    """What a user may still write on the file system of a path that may not exist; None where that is unknown."""
    folder = os.path.abspath(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


NO_TENSOR_MEMORY = (
    "can't allocate memory",  # torch's allocator on a CPU
    "CUDA error: out of memory",  # what is not of torch's allocator on a GPU: a context, a graph, a module of kernels
    "CUBLAS_STATUS_ALLOC_FAILED",
    "'out of memory'",  # NCCL's "Cuda failure 2 'out of memory'"
)


def lacks_tensor_memory(error: BaseException) -> bool:
    """Whether torch, or a library beside it, found no memory on a GPU or a CPU.

    torch is not imported: its own error is known by name. Others raise whatever they raise, and say it in the text.
    """
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or any(words in text for words in NO_TENSOR_MEMORY)


def from_exception(error: BaseException, who: str) -> HammerError | None:
    """The documented error that an exception of ``who`` (a rank, a program) stands for, or None for one of our own."""
    if isinstance(error, HammerError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or lacks_tensor_memory(error):
        return MemoryShortage(
            1,
            who,
            f"has no memory left ({text or type(error).__name__})",
            "lower train.micro_batch_size or data.seq_length, or use more ranks",
        )
    if isinstance(error, ImportError) and (name := _module_of(error)) and not name.startswith("megatron_hammer"):
        return _from_import_error(error, name, who)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return from_os_error(error, f"{who} was running", who)
    return None


def _module_of(error: ImportError) -> str:
    """The module that was not found, or that said that it cannot be loaded; "" where that is unknown."""
    name, place = error.name or "", error.__traceback__
    while not error.name and place is not None:
        name, place = str(place.tb_frame.f_globals.get("__name__", "")), place.tb_next
    return name


def _from_import_error(error: ImportError, name: str, who: str) -> ConfigError:
    """A library that is not there, or that cannot be loaded: it belongs to another Python, or is half installed."""
    pip = f"{sys.executable} -m pip install"
    if isinstance(error, ModuleNotFoundError):
        return ConfigError(
            51, f"the module {name}", f"is not there for {sys.executable}, which runs {who}",
            f"install what is missing: {pip} megatron_hammer" if OF_A_WHEEL else
            "use the Python that has all: source .venv/bin/activate (bash tools/make_venv.sh makes it)",
        )  # fmt: skip
    foreign = [f"{key}={value}" for key in ("PYTHONPATH", "LD_LIBRARY_PATH") if (value := os.environ.get(key))]
    return ConfigError(
        51, f"the module {name}", f"cannot be loaded by {sys.executable} ({' '.join(str(error).split())[:200]})",
        (f"leave out what belongs to another Python or system: {', '.join(foreign)}; or " if foreign else "")
        + (f"install it anew: {pip} --force-reinstall {_package_of(name)}" if OF_A_WHEEL else
           "make the environment anew: rm -rf .venv, then bash tools/make_venv.sh"),
    )  # fmt: skip


def _package_of(module: str) -> str:
    """The package that pip knows a module by: PyYAML for ``yaml``."""
    import importlib.metadata

    top = module.partition(".")[0]
    return next(iter(importlib.metadata.packages_distributions().get(top, ())), top)


def require_linux(what: str, why: str, instead: str) -> None:
    """Refuse what only Linux can do, before anything has begun (``base/system.py``).

    Args:
        what: the setting or option that asks for it, with its value.
        why: what of Linux it needs.
        instead: what works here.

    Raises:
        ConfigError: E292 this is another system.
    """
    if not system.IS_LINUX:
        name = "macOS" if sys.platform == "darwin" else sys.platform
        raise ConfigError(92, what, f"cannot run on {name}: it needs {why}, which Linux alone has", instead)
