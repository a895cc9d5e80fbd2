"""Looking into checkpoints without a run: which ones there are, what one holds, and whether it is as it was saved.

Behind ``tools/inspect_checkpoint.py``. Only ``verify_checkpoint`` opens the tensors' files; it reads all their bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.progress import Progress
from megatron_hammer.base.tables import align
from megatron_hammer.checkpoint.folder import find_checkpoints
from megatron_hammer.checkpoint.manifest import Layout, Manifest, checked_tokenizer_folder, read_manifest, saved_model
from megatron_hammer.checkpoint.read import check_file


def verify_checkpoint(manifest: Manifest) -> None:
    """Read the whole checkpoint and compare every slice, header and tokenizer file with its hash, keeping nothing.

    That the slices make up the tensors was checked when the manifest was read.

    Raises:
        CheckpointError: names the first file, and tensor, that is not as it was saved.
    """
    saved_model(manifest)
    checked_tokenizer_folder(manifest)
    with Progress(f"verifying {manifest.folder.name}", _size(manifest)) as progress:
        for file in manifest.files:
            check_file(manifest, file)
            progress.advance(file.size)


def summarize(manifest: Manifest) -> str:
    """One line on a checkpoint: its step, its tensors and how large it is."""
    kinds = Counter(tensor.kind for tensor in manifest.tensors)
    tensors = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    return f"step {manifest.step}, {tensors}, {len(manifest.files)} files, {_size(manifest) / 1e9:,.2f} GB"


def list_checkpoints(run_or_folder: str | Path) -> list[str]:
    """A table of all committed checkpoints of a run, oldest first; one that cannot be read is named with its error.

    Raises:
        CheckpointError: there are none.
    """
    rows = [("checkpoint", "ranks", "tensors", "GB", "")]
    for path in find_checkpoints(run_or_folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            rows.append((path.name, "-", "-", "-", str(error)))
            continue
        layout, size = manifest.layout, f"{_size(manifest) / 1e9:,.2f}"
        rows.append((path.name, f"{layout.world} (tp {layout.tp}{_pp(layout)})", str(len(manifest.tensors)), size, ""))
    if len(rows) == 1:
        remedy = "name the output folder of a run or its checkpoints folder"
        raise CheckpointError(1, str(run_or_folder), "holds no checkpoint (no step-NNNNNNNN folder)", remedy)
    return align(rows)


def describe(manifest: Manifest) -> Iterator[str]:
    """What the manifest says, in lines: who wrote it, model, state, and every tensor with its files."""
    layout, model = manifest.layout, saved_model(manifest)
    parameters = sum(math.prod(tensor.shape) for tensor in manifest.tensors if tensor.kind == "weight")
    yield f"{manifest.folder}: {summarize(manifest)}"
    yield f"digest     {manifest.digest}"
    context_parallel = f"cp {layout.cp}, " if layout.cp > 1 else ""
    tensor_parallel = f"tp {layout.tp}{_pp(layout)}"
    parallel = f"{tensor_parallel}, {context_parallel}dp {layout.dp}, sequence_parallel {layout.sequence_parallel}"
    yield f"written by {layout.world} ranks, {parallel}"
    yield f"model      {parameters:,} parameters, computes in {manifest.weights_dtype}; {model}"
    yield f"tokenizer  {manifest.tokenizer.fingerprint if manifest.tokenizer else 'none'}"
    for name, value in sorted(manifest.state.items()):
        yield from _state_lines(f"state      {name}", value)
    files: dict[int, list[str]] = {}
    for file in manifest.files:
        for saved in file.slices:
            files.setdefault(saved.tensor, []).append(file.name)
    rows = [("tensor", "kind", "shape", "type", "files")]
    for index, tensor in enumerate(manifest.tensors):
        shape = " x ".join(map(str, tensor.shape))
        rows.append((tensor.name, tensor.kind, shape, tensor.dtype, str(len(set(files[index])))))
    yield from align(rows)


def _state_lines(name: str, value: Any) -> Iterator[str]:
    """A value of the state; of records (datasets, accepted changes), each on a line of its own."""
    if isinstance(value, dict) and any(isinstance(part, dict | list) for part in value.values()):
        for key, part in value.items():
            yield from _state_lines(f"{name}.{key}", part)
    elif isinstance(value, list) and value:
        for part in value:
            yield from _state_lines(name, part)
    elif isinstance(value, dict):
        yield f"{name}: " + ", ".join(f"{key} {part}" for key, part in value.items())
    else:
        yield f"{name}: {value}"


def _size(manifest: Manifest) -> int:
    """Bytes of the tensors' files."""
    return sum(file.size for file in manifest.files)


def _pp(layout: Layout) -> str:
    """The pipeline, where there is one."""
    return f", pp {layout.pp}" if layout.pp > 1 else ""
