"""What a checkpoint's manifest says: which tensors there are, and which part of which lies in which file.

::

    step-00000100/
        manifest.json                  written last; all else is listed in it, with sizes and hashes
        rank-00000.safetensors ...     each rank's own slices of the logical tensors
        tokenizer/                     what was trained with, if the run had one

The manifest is JSON in canonical form (sorted keys, no spaces) and carries the digest of its own text. A slice is a row
of numbers, ``[tensor, first row, end row, first column, end column, hash]`` (no columns for a vector), so that it stays
small: a 1.4B model saved by 64 ranks has 1 MB. Names, ranges and counts are checked as hostile input: nothing outside
the folder is opened, nothing is allocated that the files do not hold, and the slices must tile each tensor exactly.

Needs no torch.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.files import write_durably
from megatron_hammer.checkpoint.tensor_files import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    count,
    digest,
    digest_file,
    open_regular,
)

FORMAT, VERSION = "megatron_hammer.checkpoint", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
MAX_MANIFEST_BYTES = 2 * MAX_HEADER_BYTES  # half a million slices; a limit for what a hostile file can make us parse

STEP_NAME = re.compile(r"step-(\d{8,12})")
_RANK_FILE = re.compile(r"rank-\d{5,7}\.safetensors")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HASH = re.compile(r"[0-9a-f]{32}")

Range = tuple[int, int]


@dataclass(frozen=True)
class LogicalTensor:
    """A tensor that the checkpoint holds: a weight, or a moment of one."""

    name: str
    kind: str
    """``weight``, ``exp_avg`` or ``exp_avg_sq``."""
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return self.name if self.kind == "weight" else f"{self.kind} of {self.name}"


@dataclass(frozen=True)
class SavedSlice:
    """A rectangle of a logical tensor in one file."""

    tensor: int
    """Position in ``Manifest.tensors``."""
    rows: Range
    cols: Range | None
    hash: str
    """XXH3-128 of its bytes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns; rows alone for a vector."""
        rows = self.rows[1] - self.rows[0]
        return (rows,) if self.cols is None else (rows, self.cols[1] - self.cols[0])


@dataclass(frozen=True)
class SavedFile:
    """One rank's file."""

    name: str
    size: int
    header_hash: str
    slices: tuple[SavedSlice, ...]


@dataclass(frozen=True)
class Layout:
    """Who wrote the checkpoint: for information, no reader depends on it."""

    world: int = 1
    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer folder: its fingerprint, and size and hash of each file."""

    fingerprint: str
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint without opening its tensors."""

    folder: Path
    step: int
    layout: Layout
    config: dict[str, Any]
    """The resolved config as a tree; of an imported model, its ``model`` group only."""
    state: dict[str, Any]
    """What training needs beside tensors: consumed samples, samples digest, loss scale, ..."""
    weights_dtype: str
    """In which type the model computes, and by default is exported; the stored masters may be wider."""
    tensors: tuple[LogicalTensor, ...]
    files: tuple[SavedFile, ...]
    tokenizer: TokenizerFiles | None = None
    digest: str = field(default="", compare=False)

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        """(name, kind) -> position in ``tensors``."""
        return {(t.name, t.kind): i for i, t in enumerate(self.tensors)}

    @cached_property
    def kinds(self) -> set[str]:
        """Kinds of tensors that are there."""
        return {t.kind for t in self.tensors}

    def key(self, piece: SavedSlice) -> str:
        """Name of a slice in its file, such as ``weight:model.norm.weight[0:64]``."""
        tensor = self.tensors[piece.tensor]
        return slice_key(tensor.name, tensor.kind, piece.rows, piece.cols)


def slice_key(name: str, kind: str, rows: Range, cols: Range | None) -> str:
    """Name under which a rectangle of a logical tensor is stored."""
    columns = "" if cols is None else f",{cols[0]}:{cols[1]}"
    return f"{kind}:{name}[{rows[0]}:{rows[1]}{columns}]"


def canonical_json(tree: Any) -> bytes:
    """The one text of a JSON value: sorted keys, no spaces, ASCII, finite numbers only."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def pack_slice(piece: SavedSlice) -> list[Any]:
    """A slice as the row of numbers that the manifest holds."""
    return [piece.tensor, *piece.rows, *(piece.cols or ()), piece.hash]


def write_manifest(manifest: Manifest) -> None:
    """Check that the slices are complete, and write ``manifest.json`` durably into ``manifest.folder``."""
    check_tiling(manifest)
    tokenizer = manifest.tokenizer
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "layout": asdict(manifest.layout),
        "config": manifest.config,
        "state": manifest.state,
        "weights_dtype": manifest.weights_dtype,
        "tensors": [[t.name, t.kind, list(t.shape), t.dtype] for t in manifest.tensors],
        "files": [
            {"name": f.name, "size": f.size, "header": f.header_hash, "slices": [pack_slice(s) for s in f.slices]}
            for f in manifest.files
        ],
        "tokenizer": tokenizer
        and {
            "fingerprint": tokenizer.fingerprint,
            "files": {name: list(entry) for name, entry in tokenizer.files.items()},
        },
    }
    tree["digest"] = digest(canonical_json(tree))
    write_durably(manifest.folder / MANIFEST, canonical_json(tree) + b"\n")


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; the tensors' files are not opened.

    Raises:
        CheckpointError: missing, damaged, of another version, or not that of a complete checkpoint.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    with open_regular(path) as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    _check(len(text) <= MAX_MANIFEST_BYTES, path, f"has more than {MAX_MANIFEST_BYTES} bytes", number=3)
    try:
        tree = json.loads(text)
        canonical = canonical_json(tree) + b"\n"
    except (ValueError, RecursionError) as error:
        raise CheckpointError(3, str(path), f"is not valid JSON ({type(error).__name__})", _USE_ANOTHER) from None
    _check(isinstance(tree, dict) and tree.get("format") == FORMAT, path, "is not a manifest of this program", number=3)
    if tree.get("version") != VERSION:
        raise CheckpointError(
            5,
            f"{path} of version {tree.get('version')!r}",
            f"must be of version {VERSION}",
            "read it with the version of the program that wrote it",
        )
    claimed = tree.pop("digest", None)
    _check(
        canonical == text and claimed == digest(canonical_json(tree)), path, "does not match its own digest", number=4
    )
    try:
        manifest = _parse(folder, tree, str(claimed))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(6, str(path), f"has a field of the wrong form ({error})", _USE_ANOTHER) from None
    check_tiling(manifest)
    named = STEP_NAME.fullmatch(folder.name)
    _check(named is None or int(named[1]) == manifest.step, path, f"is that of step {manifest.step}", number=6)
    return manifest


_USE_ANOTHER = "restore the file or use another checkpoint"


def _check(condition: bool, path: Path, rule: str, number: int) -> None:
    if not condition:
        raise CheckpointError(number, str(path), rule, _USE_ANOTHER)


def _parse(folder: Path, tree: dict[str, Any], claimed: str) -> Manifest:
    """The tree as dataclasses; a wrong form is a ``ValueError`` or what Python raises for it."""
    tensors = tuple(_parse_tensor(*fields) for fields in tree["tensors"])
    files = tuple(_parse_file(fields, tensors) for fields in tree["files"])
    _demand(len({f.name for f in files}) == len(files), "two files have one name")
    _demand(len({(t.name, t.kind) for t in tensors}) == len(tensors), "two tensors have one name")
    _demand(tree["weights_dtype"] in ITEM_BYTES, "weights_dtype")
    _demand(isinstance(tree["config"], dict) and isinstance(tree["state"], dict), "config or state is not a mapping")
    layout = Layout(**tree["layout"])
    tokenizer = tree["tokenizer"] and TokenizerFiles(
        _hash(tree["tokenizer"]["fingerprint"]),
        {_plain_name(n): (_size(s), _hash(h)) for n, (s, h) in tree["tokenizer"]["files"].items()},
    )
    return Manifest(
        folder,
        _size(tree["step"]),
        layout,
        tree["config"],
        tree["state"],
        tree["weights_dtype"],
        tensors,
        files,
        tokenizer,
        claimed,
    )


def _parse_tensor(name: str, kind: str, shape: list[int], dtype: str) -> LogicalTensor:
    _demand(isinstance(name, str) and isinstance(kind, str) and dtype in ITEM_BYTES, f"tensor {name!r}")
    _demand(isinstance(shape, list) and len(shape) in (1, 2) and all(_size(n) > 0 for n in shape), f"shape of {name!r}")
    return LogicalTensor(name, kind, tuple(shape), dtype)


def _parse_file(fields: dict[str, Any], tensors: Sequence[LogicalTensor]) -> SavedFile:
    name = fields["name"]
    _demand(isinstance(name, str) and _RANK_FILE.fullmatch(name) is not None, f"file name {name!r}")
    slices = tuple(_parse_slice(row, tensors) for row in fields["slices"])
    return SavedFile(name, _size(fields["size"]), _hash(fields["header"]), slices)


def _parse_slice(row: list[Any], tensors: Sequence[LogicalTensor]) -> SavedSlice:
    index, *bounds, hashed = row
    bounds = [_size(b) for b in bounds]
    tensor = tensors[_size(index)]
    _demand(len(bounds) == 2 * len(tensor.shape), f"slice of {tensor}")
    for start, stop, size in zip(bounds[::2], bounds[1::2], tensor.shape):
        _demand(start < stop <= size, f"slice of {tensor}")
    cols = (bounds[2], bounds[3]) if len(bounds) == 4 else None
    return SavedSlice(index, (bounds[0], bounds[1]), cols, _hash(hashed))


def _demand(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _size(value: Any) -> int:
    _demand(type(value) is int and 0 <= value < 2**53, f"{value!r} is not a count")  # True and 1.0 are not
    return value


def _hash(value: Any) -> str:
    _demand(isinstance(value, str) and _HASH.fullmatch(value) is not None, f"{value!r} is not a hash")
    return value


def _plain_name(value: str) -> str:
    _demand(_PLAIN_NAME.fullmatch(value) is not None, f"file name {value!r}")
    return value


def check_tiling(manifest: Manifest) -> None:
    """Every tensor must be covered by its slices exactly once.

    A line is swept over the rows of each tensor: the slices that it cuts, kept sorted by column, must not touch. With
    no overlap, equal areas mean that nothing is missing.
    """
    slices: list[list[SavedSlice]] = [[] for _ in manifest.tensors]
    for file in manifest.files:
        for piece in file.slices:
            slices[piece.tensor].append(piece)
    for tensor, pieces in zip(manifest.tensors, slices):
        overlap = _overlapping(pieces)
        missing = count(tensor.shape) - sum(count(p.shape) for p in pieces)
        if overlap or missing:
            rule = "is saved twice in part" if overlap else f"lacks {missing} of its {count(tensor.shape)} elements"
            raise CheckpointError(7, f"{manifest.folder / MANIFEST}: {tensor}", rule, "use another checkpoint")


def _overlapping(pieces: Sequence[SavedSlice]) -> bool:
    events = [(p.rows[1], 0, *(p.cols or (0, 1))) for p in pieces]  # leaving comes before entering at the same row
    events += [(p.rows[0], 1, *(p.cols or (0, 1))) for p in pieces]
    cut: list[Range] = []  # column ranges under the line
    for _, enters, left, right in sorted(events):
        at = bisect.bisect_left(cut, (left, right))
        if not enters:
            cut.pop(at)
        elif (at > 0 and cut[at - 1][1] > left) or (at < len(cut) and cut[at][0] < right):
            return True
        else:
            cut.insert(at, (left, right))
    return False


def describe_tokenizer_files(folder: Path, fingerprint: str) -> TokenizerFiles:
    """Sizes and hashes of what a tokenizer wrote into ``folder``."""
    files = {p.name: (p.stat().st_size, digest_file(p)) for p in sorted(folder.iterdir())}
    assert all(_PLAIN_NAME.fullmatch(name) for name in files), f"unexpected file names in {folder}: {sorted(files)}"
    return TokenizerFiles(fingerprint, files)


def checked_tokenizer_folder(manifest: Manifest) -> Path | None:
    """The checkpoint's tokenizer folder, each file of it verified; None when the checkpoint has no tokenizer.

    Raises:
        CheckpointError: a file is missing, changed, or there besides what was saved (it might be preferred).
    """
    if manifest.tokenizer is None:
        return None
    folder, expected = manifest.folder / TOKENIZER, manifest.tokenizer.files
    found = set() if folder.is_symlink() or not folder.is_dir() else {p.name for p in folder.iterdir()}
    for name in sorted(found ^ set(expected)):
        rule = "does not belong to the checkpoint" if name in found else "is missing"
        raise CheckpointError(15, str(folder / name), rule, "restore the tokenizer folder or use another checkpoint")
    for name, (size, hashed) in expected.items():
        path = folder / name
        if path.stat(follow_symlinks=False).st_size != size or digest_file(path) != hashed:
            raise CheckpointError(
                15, str(path), "has changed since it was saved", "restore it or use another checkpoint"
            )
    return folder
