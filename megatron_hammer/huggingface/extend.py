"""Gives a model another vocabulary: embedding and head get the rows of a new tokenizer, all else stays bit for bit.

::

    old tokenizer, new tokenizer --plan_extension--> for each new id: the old ids whose mean its row is
    old matrix [v, h] --grown_rows, block by block--> new matrix [v', h]      (embedding; head, unless tied)
    every other tensor --------------------------> the same bytes

``extension_plan.py`` has the rules, ``extension_rows.py`` computes the rows.

Rows of the model beyond the old tokenizer (padding, as many models on the Hub have) belong to no token and are dropped,
and the new model has exactly the new tokenizer's ids: layers pad by themselves for tensor parallelism.

The result is of the kind that was given, a Hugging Face folder or a folder with a weights-only checkpoint of step 0
(``checkpoint.init_from`` of a new run). Optimizer moments and the count of consumed samples are not kept: both belong
to the old vocabulary's data. ``extension.json`` beside the weights says where each row that was not copied came from.

Memory: the old embedding or head, 50 MB for parts and blocks of new rows, and what two tokenizers and their conversion
take (0.25 GB for 105,789 ids, torch and transformers themselves not counted).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError, RefusedError
from megatron_hammer.base.files import dump_json, staged_folder, write_durably
from megatron_hammer.base.progress import say, track
from megatron_hammer.checkpoint.commit import SliceToWrite
from megatron_hammer.checkpoint.first import chunks_from, write_first_checkpoint, write_preset
from megatron_hammer.checkpoint.folder import Note, open_checkpoint, step_name
from megatron_hammer.checkpoint.manifest import TOKENIZER, checked_tokenizer_folder, saved_model
from megatron_hammer.checkpoint.read import LogicalReader, read_logical
from megatron_hammer.config import ModelConfig
from megatron_hammer.huggingface.config import (
    CONFIG,
    GENERATION_CONFIG,
    TOKEN_IDS,
    model_config_from_hf,
    read_json,
)
from megatron_hammer.huggingface.extension_plan import ORIGINS, ExtensionPlan, plan_extension
from megatron_hammer.huggingface.extension_rows import GrownMatrix
from megatron_hammer.huggingface.weights import HfWeights, check_tensors, write_weight_files
from megatron_hammer.model.parameters import EMBEDDING, HEAD, logical_shapes
from megatron_hammer.tokenizer.convert import convert_tokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer

REPORT = "extension.json"


@dataclass(frozen=True)
class _OldModel:
    """A model to be extended, of either kind, its tensors read when asked for."""

    kind: str
    folder: Path
    model: ModelConfig
    tokenizer: Path | None
    dtype: Callable[[str], str]
    read: Callable[[str], Tensor]
    parts: Callable[[str], Iterator[Tensor]]
    """A tensor's elements in order, a few MiB at a time; each part is gone when the next is asked for."""
    weights_dtype: str = ""
    """Of a checkpoint: that in which the model computes."""


def _open_hf(folder: Path, stack: ExitStack, ignore: Collection[str], note: Note) -> _OldModel:
    model = model_config_from_hf(read_json(folder / CONFIG), str(folder / CONFIG), ignore, note)
    weights = stack.enter_context(HfWeights(folder, model.tie_word_embeddings))
    check_tensors(weights, model)
    has_tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    tokenizer = folder if has_tokenizer else None
    return _OldModel(
        "Hugging Face", folder, model, tokenizer, lambda name: weights.entry(name).dtype, weights.read, weights.parts
    )


def _open_checkpoint(path: Path, stack: ExitStack) -> _OldModel:
    manifest = open_checkpoint(path)
    reader = stack.enter_context(LogicalReader(manifest))

    def dtype(name: str) -> str:
        return manifest.tensors[manifest.index[name, "weight"]].dtype

    def read(name: str) -> Tensor:
        return read_logical(manifest, name)

    model, tokenizer = saved_model(manifest), checked_tokenizer_folder(manifest)
    return _OldModel("checkpoint", manifest.folder, model, tokenizer, dtype, read, reader.bands, manifest.weights_dtype)


def extend_model(
    model: str | Path,
    new_tokenizer: str | Path,
    output: str | Path,
    old_tokenizer: str | Path | None = None,
    note: Note = say,
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Write ``model`` with the vocabulary of ``new_tokenizer`` to ``output``, whole or not at all.

    Args:
        model: a Hugging Face folder, or a run, checkpoints or checkpoint folder of ours.
        output: does not exist, or is an empty folder.
        old_tokenizer: that of ``model``; None: the one in it.
        note: called with a line that the user should read beside the report.
        ignore: unknown keys of ``config.json`` that do not change what the model computes.

    Returns:
        the report, which is ``extension.json`` in ``output`` but for the list ``rows``.

    Raises:
        ConfigError: E281 there is no old tokenizer.
        RefusedError: E530 the model has fewer rows than the old tokenizer has ids, E531 the vocabularies are the same,
            E532 ``output`` is taken, E533 ``old_tokenizer`` is not the checkpoint's; E501, E502 the new tokenizer
            cannot be written as a Hugging Face folder.
        CheckpointError, DataError: something given cannot be read, or is a model that ours cannot be.
    """
    source_path, output = Path(model), Path(os.path.abspath(output))
    if os.path.lexists(output) and not (output.is_dir() and not output.is_symlink() and not any(output.iterdir())):
        raise RefusedError(32, f"--output {output}", "exists already", "name a new folder")
    with ExitStack() as stack:
        is_hf = (source_path / CONFIG).is_file()
        if ignore and not is_hf:
            raise ConfigError(
                82, f"--ignore {min(ignore)}", f"is for Hugging Face folders; {model} is none", "remove it"
            )
        source = _open_hf(source_path, stack, ignore, note) if is_hf else _open_checkpoint(source_path, stack)
        old, new = _load_tokenizers(source, old_tokenizer, new_tokenizer)
        plan = plan_extension(old, new)
        assert source.model.vocab_size is not None
        unchanged = plan.size == old.vocab_size and set(plan.origins) == {"copied"}
        if unchanged and plan.sources.tolist() == list(range(plan.size)):
            raise _same_vocabulary(new, old)
        if padding := source.model.vocab_size - old.vocab_size:
            note(f"{padding} rows of {source.folder} belong to no id of {old.path}: they are dropped")
            if old.path.name == "tokenizer.model" and old.path.with_name("tokenizer.json").is_file():
                note(f"if {old.path.with_name('tokenizer.json')} has tokens for them, name it with --old-tokenizer")
        report = _describe(source, old, new, plan)
        with staged_folder(output) as staging:  # renamed over an empty folder, never over one that was filled meanwhile
            write_extension_report(staging / REPORT, report, plan)
            extended = replace(source.model, vocab_size=plan.size)
            if is_hf:
                note(f"converting {new.path}, with proof: some 10 s for 100,000 ids")
                _write_hf(source, extended, new, plan, staging)
            else:
                _write_checkpoint(source, extended, new, plan, staging)
                tokenizer = output / "checkpoints" / step_name(0) / TOKENIZER  # where it will be, not where it is
                write_preset(staging / "model.yaml", extended, tokenizer)
    return report


def _load_tokenizers(
    source: _OldModel, old_tokenizer: str | Path | None, new_tokenizer: str | Path
) -> tuple[Tokenizer, Tokenizer]:
    """Old and new, checked against the model and each other."""
    if old_tokenizer is None and source.tokenizer is None:
        raise ConfigError(
            81, "--old-tokenizer", f"is not given, and {source.folder} holds no tokenizer",
            "name the tokenizer that the model was trained with",
        )  # fmt: skip
    old = load_tokenizer(old_tokenizer or source.tokenizer or "")
    if source.kind == "checkpoint" and source.tokenizer is not None and old_tokenizer is not None:
        own = load_tokenizer(source.tokenizer)
        if own.fingerprint != old.fingerprint:
            raise RefusedError(
                33, f"--old-tokenizer {old_tokenizer}", f"is not the tokenizer that {source.folder} was trained with",
                f"leave it out to use {source.tokenizer}",
            )  # fmt: skip
    assert source.model.vocab_size is not None
    if old.vocab_size > source.model.vocab_size:
        raise RefusedError(
            30, f"old tokenizer {old.path} of {old.vocab_size} ids",
            f"does not fit {source.folder}, which has {source.model.vocab_size} rows",
            "name the tokenizer that the model was trained with",
        )  # fmt: skip
    new = load_tokenizer(new_tokenizer)
    if new.fingerprint == old.fingerprint:
        raise _same_vocabulary(new, old)
    return old, new


def _same_vocabulary(new: Tokenizer, old: Tokenizer) -> RefusedError:
    return RefusedError(
        31, f"--new-tokenizer {new.path}", f"has the same tokens at the same ids as {old.path}",
        "name another tokenizer, or use the model as it is",
    )  # fmt: skip


def _slices(source: _OldModel, extended: ModelConfig, plan: ExtensionPlan) -> list[SliceToWrite]:
    """All tensors of the new model as what is to be written one after the other, the grown ones in blocks of rows."""
    slices = []
    for name, shape in logical_shapes(extended).items():
        dtype = source.dtype(name)
        if name in (EMBEDDING, HEAD):
            grown = GrownMatrix(partial(source.read, name), plan, shape[1])
            for start, stop in grown.ranges:
                box, chunks = (stop - start, shape[1]), chunks_from(partial(grown.blocks, start, stop))
                slices.append(SliceToWrite(name, "weight", (start, stop), (0, shape[1]), box, dtype, chunks))
        else:
            cols = (0, shape[1]) if len(shape) == 2 else None
            chunks = chunks_from(partial(source.parts, name))
            slices.append(SliceToWrite(name, "weight", (0, shape[0]), cols, shape, dtype, chunks))
    return slices


def _write_hf(source: _OldModel, extended: ModelConfig, new: Tokenizer, plan: ExtensionPlan, folder: Path) -> None:
    """Config with the new sizes and ids, tokenizer, weights; each tensor is read back."""
    convert_tokenizer(new, folder, max_length=extended.max_position_embeddings)  # first: it may refuse
    tree = read_json(source.folder / CONFIG)
    absent = {key: getattr(new, role) for key, role in TOKEN_IDS.items() if key not in tree}
    changed = {**_renumbered(tree, plan, new), **absent, "vocab_size": plan.size}
    write_durably(folder / CONFIG, dump_json(changed))
    if (source.folder / GENERATION_CONFIG).is_file():
        generation = read_json(source.folder / GENERATION_CONFIG)
        write_durably(folder / GENERATION_CONFIG, dump_json(_renumbered(generation, plan, new)))
    by_name: dict[str, list[SliceToWrite]] = {}
    for part in _slices(source, extended, plan):
        by_name.setdefault(part.name, []).append(part)
    tensors = {name: (source.dtype(name), shape) for name, shape in logical_shapes(extended).items()}
    hashes = write_weight_files(
        folder,
        tensors,
        lambda name: (chunk for part in by_name[name] for chunk in part.chunks()),
    )
    with HfWeights(folder) as written:
        check_tensors(written, extended)
        for name in track(hashes, "reading back", len(hashes), "tensors"):
            if written.hash_of(name) != hashes[name]:
                raise CheckpointError(
                    16, f"{folder / written.where[name]}: {name}", "reads back differently than it was written",
                    "suspect the disk or the memory of this machine",
                )  # fmt: skip


def _renumbered(tree: Mapping[str, Any], plan: ExtensionPlan, new: Tokenizer) -> dict[str, Any]:
    """A config whose bos, eos and pad ids are the new ids of the same tokens; of a lost token, that of its role."""
    new_ids: dict[int, int] = {}
    for index in range(plan.size):
        if plan.origins[index] in ("copied", "role"):
            new_ids.setdefault(int(plan.sources[plan.offsets[index]]), index)
    changed = dict(tree)
    for key, role in TOKEN_IDS.items():
        value = tree.get(key)
        if isinstance(value, list):  # several ends, as Llama 3 has
            kept = [new_ids[v] for v in value if v in new_ids]
            changed[key] = kept or getattr(new, role)
        elif value is not None:
            changed[key] = new_ids.get(value, getattr(new, role))
    return changed


def _write_checkpoint(
    source: _OldModel, extended: ModelConfig, new: Tokenizer, plan: ExtensionPlan, folder: Path
) -> None:
    """``checkpoints/step-00000000``, as ``import_hf`` leaves it."""
    write_first_checkpoint(
        folder / "checkpoints",
        _slices(source, extended, plan),
        model=extended,
        state={"token_ids": {key: getattr(new, role) for key, role in TOKEN_IDS.items()}},
        weights_dtype=source.weights_dtype,
        tokenizer=new,
        watch=lambda items: track(items, "writing weights", len(items), "blocks"),
    )


def _describe(source: _OldModel, old: Tokenizer, new: Tokenizer, plan: ExtensionPlan) -> dict[str, Any]:
    counts = np.diff(plan.offsets)
    averaged = np.array([origin in ("pieces", "bytes") for origin in plan.origins], bool)
    kept = {int(plan.sources[plan.offsets[i]]) for i in range(plan.size) if plan.origins[i] in ("copied", "role")}
    same = Counter(tuple(sorted(plan.sources_of(int(i)))) for i in np.nonzero(averaged & (counts > 1))[0])
    origins = Counter(plan.origins)
    return {
        "format": "megatron_hammer.extension-1",
        "model": {"kind": source.kind, "path": str(source.folder)},
        "old": {"tokenizer": str(old.path), "fingerprint": old.fingerprint, "ids": old.vocab_size,
                "rows": source.model.vocab_size},
        "new": {"tokenizer": str(new.path), "fingerprint": new.fingerprint, "ids": new.vocab_size},
        "tied": source.model.tie_word_embeddings,
        "origins": {origin: origins[origin] for origin in ORIGINS},
        "pieces_per_averaged_id": {
            str(n): k for n, k in sorted(Counter(counts[averaged].tolist()).items())
        },
        "averaged_ids_equal_to_another": sum(k for k in same.values() if k > 1),
        "old_ids_without_successor": len(plan.old_ids) - len(kept),
    }  # fmt: skip


def write_extension_report(path: Path, report: Mapping[str, Any], plan: ExtensionPlan) -> None:
    """The report and, one a line, ``rows``: [new id, token, origin, old ids] of each row that is not a copy."""
    rows = [
        [i, plan.tokens[i].content.decode(errors="backslashreplace"), origin, plan.sources_of(i)]
        for i, origin in enumerate(plan.origins)
        if origin != "copied"
    ]
    head = json.dumps(report, indent=2, ensure_ascii=False).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_durably(path, f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n'.encode())


def extension_summary(report: Mapping[str, Any]) -> str:
    """The report in a few lines for people."""
    origins, old, new = report["origins"], report["old"], report["new"]
    averaged = origins["pieces"] + origins["bytes"]
    lengths = {int(n): k for n, k in report["pieces_per_averaged_id"].items()}
    lines = [f"{old['rows']:,} rows -> {new['ids']:,}: {origins['copied']:,} copied by content"]
    if origins["role"]:
        lines.append(f"{origins['role']:,} copied from the control token of the same role")
    if averaged:
        mean = sum(n * k for n, k in lengths.items()) / averaged
        lines.append(
            f"{averaged:,} averaged over {mean:.2f} old pieces ({min(lengths)} to {max(lengths)}), "
            f"{origins['bytes']:,} of them from bytes, "
            f"{report['averaged_ids_equal_to_another']:,} of them equal to another new row"
        )
    if origins["mean"]:
        lines.append(f"{origins['mean']:,} without text in the old tokenizer: the mean of all old rows")
    if report["old_ids_without_successor"]:
        lines.append(f"{report['old_ids_without_successor']:,} of the old ids have no token in the new vocabulary")
    return "\n".join(lines)
