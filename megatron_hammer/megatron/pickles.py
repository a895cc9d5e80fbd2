"""Reading Megatron-LM's pickles without running anything of them.

Its checkpoints are pickles: ``model_optim_rng.pt`` and ``common.pt`` are torch's zip files, ``.metadata`` is a plain
one. A pickle names functions and classes and has the reader call them. Here every name is looked up in a list of our
own: tensors and containers are made by torch's restricted unpickler (``weights_only``), the records that Megatron-LM
and torch's checkpoints consist of become inert ``Record`` objects, which remember what they were given and do nothing,
and any other name ends the reading before anything has been called. No module is imported on a pickle's behalf.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.base.errors import CheckpointError, UnfitFile
from megatron_hammer.base.reading import open_descriptor, read_regular

MAX_METADATA_BYTES = 2**30  # of .metadata: hundreds of bytes for each chunk of each tensor
_REMEDY = "do not open it with anything else: a checkpoint of Megatron-LM names nothing of the kind"

# What may be named and becomes a record: settings, enums, random states and plans, none of which we use as such.
_RECORDS = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w*Path|signal\.Signals|_io\.BytesIO|datetime\.timedelta"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+)|numpy\._?core\.multiarray\.(_reconstruct|scalar)|numpy\._?core\.numeric\._frombuffer"
    r"|torch\._C\.Generator|torch\.serialization\._get_layout|torch\.distributed\.checkpoint\.[\w.]+"
    r"|(megatron|transformer_engine)\.[\w.]+)"
)
_TYPES = re.compile(r"torch\.(bfloat16|float16|float32|float64|float8_\w+|u?int\d+|bool)")


class Record:
    """An object of a pickle, as what it was made from; a subclass for each class that a pickle names."""

    args: tuple[Any, ...] = ()
    state: Any = None
    """What it was given to restore its fields from."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        """Keep the arguments."""
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``__new__`` has what matters."""

    def __setstate__(self, state: Any) -> None:
        """Take fields, in either form of a pickle."""
        self.state = state
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({str(name): value for name, value in part.items()})

    def __getattr__(self, name: str) -> Any:
        """None for a field that it has not: other versions have others."""
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def _record(name: str) -> type[Record]:
    return type(name.rpartition(".")[2], (Record,), {"__module__": __name__})


def _refused(path: Path, name: str) -> CheckpointError:
    rule = f"names {name}, which would be called when it is read: nothing of it was"
    return CheckpointError(31, str(path), rule, _REMEDY)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """While a file is opened and read, what the system refuses becomes E433."""
    try:
        yield
    except UnfitFile as error:
        raise CheckpointError(33, str(path), f"cannot be read: {error}", error.remedy) from None
    except OSError as error:
        raise CheckpointError(33, str(path), f"cannot be read: {error.strerror}", "restore the checkpoint") from None


def load_pt(path: Path) -> Any:
    """The content of a torch zip file; tensors stay in the file, mapped, until they are read.

    Raises:
        CheckpointError: E431 it names what is not on our list; E433 it cannot be read.
    """
    with reading(path):
        descriptor = open_descriptor(path, follow=False)
    try:
        opened = f"/proc/self/fd/{descriptor}"  # the file that was looked at, whatever the name leads to now
        if os.pread(descriptor, 4, 0) != b"PK\x03\x04":
            rule = "is not a zip file of torch.save; the pickles of torch before 1.6 are not read"
            raise CheckpointError(33, str(path), rule, "load it in its own program, and save it with a newer torch")
        return _load(opened, path, mmap=True)
    finally:
        os.close(descriptor)


def load_tensor(content: bytes, path: Path) -> Any:
    """What a chunk of a file of a distributed checkpoint holds: a torch file by itself. Errors as for ``load_pt``."""
    return _load(io.BytesIO(content), path, mmap=False)


@contextmanager
def _own_list() -> Iterator[None]:
    """Torch makes what is allowed in this block, and not what libraries of this process have allowed: a class of a
    library would be no record."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load(opened: Any, path: Path, mmap: bool) -> Any:
    try:
        with _own_list():
            names = torch.serialization.get_unsafe_globals_in_checkpoint(opened)
            for name in names:
                if not _RECORDS.fullmatch(name):
                    raise _refused(path, name)
            torch.serialization.add_safe_globals([(_record(name), name) for name in names])
            if not mmap:
                opened.seek(0)
            return torch.load(opened, map_location="cpu", mmap=mmap, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|Unsupported (?:class|operand) (\S+)", str(error))
        if found is not None:
            raise _refused(path, found[1] or found[2]) from None
        raise _damaged(path, error) from None
    except Exception as error:  # a damaged file can fail in any way, and none of what it names was called
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200]
    return CheckpointError(33, str(path), f"is damaged ({type(error).__name__}: {reason})", "restore the checkpoint")


class _Guarded(pickle.Unpickler):
    """A plain pickle's names: containers, types by their names, records."""

    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file)
        self._path, self._known = path, dict[str, Any]()

    def find_class(self, module: str, name: str) -> Any:
        """As ``pickle`` asks for it; nothing is imported."""
        full = f"{module}.{name}"
        if full in _CONTAINERS:
            return _CONTAINERS[full]
        if _TYPES.fullmatch(full):
            return name
        if not _RECORDS.fullmatch(full):
            raise _refused(self._path, full)
        return self._known.setdefault(full, _record(full))

    def persistent_load(self, pid: Any) -> Any:
        """There are none."""
        raise pickle.UnpicklingError("a persistent id")


_MARKS = ("PUT", "BINPUT", "LONG_BINPUT")  # operations that give an object a number


def _check_marks(content: bytes) -> None:
    """Refuse a pickle whose marks have higher numbers than it has bytes: the reader makes room for all up to them, so
    that twenty bytes would ask for 34 GB. Some 2 us for each operation of the pickle."""
    for operation, number, at in pickletools.genops(content):
        if operation.name in _MARKS and not (isinstance(number, int) and 0 <= number <= len(content)):
            raise pickle.UnpicklingError(f"byte {at} marks an object with the number {str(number)[:20]}")


class _Size(tuple[int, ...]):
    """``torch.Size``, which a pickle makes from a tuple."""


_CONTAINERS: dict[str, Any] = {
    "torch.Size": _Size,
    "collections.OrderedDict": dict,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
}


def load_metadata(path: Path) -> Record:
    """``.metadata`` of a torch distributed checkpoint, as records.

    Raises:
        CheckpointError: as for ``load_pt``.
    """
    with reading(path):
        content = read_regular(path, MAX_METADATA_BYTES, follow=False)
    try:
        _check_marks(content)
        found = _Guarded(path, io.BytesIO(content)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way, and none of what it names was called
        raise _damaged(path, error) from None
    if not isinstance(found, Record) or not isinstance(found.state_dict_metadata, dict):
        raise CheckpointError(33, str(path), "is no metadata of a distributed checkpoint", "restore the checkpoint")
    return found
