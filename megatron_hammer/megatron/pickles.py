"""Reads Megatron-LM's pickles without running any code that they name.

Its checkpoints are pickles: ``model_optim_rng.pt`` and ``common.pt`` are torch's zip files, ``.metadata`` is a plain
one. A pickle names functions and classes, which an ordinary reader imports and calls. Here every name is looked up in a
list of our own: the records that Megatron-LM and torch's checkpoints consist of become inert ``Record`` objects, which
store their arguments and do nothing, tensors are made by ``torch_files.py``, and any other name is an error. No module
is imported because a pickle names it. Before that the time and memory that its operations would take are bounded
(``check_operations``): a pickle of some hundred bytes can take hours or all memory without a single name. Needs no
torch.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError, UnfitFile
from megatron_hammer.base.reading import read_regular

_RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # in pickles of protocol 2, as torch.save makes them
_MOST_ARGUMENTS, _MOST_CLASSES = 64, 1_000
_REMEDY = "do not open it with anything else: a checkpoint of Megatron-LM names nothing of the kind"

# What may be named and becomes a record: settings, enums, random states and plans, none of which we use as such.
_RECORDS = re.compile(
    r"(argparse\.Namespace|types\.SimpleNamespace|pathlib\.\w*Path|signal\.Signals|_io\.BytesIO|datetime\.timedelta"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+)|numpy\._?core\.multiarray\.(_reconstruct|scalar)|numpy\._?core\.numeric\._frombuffer"
    r"|collections\.(Counter|defaultdict)|builtins\.(set|frozenset|bytes|bytearray|complex)|_codecs\.encode"
    r"|torch\._C\.Generator|torch\.serialization\._get_layout|torch\.device|torch\._utils\._rebuild_\w+"
    r"|torch\.(_tensor\.)?Tensor|torch\.nn\.parameter\.Parameter|torch\.distributed\.checkpoint\.[\w.]+"
    r"|(megatron|transformer_engine)\.[\w.]+)"
)
_TYPES = re.compile(r"torch\.(bfloat16|float16|float32|float64|float8_\w+|u?int\d+|bool)")


class Record:
    """An object of a pickle, as what it was made from; a subclass for each class that a pickle names."""

    args: tuple[Any, ...] = ()
    state: Any = None
    """What it was given to restore its fields from: not copied, since many may be given the same."""

    def __new__(cls, *args: Any) -> Record:
        """Keep the arguments."""
        if len(args) > _MOST_ARGUMENTS:
            raise Damage(f"it makes something of {len(args):,} arguments")
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        """Nothing: ``__new__`` has what matters."""

    def __setstate__(self, state: Any) -> None:
        """Take fields, in either form of a pickle."""
        self.state = state

    def fields(self) -> dict[str, Any]:
        """All of them."""
        parts = self.state[:2] if isinstance(self.state, tuple) else (self.state,)
        tables = [part for part in parts if isinstance(part, dict)]
        return {name: value for part in tables for name, value in part.items() if isinstance(name, str)}

    def __getattr__(self, name: str) -> Any:
        """A field; None for one that it has not: other versions have others."""
        if name.startswith("__"):
            raise AttributeError(name)
        parts = self.state[:2] if isinstance(self.state, tuple) else (self.state,)
        found = [part[name] for part in parts if isinstance(part, dict) and name in part]
        return found[-1] if found else None


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


class Damage(ValueError):
    """What is wrong with a file, in words that follow "is damaged"."""


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """While a file's content is read, whatever fails becomes E433: a damaged file can fail in any way, and nothing of
    what it names was called."""
    try:
        yield
    except CheckpointError:
        raise
    except Damage as error:
        raise CheckpointError(33, str(path), f"is damaged: {error}", "restore the checkpoint") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(33, str(path), f"is damaged ({reason})", "restore the checkpoint") from None


# ---- how much of it there may be ------------------------------------------------------------------------------------

_MARKS = ("PUT", "BINPUT", "LONG_BINPUT")  # operations that give an object a number
_FETCHES = ("GET", "BINGET", "LONG_BINGET")
_LONG_BITS = 61  # an integer of more has the hash of others, by which a table of such keys is slow
_LONG_WEIGHT, _MAX_BITS = 1_000, 8_192
_WORK = 30  # weight that may be handled, for each operation that is allowed


@dataclass(frozen=True)
class PickleLimits:
    """How large a pickle may be: what describes tensors has its measure in their bytes, and the smallest is free.

    A chunk with its own file of torch takes 1.1 KB on the disk at least, and some 300 bytes and 60 operations in
    ``.metadata``. An operation costs 2 us here, so that 300,000 take half a second.
    """

    bytes: int
    operations: int

    @classmethod
    def least(cls) -> PickleLimits:
        """Beside no tensors."""
        return cls(2**24, 300_000)

    @classmethod
    def beside(cls, files: Sequence[os.stat_result]) -> PickleLimits:
        """Beside tensors in these files: by what lies on the disk of them, not in holes."""
        least = cls.least()
        held = [min(file.st_size, 512 * file.st_blocks) for file in files]
        there = sum(held)
        return cls(least.bytes + there // 2, least.operations + there // 8)


def check_operations(content: bytes, most: int) -> None:
    """Refuse a pickle that asks for more room or time than its length lets expect, before any of it is done.

    Not only long ones: the reader makes room for all marks up to the highest, so that twenty bytes would ask for 34 GB;
    and of tuples that each hold the one before twice, forty are hashed for hours where they are the key of a table. So
    what each object on the reader's stack weighs, all that it holds counted as often as it does, is known here.

    Args:
        most: operations.
    """
    stack: list[int | None] = []
    marks: dict[int, int] = {}
    work = done = 0
    for operation, argument, at in pickletools.genops(content):
        done, name = done + 1, operation.name
        if done > most:
            raise Damage(f"it has more than the {most:,} operations that go with its tensors")
        if name in _FETCHES:
            stack.append(marks.get(argument or 0, 1))
        elif name in _MARKS or name == "MEMOIZE":
            number = len(marks) if argument is None else argument
            if not (isinstance(number, int) and 0 <= number <= done):
                raise Damage(f"byte {at} marks an object with the number {str(number)[:20]}")
            marks[number] = (stack[-1] if stack else None) or 1
            continue
        elif name == "MARK":
            stack.append(None)
            continue
        elif isinstance(argument, int) and argument.bit_length() > _LONG_BITS:
            if argument.bit_length() > _MAX_BITS:
                raise Damage(f"byte {at} is an integer of {argument.bit_length():,} bits")
            stack.append(_LONG_WEIGHT)
        else:
            _apply(operation, stack)
        work += (stack[-1] if stack else None) or 1
        if work > _WORK * most:
            raise Damage("it has objects that hold each other too often")


def _apply(operation: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """What an operation does to the weights on the stack: of a tuple, and of what is called, all that goes in."""
    before, name = [kind.name for kind in operation.stack_before], operation.name
    taken: list[int | None] = []
    if "mark" in before:
        while stack and (weight := stack.pop()) is not None:
            taken.append(weight)
        before = before[: before.index("mark")]
    for _ in before:
        taken.append(stack.pop() if stack else 1)
    weight = sum(part or 1 for part in taken)
    keeps = name.startswith("TUPLE") or name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST", "BUILD")
    if name == "DUP":
        stack += [weight, weight]
    else:
        stack += [weight + 1 if keeps else 1] * len(operation.stack_after)


# ---- what it may make -----------------------------------------------------------------------------------------------


class _Size(tuple[int, ...]):
    """``torch.Size``, which a pickle makes from a tuple."""

    def __new__(cls, numbers: Any = ()) -> _Size:
        """Of few numbers: a pickle may give the same long tuple to many."""
        if len(numbers) > _MOST_ARGUMENTS:
            raise Damage(f"it has a shape of {len(numbers):,} numbers")
        return super().__new__(cls, numbers)


class _Mapping(dict[Any, Any]):
    """An ``OrderedDict``, which a pickle makes empty, and fills."""

    def __init__(self, *nothing: Any) -> None:
        if nothing:
            raise Damage("it makes a mapping out of something")
        super().__init__()

    def __setstate__(self, attributes: Any) -> None:
        """Nothing: those of a module's ``state_dict`` say which version of the module wrote it."""


_CONTAINERS: dict[str, Any] = {"torch.Size": _Size, "collections.OrderedDict": _Mapping}


class Guarded(pickle.Unpickler):
    """A pickle's names: containers, types by their names, records."""

    def __init__(self, path: Path, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._path, self._known = path, dict[str, Any]()

    def find_class(self, module: str, name: str) -> Any:
        """As ``pickle`` asks for it; nothing is imported."""
        full = f"{_RENAMED.get(module, module)}.{name}"
        if full in _CONTAINERS:
            return _CONTAINERS[full]
        if _TYPES.fullmatch(full):
            return full
        if not _RECORDS.fullmatch(full):
            raise _refused(self._path, full)
        if full not in self._known and len(self._known) >= _MOST_CLASSES:
            raise Damage(f"it names more than {_MOST_CLASSES:,} classes")
        return self._known.setdefault(full, _record(full))

    def persistent_load(self, pid: Any) -> Any:
        """There are none."""
        raise pickle.UnpicklingError("a persistent id")


def load_metadata(path: Path) -> Record:
    """``.metadata`` of a torch distributed checkpoint, as records.

    Raises:
        CheckpointError: E431 it names what is not on our list; E433 it cannot be read.
    """
    with reading(path):
        beside = [file.lstat() for file in path.parent.glob("__*.distcp")]
        limits = PickleLimits.beside([file for file in beside if stat.S_ISREG(file.st_mode)])
        content = read_regular(path, limits.bytes, follow=False)
    with damage(path):
        check_operations(content, limits.operations)
        found = Guarded(path, content).load()
    if not isinstance(found, Record) or not isinstance(found.state_dict_metadata, dict):
        raise CheckpointError(33, str(path), "is no metadata of a distributed checkpoint", "restore the checkpoint")
    return found
