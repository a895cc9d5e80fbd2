"""The exceptions for what a user or the machine can cause: each becomes one line on stderr and a documented exit code.

Every message has the same four parts, so that a reader always finds the same things in the same place::

    error[E205]: parallel.tensor_model_parallel_size=3 must divide model.num_attention_heads=32; use 1, 2, 4, 8 or 16
          |      what (field or file, with its value)  rule                                      remedy
          +-- exit code (2) and number within it (05)

Exit codes of every program of this project (``docs/errors.md`` lists the numbers):

    0 done | 2 usage or config | 3 data or input text | 4 checkpoint | 5 refused (fingerprint, certificate)
    6 disk or I/O | 7 a rank died | 8 a rank hung | 9 non-finite | 10 out of memory
    75 stopped by a signal, saved: run the same command again

What only a mistake in this code can cause is an ``assert``, and ends in a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        line = f"error[{self.code}]: {self.what} {self.rule}; {self.remedy}"
        return " ".join(line.split())  # a value with a line break must not break the one-line promise


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


class NonFiniteError(HammerError):
    """The loss or the gradient stayed infinite or NaN."""

    exit_code = 9


class MemoryShortage(HammerError):
    """The device or the machine has no memory left."""

    exit_code = 10


ERRORS_BY_EXIT_CODE: dict[int, type[HammerError]] = {
    cls.exit_code: cls
    for cls in (
        ConfigError,
        DataError,
        CheckpointError,
        RefusedError,
        DiskError,
        ParallelError,
        NonFiniteError,
        MemoryShortage,
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


def from_os_error(error: OSError, doing: str) -> DiskError:
    """A ``DiskError`` that says which path the operating system refused, and why."""
    path = error.filename if error.filename is not None else doing
    return DiskError(
        1,
        str(path),
        f"could not be used while {doing}: {error.strerror or error}",
        "free space or mend the permissions, then run the same command again",
    )


def from_exception(error: BaseException, who: str) -> HammerError | None:
    """The documented error that an exception of ``who`` (a rank, a program) stands for, or None for one of our own.

    torch is not imported: its out-of-memory error is known by name.
    """
    if isinstance(error, HammerError):
        return error
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return MemoryShortage(
            1,
            who,
            f"has no memory left ({text or type(error).__name__})",
            "lower train.micro_batch_size or data.seq_length, or use more ranks",
        )
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return from_os_error(error, f"{who} was running")
    return None
