"""Inspects checkpoints without a run: lists them, shows what one holds, verifies that it is as it was saved.

``tools/inspect_checkpoint.py`` prints the results. Verifying, and taking a digest, read all bytes of the tensors'
files; everything else, the comparison of two checkpoints included, reads the manifests alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.base.files import canonical_json
from megatron_hammer.base.progress import Progress, size_of
from megatron_hammer.base.tables import align
from megatron_hammer.checkpoint.digest import MODULUS, STATE_VALUES, digest_of
from megatron_hammer.checkpoint.folder import find_checkpoints, kept_aside
from megatron_hammer.checkpoint.manifest import (
    LogicalTensor,
    Manifest,
    SavedLayout,
    StateDigest,
    checked_tokenizer_folder,
    read_manifest,
    saved_model,
)
from megatron_hammer.checkpoint.read import LogicalReader, check_rank_file


def verify_checkpoint(manifest: Manifest) -> StateDigest:
    """Read the whole checkpoint and compare every slice, header and tokenizer file with its hash, keeping nothing.

    That the slices make up the tensors was checked when the manifest was read.

    Returns:
        the digest of the state (``digest.py``), computed from the bytes in the files.

    Raises:
        CheckpointError: names the first file, and tensor, that is not as it was saved.
    """
    saved_model(manifest)
    checked_tokenizer_folder(manifest)
    sums = [0] * len(manifest.tensors)
    with Progress(f"verifying {manifest.folder.name}", _size(manifest)) as progress:
        for file in manifest.files:
            for at, part in check_rank_file(manifest, file, progress.advance):
                sums[at] = (sums[at] + part) % MODULUS
    found = digest_of(manifest.tensors, sums, manifest.step, manifest.state)
    if (claimed := manifest.state_digest) is not None and found != claimed:
        differing = [t for t, ours, theirs in zip(manifest.tensors, found.sums, claimed.sums) if ours != theirs]
        what = f"{manifest.folder}: {differing[0] if differing else 'the state'}"
        raise CheckpointError(17, what, "does not match the digest of the state in it", "use another checkpoint")
    return found


def expect_digest(manifest: Manifest, found: StateDigest, expected: str) -> None:
    """Hold a checkpoint against a digest that was kept elsewhere, as ``digest`` printed it.

    Raises:
        ConfigError: it is neither of the two.
        CheckpointError: it is that of another state.
    """
    expected = expected.strip().lower()
    if re.fullmatch(r"[0-9a-f]{32}|[0-9a-f]{64}", expected) is None:
        rule, remedy = (
            "is neither a state digest (32 hex digits) nor a SHA-256 (64)",
            "take it from `digest CHECKPOINT`",
        )
        raise ConfigError(3, f"--expect={expected:.80}", rule, remedy)
    own = found.digest if len(expected) == 32 else sha256(manifest)
    if own != expected:
        raise CheckpointError(
            17, f"{manifest.folder} of digest {own}", f"must be of digest {expected}", "use another checkpoint"
        )


def sha256(manifest: Manifest) -> str:
    """SHA-256 over the tensors in the order of their names, and the state's values: a forger cannot meet it.

    Every byte is read in the tensors' order, so that the layout and the files make no difference.
    """
    hasher = hashlib.sha256()
    values = {name: manifest.state[name] for name in STATE_VALUES if name in manifest.state}
    hasher.update(canonical_json({"step": manifest.step, "state": values}))
    with LogicalReader(manifest) as reader, Progress(f"reading {manifest.folder.name}", _size(manifest)) as progress:
        for tensor in sorted(manifest.tensors, key=lambda t: (t.name, t.kind)):
            hasher.update(canonical_json([tensor.name, tensor.kind, list(tensor.shape), tensor.dtype]))
            for band in reader.bands(tensor.name, tensor.kind):
                content: Any = band.contiguous().view(-1).view(torch.uint8).numpy()
                hasher.update(content)
                progress.advance(content.nbytes)
    return hasher.hexdigest()


def digest_lines(manifest: Manifest, with_sha256: bool) -> Iterator[str]:
    """What ``digest`` prints: computed from the files, which are verified on the way."""
    yield f"state digest  {verify_checkpoint(manifest).digest}"
    if with_sha256:
        yield f"sha256        {sha256(manifest)}"


def checkpoint_differences(a: Manifest, b: Manifest) -> list[str]:
    """In what two checkpoints differ: step, state, settings and tensors; how they are cut into files does not count."""
    lines = [] if a.step == b.step else [f"step: {a.step} -> {b.step}"]
    flat = [dict(_flat("state", m.state)) | dict(_flat("config", m.config)) for m in (a, b)]
    for name in dict.fromkeys([*flat[0], *flat[1]]):
        old, new = (values.get(name, "absent") for values in flat)
        if old != new:
            lines.append(f"{name}: {old} -> {new}")
    tensors = [dict(zip(map(_identity, m.tensors), _known_digest(m).sums)) for m in (a, b)]
    for key in dict.fromkeys([*tensors[0], *tensors[1]]):
        if tensors[0].get(key) != tensors[1].get(key):
            name, kind, shape, dtype = key
            where = (
                "differs" if key in tensors[0] and key in tensors[1] else f"only in {(b, a)[key in tensors[0]].folder}"
            )
            lines.append(f"tensor {kind} {name} {' x '.join(map(str, shape))} {dtype}: {where}")
    return lines


def _identity(tensor: LogicalTensor) -> tuple[str, str, tuple[int, ...], str]:
    return (tensor.name, tensor.kind, tensor.shape, tensor.dtype)


def _known_digest(manifest: Manifest) -> StateDigest:
    """That of the manifest; of an old checkpoint, of its files."""
    return manifest.state_digest or verify_checkpoint(manifest)


def _flat(name: str, tree: Any) -> Iterator[tuple[str, str]]:
    """The leaves of a tree of JSON values, each with its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(f"{name}.{key}", value)
    else:
        yield name, json.dumps(tree, sort_keys=True)


def summarize(manifest: Manifest) -> str:
    """One line on a checkpoint: its step, its tensors and how large it is."""
    kinds = Counter(tensor.kind for tensor in manifest.tensors)
    tensors = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    return f"step {manifest.step}, {tensors}, {len(manifest.files)} files, {size_of(_size(manifest))}"


def list_checkpoints(run_or_folder: str | Path) -> list[str]:
    """A table of all committed checkpoints of a run, oldest first; one that cannot be read is named with its error.

    Raises:
        CheckpointError: there are none.
    """
    rows = [("checkpoint", "ranks", "tensors", "size", "")]
    for path in find_checkpoints(run_or_folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            rows.append((path.name, "-", "-", "-", str(error)))
            continue
        layout, size = manifest.layout, size_of(_size(manifest))
        rows.append((path.name, f"{layout.world} (tp {layout.tp}{_pp(layout)})", str(len(manifest.tensors)), size, ""))
    for path in kept_aside(run_or_folder):
        rows.append((path.name, "-", "-", "-", "damaged, or in the way of a save: kept aside, not loaded"))
    if len(rows) == 1:
        remedy = "name the output folder of a run or its checkpoints folder"
        raise CheckpointError(1, str(run_or_folder), "holds no checkpoint (no step-NNNNNNNN folder)", remedy)
    return align(rows)


def describe_checkpoint(manifest: Manifest) -> Iterator[str]:
    """What the manifest says, in lines: who wrote it, model, state, and every tensor with its files."""
    layout, model = manifest.layout, saved_model(manifest)
    parameters = sum(math.prod(tensor.shape) for tensor in manifest.tensors if tensor.kind == "weight")
    yield f"{manifest.folder}: {summarize(manifest)}"
    yield f"digest     {manifest.digest}"
    state_digest = manifest.state_digest
    yield f"of state   {'none: an older version wrote it' if state_digest is None else state_digest.digest}"
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


def _pp(layout: SavedLayout) -> str:
    """The pipeline, where there is one."""
    return f", pp {layout.pp}" if layout.pp > 1 else ""
