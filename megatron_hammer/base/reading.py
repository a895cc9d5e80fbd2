"""Opening files with distrust: a damaged or hostile one costs an error line, never a hang or the machine's memory.

``open_regular`` opens every file that the package reads (``tests/base/test_reading.py`` lists the few exceptions and
their reasons). It opens regular files only: never a pipe that would block, an endless device or a folder.
``read_regular`` reads a small file whole, up to the limit of its kind. ``parse_json`` parses one, up to a number of
values and a length of strings: a text of some megabytes can stand for gigabytes of objects, and a parser copies long
strings several times, at up to four bytes a character.

A symbolic link is followed where the user named the file, and where data are usually linked (configs, corpora,
tokenizers, datasets, indices). It is not followed to a file of a checkpoint, of a Hugging Face model or of a run's
output, since it could lead out of the folder. The folders themselves may be links everywhere. A file that is refused
raises ``UnfitFile``, an ``OSError`` with a remedy; the reader reports it like any file that cannot be read.

No torch.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
from collections.abc import Callable
from typing import Any

from megatron_hammer.base.errors import UnfitFile

MAX_SMALL_BYTES = 16 * 2**20
"""Of a small file that has no limit of its own kind."""
MAX_JSON_VALUES = 1_000_000
"""In one JSON text: Python takes some 100 bytes for each."""
PLAIN_JSON_BYTES = 4 * 2**20
"""Of a JSON text that may consist of anything: of more, each value must have its share."""
JSON_VALUE_BYTES = 64
"""For a value of a longer text, on average; in large files of models it is 8 to 53."""
MAX_DIGITS = 250
"""Of a whole number: any of so many, also of hexadecimal ones, is a float that is finite."""
_PIECE_BYTES = 2**18
_ALIKE = bytes(ord("0") if chr(byte) in "0123456789" else 0 for byte in range(256))
_NAME_A_FILE = "name a regular file"


def open_descriptor(path: str | os.PathLike[str], follow: bool = True) -> int:
    """A descriptor of a regular file, for reading.

    Args:
        follow: whether the path itself may be a symbolic link, which must lead to a regular file then.

    Raises:
        UnfitFile: something else is there (an ``OSError`` with a reason and a remedy).
        OSError: the system refused.
    """
    # Without O_NONBLOCK a named pipe would make us wait for ever; O_NOCTTY: a terminal must not become ours.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise _why_not_opened(path, follow, error) from None
    except ValueError:  # a NUL in it
        raise FileNotFoundError(errno.ENOENT, "no file can have such a name", os.fspath(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_regular(path, mode)
    return descriptor


def _why_not_opened(path: str | os.PathLike[str], follow: bool, error: OSError) -> OSError:
    """The system's refusal, in words where its own do not say what is there."""
    if error.errno == errno.ELOOP and not follow and os.path.islink(path):
        return UnfitFile(path, "it is a symbolic link", "put the file itself there")
    if error.errno == errno.ENXIO:
        return UnfitFile(path, "it is a socket, not a regular file", _NAME_A_FILE)
    return error


def _not_regular(path: str | os.PathLike[str], mode: int) -> OSError:
    if stat.S_ISDIR(mode):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    return UnfitFile(path, f"it is a {'pipe' if stat.S_ISFIFO(mode) else 'device'}, not a regular file", _NAME_A_FILE)


def open_regular(path: str | os.PathLike[str], follow: bool = True) -> io.BufferedReader:
    """As ``open(path, "rb")``, of a regular file only; arguments and errors as in ``open_descriptor``."""
    return open(open_descriptor(path, follow), "rb")


def open_unbuffered(path: str | os.PathLike[str], follow: bool = True) -> io.FileIO:
    """As ``open_regular``, without a buffer."""
    return open(open_descriptor(path, follow), "rb", buffering=0)


def read_regular(path: str | os.PathLike[str], limit: int = MAX_SMALL_BYTES, follow: bool = True) -> bytes:
    """The content of a small regular file; more than ``limit`` bytes make it an ``UnfitFile``."""
    with open_regular(path, follow) as file:
        content = file.read(limit + 1)
        size = os.fstat(file.fileno()).st_size
    if len(content) > limit:
        rule = f"it has {size:,} bytes, and such a file never has more than {limit:,}"
        raise UnfitFile(path, rule, "name the file that was meant")
    return content


def is_own_pipe(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a pipe that this process was given open (``/dev/stdin``, ``/dev/fd/63`` for ``<(...)``)."""
    return os.path.basename(os.path.realpath(path)).startswith("pipe:[")


def open_input(path: str | os.PathLike[str]) -> io.FileIO:
    """As ``open_unbuffered``; or a pipe that this process was given, whose writer is there already."""
    return open(path if is_own_pipe(path) else open_descriptor(path), "rb", buffering=0)


def parse_json(
    text: str | bytes,
    most: int = MAX_JSON_VALUES,
    pairs: Callable[..., Any] | None = None,
    value_bytes: int = JSON_VALUE_BYTES,
) -> Any:
    """``json.loads``, for a text that may be hostile: each failure is a ``ValueError``.

    Args:
        most: values in it, as ``_weigh`` counts them; in a short text those inside of strings count too.
        pairs: as ``object_pairs_hook`` of ``json.loads``.
        value_bytes: of a text beyond ``PLAIN_JSON_BYTES``, for each value.
    """
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    _check_weight(content, most, value_bytes)
    has_one = b"0" * (MAX_DIGITS + 1) in content.translate(_ALIKE)  # in a string, perhaps; asking for each takes longer
    del content
    if isinstance(text, bytes):
        text = text.decode(json.detect_encoding(text), "surrogatepass")  # the bytes go, where nobody else holds them
    try:
        return json.loads(text, object_pairs_hook=pairs, parse_int=_whole_number if has_one else None)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text)


def _check_weight(text: bytes, most: int, value_bytes: int) -> None:
    if len(text) <= PLAIN_JSON_BYTES:
        values = _weigh(text)
    elif json.detect_encoding(text) not in ("utf-8", "utf-8-sig"):
        raise ValueError("not UTF-8")
    else:
        values = weigh_outside_strings(text)
    if values > most:
        raise ValueError(f"more than {most:,} values")
    if len(text) > PLAIN_JSON_BYTES + value_bytes * values:
        raise ValueError(f"{len(text):,} bytes for {values:,} values: most of it is in long strings")


def _weigh(text: bytes) -> int:
    """Commas, colons and brackets, those of an array twice and of an object thrice, which take memory even if empty."""
    return text.count(b",") + text.count(b":") + 2 * text.count(b"[") + 3 * text.count(b"{")


def weigh_outside_strings(text: bytes | bytearray) -> int:
    """The same without what is inside of strings: 8 ms a megabyte."""
    weight, inside, rest = 0, False, b""
    for start in range(0, len(text), _PIECE_BYTES):
        piece = (rest + text[start : start + _PIECE_BYTES]).replace(rb"\\", b"__")
        rest = b"\\" if piece.endswith(b"\\") else b""  # it belongs to the next character
        parts = piece[: len(piece) - len(rest)].replace(rb"\"", b"__").split(b'"')
        weight += _weigh(b"".join(parts[inside::2]))
        inside ^= len(parts) % 2 == 0
    return weight
