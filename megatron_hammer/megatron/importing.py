"""Imports a checkpoint of Megatron-LM as one of ours, of step 0 with weights alone, in the types that they have.

::

    mp_rank_* or torch_dist --merged, one tensor at a time--> SAVE/checkpoints/step-00000000/
                                                              SAVE/model.yaml, the preset for the run that continues
    with a Hugging Face twin: logits of both compared before the checkpoint counts

The model follows from the arguments that the checkpoint holds; a feature that ours lacks is refused by its name, and so
is a tensor that the model has no place for. Padding rows of the vocabulary are cut off. The optimizer's state is left
behind unless it is asked for (``resuming.py``); a note says which format it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.base.files import remove_folder, replace_file
from megatron_hammer.base.progress import say, track
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.checkpoint.commit import SliceToWrite
from megatron_hammer.checkpoint.dtypes import DTYPE_NAMES, common_dtype
from megatron_hammer.checkpoint.first import refuse_taken, write_first_checkpoint, write_preset
from megatron_hammer.checkpoint.folder import Note
from megatron_hammer.checkpoint.manifest import TOKENIZER, read_manifest
from megatron_hammer.checkpoint.write import chunks_of
from megatron_hammer.config import ModelConfig, config_to_tree, to_yaml
from megatron_hammer.huggingface.certificate import compare, our_logits
from megatron_hammer.huggingface.config import CONFIG, TOKEN_IDS, check_vocabulary, read_json
from megatron_hammer.huggingface.transformers_model import load_causal
from megatron_hammer.megatron.distributed import FULLY_RESHARDABLE, DistributedReader
from megatron_hammer.megatron.legacy import LegacyReader
from megatron_hammer.megatron.resuming import KINDS_THERE, resumable
from megatron_hammer.megatron.translation import (
    EMBEDDING_THERE,
    OUTPUT_THERE,
    MegatronTensor,
    full_name,
    merged_rows,
    model_of,
    rows_of_part,
    tensor_place,
)
from megatron_hammer.model.parameters import logical_shapes
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_\d{7,}|release")
_COMPUTED = ("inv_freq",)  # old versions stored these; they follow from the arguments
_TWIN_TOKENS = 64


class MegatronCheckpoint(Protocol):
    """A checkpoint, by the reader of its layout."""

    kind: str
    folder: Path
    args: dict[str, Any]
    iteration: int
    optimizer: str
    """What there is of its state, in words; empty: nothing."""

    def names(self) -> Iterable[tuple[str, int | None]]:
        """All tensors, each with its layer."""

    def dtype(self, name: str, layer: int | None) -> torch.dtype:
        """The type in which a tensor is stored."""

    def rows(self, name: str) -> int:
        """Of the embedding, padding included; nothing is read for it."""

    def tensor(self, name: str, layer: int | None) -> Tensor:
        """A whole tensor, padding included."""


def find_iteration(path: Path) -> Path:
    """The folder of one iteration: the path itself, or the newest of a run.

    Raises:
        CheckpointError: E430 there is none.
    """
    if (path / "metadata.json").is_file() or any(path.glob("mp_rank_*")):
        return path
    remedy = "name a folder iter_NNNNNNN of Megatron-LM, or the one above it"
    tracker = path / TRACKER
    if not tracker.is_file():
        rule = "is no checkpoint of Megatron-LM (mp_rank_* or torch_dist)" if path.is_dir() else "is not a folder"
        iterations = sorted(found.name for found in path.glob("iter_*") if _ITERATION.fullmatch(found.name))
        if iterations:
            rule, remedy = f"has no {TRACKER} that names the newest whole one", f"name one, as {path / iterations[-1]}"
        elif (path / ".metadata").is_file():
            rule, remedy = "has the .metadata of torch_dist and no metadata.json", "copy the whole checkpoint"
        raise CheckpointError(30, str(path), rule, remedy)
    text = read_regular(tracker, 100, follow=False).decode(errors="replace").strip()
    name = text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else ""
    if not _ITERATION.fullmatch(name) or not (path / name).is_dir():
        raise CheckpointError(30, f"{tracker}: {text[:40]!r}", "names no checkpoint that is there", remedy)
    return find_iteration(path / name)


def open_reader(folder: Path) -> MegatronCheckpoint:
    """The reader of the checkpoint in a folder, in whichever layout.

    Raises:
        CheckpointError: E430 another layout, or what reading it raises.
    """
    if not (folder / "metadata.json").is_file():
        return LegacyReader(folder)
    try:
        tree = parse_json(read_regular(folder / "metadata.json", follow=False))
    except ValueError:
        tree = None
    backend = tree.get("sharded_backend") if isinstance(tree, dict) else None
    if backend != "torch_dist":
        remedy = "save it with --ckpt-format torch_dist"
        raise CheckpointError(30, f"{folder / 'metadata.json'}: sharded_backend={backend}", "is not torch_dist", remedy)
    return DistributedReader(folder)


def import_megatron(
    load: str | Path,
    save: str | Path,
    tokenizer_path: str | Path | None = None,
    vocab_size: int | None = None,
    twin: str | Path | None = None,
    with_optimizer: bool = False,
    note: Note = say,
) -> Path:
    """Write a checkpoint of Megatron-LM as ``save/checkpoints/step-00000000``, or with its optimizer as step-N.

    Args:
        tokenizer_path: goes into the checkpoint, and says how many rows of the vocabulary are real.
        vocab_size: the same number, where no tokenizer is given.
        twin: a Hugging Face folder of the same weights; the checkpoint stays only if the logits are equal.
        with_optimizer: take masters and moments over, too: a run whose output is ``save`` goes on from there.

    Raises:
        CheckpointError: E430 to E435: what cannot be read or converted, by its name.
        RefusedError: E527 ``save`` holds something else; E520 the logits are not those of the twin.
    """
    refuse_taken(Path(save), "--save")
    reader = open_reader(find_iteration(Path(load)))
    padded = reader.rows(EMBEDDING_THERE) if (EMBEDDING_THERE, None) in set(reader.names()) else 0
    if not padded:
        raise CheckpointError(
            34, f"{reader.folder}: {EMBEDDING_THERE}", "is missing", "name a checkpoint of a GPT model"
        )
    tokenizer = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    rows = true_vocabulary(reader, padded, tokenizer, vocab_size, twin, note)
    model = model_of(reader.args, rows, str(reader.folder))
    if tokenizer is not None:
        check_vocabulary(tokenizer, model)
    slices = _slices(reader, model)
    weights_dtype = common_dtype(piece.dtype for piece in slices)
    resumed = resumable(reader, model) if with_optimizer else None
    if resumed is not None:
        slices = [
            piece
            for kind, theirs in KINDS_THERE.items()
            for piece in _slices(resumed.reader.of_optimizer(theirs), model, kind)
        ]
    cut = f"{padded - rows} padding rows of {padded} are cut off"
    note(f"{reader.folder}: {reader.kind}, iteration {reader.iteration}; {cut}")
    if reader.optimizer and resumed is None:
        more = " (--optimizer does)" if FULLY_RESHARDABLE in reader.optimizer else ""
        note(f"optimizer state {reader.optimizer}: it is not taken over, weights alone are{more}")
    target = write_first_checkpoint(
        Path(save) / "checkpoints",
        slices,
        model=model,
        state={
            "token_ids": {key: getattr(tokenizer, role, None) for key, role in TOKEN_IDS.items()},
            "megatron": {"iteration": reader.iteration, "format": reader.kind},
            **({} if resumed is None else resumed.state),
        },
        weights_dtype=weights_dtype,
        tokenizer=tokenizer,
        watch=lambda items: track(items, "merging weights", len(items), "tensors"),
        step=0 if resumed is None else reader.iteration,
        config_tree=None if resumed is None else config_to_tree(resumed.config),
    )
    if twin is not None:
        try:
            note(prove_twin(target, model, Path(twin)))
        except BaseException:
            remove_folder(target)
            raise
    if resumed is None:
        write_preset(Path(save) / "model.yaml", model, target / TOKENIZER if tokenizer else None)
    else:
        path = str(target / TOKENIZER) if tokenizer else None
        config = replace(resumed.config, tokenizer=replace(resumed.config.tokenizer, path=path))
        replace_file(Path(save) / "model.yaml", to_yaml(config).encode())
    return target


def true_vocabulary(
    reader: MegatronCheckpoint,
    padded: int,
    tokenizer: Tokenizer | None,
    vocab_size: int | None,
    twin: str | Path | None,
    note: Note = say,
) -> int:
    """How many rows of the embedding are no padding: as the user says, else the tokenizer, the twin, the arguments.

    Raises:
        ConfigError: E233 more than there are.
    """
    said: int | None = vocab_size
    if said is None and twin is not None:
        said = read_json(Path(twin) / CONFIG).get("vocab_size")
    if said is None and tokenizer is not None:
        said = tokenizer.vocab_size
    if said is None and type(reader.args.get("vocab_size")) is int:
        said = reader.args["vocab_size"]
    if said is None:
        note(f"nothing says how many of the {padded} rows of the vocabulary are padding: all are kept (--vocab-size)")
        return padded
    if not 1 <= said <= padded:
        rule = f"must be between 1 and the {padded} rows of the embedding"
        raise ConfigError(32, f"vocabulary of {said}", rule, "give the tokenizer that the model was trained with")
    return said


class _Merged:
    """The merged tensor that was asked for last: q, k and v follow each other."""

    def __init__(self, reader: MegatronCheckpoint) -> None:
        self._reader, self._last = reader, ("", -1, torch.empty(0))

    def __call__(self, name: str, layer: int | None) -> Tensor:
        if self._last[:2] != (name, layer):
            self._last = ("", -1, torch.empty(0))  # one at a time
            self._last = (name, layer, self._reader.tensor(name, layer))  # type: ignore[assignment]
        return self._last[2]


def _slices(reader: MegatronCheckpoint, model: ModelConfig, kind: str = "weight") -> list[SliceToWrite]:
    """All logical tensors of the model, each with how its bytes come about; all that is there must be used."""
    there, used = set(reader.names()), set[tuple[str, int | None]]()
    merged, slices = _Merged(reader), []
    for tensor, shape in logical_shapes(model).items():
        place = tensor_place(tensor)
        found = next(((name, place.layer) for name in place.names if (name, place.layer) in there), None)
        if found is None:
            shown = full_name(place.names[0], place.layer)
            raise CheckpointError(34, f"{reader.folder}: {shown}", "is missing", "restore the checkpoint")
        used.add(found)
        dtype = DTYPE_NAMES.get(reader.dtype(*found))
        if dtype is None:
            rule = f"is of type {reader.dtype(*found)}: only {', '.join(DTYPE_NAMES.values())} can be converted"
            remedy = "save the model in one of these types"
            raise CheckpointError(34, f"{reader.folder}: {full_name(*found)}", rule, remedy)
        cols = (0, shape[1]) if len(shape) == 2 else None
        read = partial(_part, reader, merged, found, place, model, shape)
        slices.append(SliceToWrite(tensor, kind, (0, shape[0]), cols, shape, dtype, _chunks(read)))
    for name, layer in sorted(there - used, key=str):
        if not (name.endswith(_COMPUTED) or (name == OUTPUT_THERE and model.tie_word_embeddings)):
            rule = "is no tensor of the model that the arguments describe"
            raise CheckpointError(34, f"{reader.folder}: {full_name(name, layer)}", rule, "convert a Llama-like model")
    return slices


def _chunks(read: Callable[[], Tensor]) -> Callable[[], Iterable[Any]]:
    return lambda: chunks_of(read())


def _part(
    reader: MegatronCheckpoint,
    merged: _Merged,
    found: tuple[str, int | None],
    place: MegatronTensor,
    model: ModelConfig,
    shape: tuple[int, ...],
) -> Tensor:
    """A logical tensor, cut out of the merged one."""
    whole = merged(*found)
    rows = merged_rows(place.part, model)
    least = shape[0] if place.part == "vocabulary" else 0
    expected = rows if rows is not None else (whole.shape[0] if place.part == "vocabulary" else shape[0])
    if tuple(whole.shape) != (expected, *shape[1:]) or whole.shape[0] < least:
        rule = f"has the shape {list(whole.shape)}, where the arguments ask for {[expected, *shape[1:]]}"
        raise CheckpointError(34, f"{reader.folder}: {full_name(*found)}", rule, "restore the checkpoint")
    return torch.cat([whole[first:last] for first, last in rows_of_part(place.part, whole.shape[0], model)])


def prove_twin(checkpoint: Path, model: ModelConfig, twin: Path) -> str:
    """Compare logits of the checkpoint and of a Hugging Face folder; what was found, in a line.

    Raises:
        RefusedError: E520 they differ.
        CheckpointError: E491 the twin cannot be loaded.
    """
    assert model.vocab_size is not None and model.max_position_embeddings is not None
    manifest, length = read_manifest(checkpoint), min(_TWIN_TOKENS, model.max_position_embeddings)
    ids = [[(i * 2654435761 + k * 40503) % model.vocab_size for i in range(length)] for k in range(2)]
    ours = our_logits(manifest, model, manifest.weights_dtype, ids)
    theirs = load_causal(twin, torch.float32)
    remedy = f"name a twin of the same weights, of the same type ({manifest.weights_dtype}), or none"
    found = [compare(f"ids-{k}", ours[k], theirs, row, remedy) for k, row in enumerate(ids)]
    worst = max(found, key=lambda result: result["max_difference"])
    return (
        f"logits equal {twin}'s: max |difference| {worst['max_difference']:.2g} at max |logit| {worst['max_logit']:.3g}"
    )
