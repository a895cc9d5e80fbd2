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
import math
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.base.files import canonical_json, hash_bytes, hash_content, hash_file, write_durably
from megatron_hammer.base.reading import parse_json
from megatron_hammer.checkpoint.tensor_files import ITEM_BYTES, open_checkpoint_file
from megatron_hammer.config import ModelConfig, config_from_tree
from megatron_hammer.parallel.placement import Range

FORMAT, VERSION = "megatron_hammer.checkpoint", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
MAX_MANIFEST_BYTES = 16 * 2**20  # a limit for what a hostile file can make us parse
MAX_MANIFEST_VALUES = 1_200_000  # 150,000 slices, with 8 each as ``parse_json`` counts: a second

STEP_NAME = r"step-(\d{8,12})"
_RANK_FILE = re.compile(r"rank-\d{5,7}\.safetensors")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HASH, _SUM = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{16}")
_USE_ANOTHER = "restore the file or use another checkpoint"


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
class SavedLayout:
    """On how many ranks of each axis the checkpoint was written: for information, no reader depends on it."""

    world: int = 1
    tp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    """Not written where it is 1."""
    pp: int = 1
    """The same."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer folder: its fingerprint, and size and hash of each file."""

    fingerprint: str
    files: dict[str, tuple[int, str]]


@dataclass(frozen=True)
class StateDigest:
    """Of the whole state, whatever the layout: see ``digest.py``."""

    digest: str
    sums: tuple[str, ...]
    """Of each of ``Manifest.tensors``, 16 hex digits: they tell which one is another."""


@dataclass(frozen=True)
class Manifest:
    """All that is known of a checkpoint without opening its tensors."""

    folder: Path
    step: int
    layout: SavedLayout
    config: dict[str, Any]
    """The resolved config as a tree; of an imported model, its ``model`` group only."""
    state: dict[str, Any]
    """What training needs beside tensors: consumed samples, samples digest, loss scale, ..."""
    weights_dtype: str
    """In which type the model computes, and by default is exported; the stored masters may be wider."""
    tensors: tuple[LogicalTensor, ...]
    files: tuple[SavedFile, ...]
    tokenizer: TokenizerFiles | None = None
    state_digest: StateDigest | None = None
    """None where an older version wrote the checkpoint."""
    digest: str = field(default="", compare=False)

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        """(name, kind) -> position in ``tensors``."""
        return {(t.name, t.kind): i for i, t in enumerate(self.tensors)}

    @cached_property
    def places(self) -> dict[tuple[str, str], list[tuple[SavedFile, SavedSlice, str]]]:
        """(name, kind) of a tensor -> its slices: the file, what it holds of the tensor, and the key there."""
        found: dict[tuple[str, str], list[tuple[SavedFile, SavedSlice, str]]] = {}
        for file in self.files:
            for saved in file.slices:
                tensor = self.tensors[saved.tensor]
                found.setdefault((tensor.name, tensor.kind), []).append((file, saved, self.key_of(saved)))
        return found

    def key_of(self, saved: SavedSlice) -> str:
        """The name under which a slice is stored."""
        tensor = self.tensors[saved.tensor]
        return slice_key(tensor.name, tensor.kind, saved.rows, saved.cols)

    @cached_property
    def kinds(self) -> set[str]:
        """Kinds of tensors that are there."""
        return {t.kind for t in self.tensors}


def slice_key(name: str, kind: str, rows: Range, cols: Range | None) -> str:
    """Name under which a rectangle of a logical tensor is stored."""
    columns = "" if cols is None else f",{cols[0]}:{cols[1]}"
    return f"{kind}:{name}[{rows[0]}:{rows[1]}{columns}]"


def write_manifest(manifest: Manifest) -> None:
    """Check that the slices are complete, and write ``manifest.json`` durably into ``manifest.folder``."""
    check_tiling(manifest)
    tokenizer = manifest.tokenizer
    tree = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "layout": {
            name: value for name, value in asdict(manifest.layout).items() if name not in ("cp", "pp") or value != 1
        },
        "config": manifest.config,
        "state": manifest.state,
        "weights_dtype": manifest.weights_dtype,
        "tensors": [[t.name, t.kind, list(t.shape), t.dtype] for t in manifest.tensors],
        "files": [
            {"name": f.name, "size": f.size, "header": f.header_hash, "slices": [_pack(s) for s in f.slices]}
            for f in manifest.files
        ],
        "tokenizer": tokenizer
        and {
            "fingerprint": tokenizer.fingerprint,
            "files": {name: list(entry) for name, entry in tokenizer.files.items()},
        },
    }
    if manifest.state_digest is not None:
        tree["state_digest"] = {"digest": manifest.state_digest.digest, "sums": list(manifest.state_digest.sums)}
    tree["digest"] = hash_bytes(canonical_json(tree))
    write_durably(manifest.folder / MANIFEST, canonical_json(tree) + b"\n")


def _pack(saved: SavedSlice) -> list[Any]:
    """A slice as the row of numbers that the manifest holds."""
    return [saved.tensor, *saved.rows, *(saved.cols or ()), saved.hash]


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a checkpoint folder; the tensors' files are not opened.

    Raises:
        CheckpointError: missing, damaged, of another version, or not that of a complete checkpoint.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    with open_checkpoint_file(path) as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(3, str(path), f"has more than {MAX_MANIFEST_BYTES} bytes", _USE_ANOTHER)
    try:
        tree = parse_json(text, MAX_MANIFEST_VALUES)
        canonical = canonical_json(tree) + b"\n"
    except (ValueError, OverflowError) as error:
        raise CheckpointError(3, str(path), f"is not valid JSON ({type(error).__name__})", _USE_ANOTHER) from None
    if not isinstance(tree, dict) or "digest" not in tree:
        raise CheckpointError(3, str(path), "is not a manifest of this program", _USE_ANOTHER)
    claimed = tree.pop("digest")
    if canonical != text or claimed != hash_bytes(canonical_json(tree)):
        raise CheckpointError(4, str(path), "does not match its own digest", _USE_ANOTHER)
    if tree.get("format") != FORMAT:  # only now: a flipped bit does not make it one of another program or version
        raise CheckpointError(3, str(path), "is not a manifest of this program", _USE_ANOTHER)
    if (version := tree.get("version")) != VERSION:
        remedy = "read it with the version of the program that wrote it"
        raise CheckpointError(5, f"{path} of version {version!r}", f"must be of version {VERSION}", remedy)
    try:
        manifest = _parse(folder, tree, claimed)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(6, str(path), f"has a field of the wrong form ({error})", _USE_ANOTHER) from None
    check_tiling(manifest)
    named = re.fullmatch(STEP_NAME, folder.name)
    if named is not None and int(named[1]) != manifest.step:
        raise CheckpointError(6, str(path), f"is that of step {manifest.step}", _USE_ANOTHER)
    return manifest


def _parse(folder: Path, tree: dict[str, Any], claimed: str) -> Manifest:
    """The tree as dataclasses; a wrong form is a ``ValueError`` or what Python raises for it."""
    tensors = []
    for name, kind, shape, dtype in tree["tensors"]:
        if not (isinstance(name, str) and isinstance(kind, str) and dtype in ITEM_BYTES):
            raise ValueError(f"tensor {name!r}")
        if not (isinstance(shape, list) and len(shape) in (1, 2) and all(_count(n) > 0 for n in shape)):
            raise ValueError(f"shape of {name!r}")
        tensors.append(LogicalTensor(name, kind, tuple(shape), dtype))
    files = []
    for entry in tree["files"]:
        name, slices = _text(entry["name"], _RANK_FILE), tuple(_parse_slice(row, tensors) for row in entry["slices"])
        files.append(SavedFile(name, _count(entry["size"]), _text(entry["header"], _HASH), slices))
    tokenizer = None
    if saved := tree["tokenizer"]:
        copies = {_text(n, _PLAIN_NAME): (_count(size), _text(h, _HASH)) for n, (size, h) in saved["files"].items()}
        tokenizer = TokenizerFiles(_text(saved["fingerprint"], _HASH), copies)
    config, state, dtype = tree["config"], tree["state"], tree["weights_dtype"]
    for right, what in (
        (len({f.name for f in files}) == len(files), "two files have one name"),
        (len({(t.name, t.kind) for t in tensors}) == len(tensors), "two tensors have one name"),
        (dtype in ITEM_BYTES, "weights_dtype"),
        (isinstance(config, dict) and isinstance(state, dict), "config or state is not a mapping"),
    ):
        if not right:
            raise ValueError(what)
    _check_state(state)
    step, layout = _count(tree["step"]), SavedLayout(**tree["layout"])
    for name, value in asdict(layout).items():
        if not (type(value) is bool if name == "sequence_parallel" else _count(value) > 0):
            raise ValueError(f"layout.{name}={value!r:.60}")
    found = None
    if "state_digest" in tree:
        sums = tuple(_text(value, _SUM) for value in tree["state_digest"]["sums"])
        found = StateDigest(_text(tree["state_digest"]["digest"], _HASH), sums)
        if len(sums) != len(tensors):
            raise ValueError("state_digest has another number of sums than there are tensors")
    return Manifest(folder, step, layout, config, state, dtype, tuple(tensors), tuple(files), tokenizer, found, claimed)


def _check_state(state: dict[str, Any]) -> None:
    """The values that a run goes on from; others may stand beside them (an imported model has none of these)."""
    forms: dict[str, Callable[[Any], bool]] = {
        "consumed_samples": _is_count,
        "samples_digest": lambda value: isinstance(value, str) and (value == "" or _HASH.fullmatch(value) is not None),
        "optimizer": lambda value: isinstance(value, dict) and all(map(_is_scalar, value.values())),
        "source_tokens": lambda value: isinstance(value, dict) and all(map(_is_count, value.values())),
        "next": lambda value: isinstance(value, dict),
        "owed_line": lambda value: isinstance(value, str) and (value == "" or isinstance(parse_json(value), dict)),
        "data": lambda value: isinstance(value, dict),
        "accepted": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
        "rewinds": lambda value: isinstance(value, list) and all(isinstance(entry, dict) for entry in value),
    }
    for name, fits in forms.items():
        if name in state and not fits(state[name]):
            raise ValueError(f"state.{name}={state[name]!r:.60}")


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**53  # True and 1.0 are not


def _is_scalar(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def check_resumable(manifest: Manifest) -> None:
    """Make sure that the state holds what a run goes on from.

    Raises:
        CheckpointError: a value is missing.
    """
    state, path = manifest.state, str(manifest.folder / MANIFEST)
    for name in ("consumed_samples", "samples_digest", "optimizer"):
        if name not in state:
            remedy = f"take its weights into a new run with checkpoint.init_from={manifest.folder}"
            raise CheckpointError(6, path, f"holds no state.{name}, which a run goes on from", remedy)
    for name in ("updates", "loss_scale", "good_steps"):
        if name not in state["optimizer"]:
            raise CheckpointError(6, path, f"holds no state.optimizer.{name}", _USE_ANOTHER)


def _parse_slice(row: list[Any], tensors: Sequence[LogicalTensor]) -> SavedSlice:
    index, *bounds, hashed = row
    tensor = tensors[_count(index)]
    ranges = list(zip(bounds[::2], bounds[1::2]))
    if len(bounds) != 2 * len(tensor.shape) or not all(
        _count(start) < _count(stop) <= size for (start, stop), size in zip(ranges, tensor.shape)
    ):
        raise ValueError(f"slice of {tensor}")
    return SavedSlice(index, ranges[0], ranges[1] if len(ranges) == 2 else None, _text(hashed, _HASH))


def _count(value: Any) -> int:
    """A number of the manifest, if it is one."""
    if not _is_count(value):
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: Any, form: re.Pattern[str]) -> str:
    """A hash or the name of a file."""
    if not isinstance(value, str) or form.fullmatch(value) is None:
        raise ValueError(f"{value!r:.60} is not a hash" if form in (_HASH, _SUM) else f"file name {value!r:.60}")
    return value


def check_tiling(manifest: Manifest) -> None:
    """Every tensor must be covered by its slices exactly once.

    A line is swept over the rows of each tensor: the slices that it cuts, kept sorted by column, must not touch. With
    no overlap, equal areas mean that nothing is missing.
    """
    slices: list[list[SavedSlice]] = [[] for _ in manifest.tensors]
    for file in manifest.files:
        for saved in file.slices:
            slices[saved.tensor].append(saved)
    for tensor, parts in zip(manifest.tensors, slices):
        overlap, size = _overlapping(parts), math.prod(tensor.shape)
        missing = size - sum(math.prod(part.shape) for part in parts)
        if overlap or missing:
            rule = "is saved twice in part" if overlap else f"lacks {missing} of its {size} elements"
            raise CheckpointError(7, f"{manifest.folder / MANIFEST}: {tensor}", rule, "use another checkpoint")


def _overlapping(parts: Sequence[SavedSlice]) -> bool:
    events = [(p.rows[1], 0, *(p.cols or (0, 1))) for p in parts]  # leaving comes before entering at the same row
    events += [(p.rows[0], 1, *(p.cols or (0, 1))) for p in parts]
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


def saved_model(manifest: Manifest) -> ModelConfig:
    """The model as it was when saved, with the longest context filled in.

    Raises:
        CheckpointError: the checkpoint's config has a setting that this version does not know.
    """
    path = str(manifest.folder / MANIFEST)
    try:
        config = config_from_tree(manifest.config).after_samples(manifest.state.get("consumed_samples", 0))
        model = config.described_model
        model.check()
    except ConfigError as error:
        remedy = "read it with the version of the program that wrote it"
        raise CheckpointError(6, path, f"holds a config of another version ({error})", remedy) from None
    if model.vocab_size is None:
        raise CheckpointError(6, path, "does not state model.vocab_size", "use another checkpoint")
    return model


def describe_tokenizer_files(folder: Path, fingerprint: str) -> TokenizerFiles:
    """Sizes and hashes of what a tokenizer wrote into ``folder``."""
    files = {p.name: (p.stat().st_size, hash_file(p)) for p in sorted(folder.iterdir())}
    assert all(_PLAIN_NAME.fullmatch(name) for name in files), f"unexpected file names in {folder}: {sorted(files)}"
    return TokenizerFiles(fingerprint, files)


def check_files(manifest: Manifest) -> None:
    """Look at every tensor file without opening it: a regular file that has the size which the manifest says.

    Raises:
        CheckpointError: names the first that is not.
    """
    for file in manifest.files:
        path = manifest.folder / file.name
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise CheckpointError(8, str(path), "is missing", _USE_ANOTHER) from None
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(8, str(path), "is not a regular file", _USE_ANOTHER)
        if status.st_size != file.size:
            rule = f"must have {file.size} bytes as its manifest says"
            raise CheckpointError(9, f"{path} of {status.st_size} bytes", rule, _USE_ANOTHER)


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
        same = path.lstat().st_size == size
        if same:
            with open_checkpoint_file(path) as file:
                same = hash_content(file) == hashed
        if not same:
            remedy = "restore it or use another checkpoint"
            raise CheckpointError(15, str(path), "has changed since it was saved", remedy)
    return folder
