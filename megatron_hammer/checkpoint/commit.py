"""The file work of a save: each rank's tensors and its report on them, and the commit that makes all a checkpoint.

::

    STAGING/rank-NNNNN.safetensors   write_rank: hashed before it is written, fsynced, read back
    STAGING/rank-NNNNN.report        what it wrote, for the one rank that commits; gone with the commit
    STAGING -> step-NNNNNNNN         commit: reports -> manifest.json, fsync, rename, fsync of the parent

Nothing here communicates, so that a process beside a rank can do it as well as the rank itself (``background.py``).
Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.faults import fault_point
from megatron_hammer.base.files import canonical_json, sync_file, sync_folder, write_durably
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.checkpoint.digest import MODULUS, Factors, digest_of
from megatron_hammer.checkpoint.folder import publish_checkpoint, step_of
from megatron_hammer.checkpoint.kinds import shapes_of, style_of
from megatron_hammer.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    MAX_MANIFEST_VALUES,
    TOKENIZER,
    LogicalTensor,
    Manifest,
    SavedFile,
    SavedLayout,
    SavedSlice,
    TokenizerFiles,
    describe_tokenizer_files,
    slice_key,
    write_manifest,
)
from megatron_hammer.checkpoint.one_pass import OnePass
from megatron_hammer.checkpoint.tensor_files import ITEM_BYTES, TensorFileReader, TensorFileWriter
from megatron_hammer.config import ModelConfig
from megatron_hammer.parallel.placement import Range


@dataclass(frozen=True)
class SliceToWrite:
    """A rectangle of a logical tensor that one rank will write; it becomes a ``SavedSlice`` of the manifest."""

    name: str
    kind: str
    rows: Range
    cols: Range | None
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[], Iterable[Any]]
    """Gives the bytes of its elements, row by row, in one or more buffers; called once, when it is this slice's turn. A
    buffer may be gone when the next is asked for."""

    @property
    def key(self) -> str:
        """The name of the slice in its file."""
        return slice_key(self.name, self.kind, self.rows, self.cols)


SliceWatch = Callable[[Sequence[SliceToWrite]], Iterable[SliceToWrite]]
"""Wraps the loop over slices, for a progress bar."""


def rank_file_name(rank: int) -> str:
    """``rank-00003.safetensors``."""
    return f"rank-{rank:05d}.safetensors"


def write_rank(
    folder: Path, rank: int, slices: Sequence[SliceToWrite], watch: SliceWatch = iter, part: str = ""
) -> None:
    """Write one rank's file and its report, and read the file back; no communication.

    Args:
        watch: wraps the loop over the slices, for a progress bar.
        part: of the rank, for ``fault_point``.

    Raises:
        CheckpointError: the disk gives back something else than was written.
    """
    path, step = folder / rank_file_name(rank), step_of(folder)
    fault_point("write", rank, step, part)
    hashes, sums = [], []
    with TensorFileWriter(path, [(s.key, s.dtype, s.shape) for s in slices]) as writer:
        for wanted in watch(slices):
            size = math.prod(wanted.shape) * ITEM_BYTES[wanted.dtype]
            through = OnePass(size, Factors(wanted.rows, wanted.cols, wanted.dtype))
            hashes.append(writer.write(wanted.key, wanted.chunks(), through))
            sums.append(through.total)
        fault_point("fsync", rank, step, part)
    with TensorFileReader(path, writer.size, writer.header_hash) as reader:
        for wanted, hashed in zip(slices, hashes):
            if reader.hash_of(wanted.key) != hashed:
                raise CheckpointError(
                    16,
                    f"{path}: {wanted.key}",
                    "reads back differently than it was written",
                    "suspect the disk or the memory of this machine",
                )
    rows = [[s.name, s.kind, s.dtype, *s.rows, *(s.cols or ()), h] for s, h in zip(slices, hashes)]
    report = {"size": writer.size, "header": writer.header_hash, "slices": rows, "sums": sums}
    write_durably(_report_path(folder, rank), canonical_json(report))


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.report"


def stage_tokenizer_files(save: Callable[[Path], object], fingerprint: str, staging: Path) -> TokenizerFiles:
    """Have ``save`` write a tokenizer's files into the staging folder, and make them durable."""
    folder = staging / TOKENIZER
    folder.mkdir()
    save(folder)
    for path in folder.iterdir():
        sync_file(path)
    sync_folder(folder)
    return describe_tokenizer_files(folder, fingerprint)


def commit(
    staging: Path,
    target: Path,
    *,
    step: int,
    model: ModelConfig,
    config_tree: Mapping[str, Any],
    state: Mapping[str, Any],
    weights_dtype: str,
    layout: SavedLayout,
    tokenizer: TokenizerFiles | None,
    part: str = "",
) -> Path | None:
    """Turn the ranks' reports into the manifest and the staging folder into the checkpoint; called by one rank.

    Returns:
        where that is now which was there under the checkpoint's name, if anything was.

    Raises:
        CheckpointError: the ranks' slices do not make up the logical tensors of ``model``.
    """
    reports = []
    for rank in range(layout.world):
        path = _report_path(staging, rank)
        reports.append(parse_json(read_regular(path, MAX_MANIFEST_BYTES, follow=False), MAX_MANIFEST_VALUES))
        path.unlink()
    dtypes = {(name, kind): dtype for r in reports for name, kind, dtype, *_ in r["slices"]}
    kinds = list(dict.fromkeys(kind for _, kind in dtypes))
    tensors = [
        LogicalTensor(name, kind, shape, dtypes.get((name, kind), "float32"))
        for kind in kinds
        for name, shape in shapes_of(model, kind, style_of(config_tree)).items()
    ]
    index = {(t.name, t.kind): i for i, t in enumerate(tensors)}
    files, sums = [], [0] * len(tensors)
    for rank, report in enumerate(reports):
        slices = []
        for (name, kind, _, first, end, *columns, hashed), part_sum in zip(
            report["slices"], report["sums"], strict=True
        ):
            sums[index[name, kind]] = (sums[index[name, kind]] + part_sum) % MODULUS
            slices.append(SavedSlice(index[name, kind], (first, end), tuple(columns) or None, hashed))
        files.append(SavedFile(rank_file_name(rank), report["size"], report["header"], tuple(slices)))
    fault_point("manifest", 0, step, part)
    write_manifest(
        Manifest(
            staging,
            step,
            layout,
            dict(config_tree),
            dict(state),
            weights_dtype,
            tuple(tensors),
            tuple(files),
            tokenizer,
            digest_of(tensors, sums, step, state),
        )
    )
    fault_point("rename", 0, step, part)
    replaced = publish_checkpoint(staging, target)
    fault_point("after-rename", 0, step, part)
    return replaced
