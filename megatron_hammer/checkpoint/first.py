"""The first checkpoint of a model whose weights come from elsewhere, and the preset for the run that continues.

::

    FOLDER/checkpoints/step-00000000/   weights alone, in the types that they have
    FOLDER/model.yaml                   the model's settings

An import (``huggingface/``, ``megatron/``), an average and a model with another vocabulary become one. ``FOLDER`` can
then be named wherever a checkpoint or a run can: exported, generated from, or begun with by ``checkpoint.init_from``.
What comes with its optimizer has the step that it had reached.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.base.files import replace_file, staging_path
from megatron_hammer.checkpoint.commit import SliceToWrite, SliceWatch, commit, write_rank
from megatron_hammer.checkpoint.folder import clean_up, find_checkpoints, step_name
from megatron_hammer.checkpoint.manifest import MANIFEST, SavedLayout
from megatron_hammer.checkpoint.tensor_files import ITEM_BYTES
from megatron_hammer.checkpoint.write import chunks_of, stage_tokenizer
from megatron_hammer.config import DataConfig, ModelConfig
from megatron_hammer.tokenizer.interface import Tokenizer


def refuse_taken(folder: Path, option: str) -> None:
    """Refuse to write a first checkpoint into the folder of a run, or of a Hugging Face model.

    Args:
        option: of the program, that names the folder.

    Raises:
        RefusedError: E527.
    """
    if trained := [p for p in find_checkpoints(folder / "checkpoints") if p.name != step_name(0)]:
        rule = f"already holds {trained[-1].name} of a run"
        raise RefusedError(27, f"{option} {folder}", rule, "name another folder")
    if (folder / "config.json").is_file():
        rule = "is a Hugging Face model, and a checkpoint beside its files would be part of it"
        raise RefusedError(27, f"{option} {folder}", rule, f"name a new folder, such as {folder}-checkpoint")


def chunks_from(parts: Callable[[], Iterable[Tensor]]) -> Callable[[], Iterator[Any]]:
    """Gives the bytes of a slice that comes in several tensors; one of them may be gone when the next is asked for."""
    return lambda: (chunk for part in parts() for chunk in chunks_of(part))


def write_first_checkpoint(
    folder: Path,
    slices: Sequence[SliceToWrite],
    *,
    model: ModelConfig,
    state: Mapping[str, Any],
    weights_dtype: str,
    tokenizer: Tokenizer | None,
    watch: SliceWatch = iter,
    step: int = 0,
    config_tree: Mapping[str, Any] | None = None,
) -> Path:
    """Write weights from elsewhere as ``folder/step-00000000``, whole or not at all; no communication.

    Args:
        folder: of checkpoints; made where it is missing, what crashed programs left in it is removed.
        slices: together all weights of ``model``. Wider types are written first, so that every tensor starts aligned.
        state: JSON values.
        watch: wraps the loop over the slices, for a progress bar.
        step: of a state that comes with its optimizer, whose slices are among these.
        config_tree: of the run that goes on from there; None: the model's alone.

    Returns:
        the committed folder.

    Raises:
        CheckpointError: the disk gives back something else than was written.
    """
    target = folder / step_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    clean_up(folder)
    staging = staging_path(target)
    staging.mkdir()
    try:
        write_rank(staging, 0, sorted(slices, key=lambda s: -ITEM_BYTES[s.dtype]), watch)
        replaced = commit(
            staging,
            target,
            step=step,
            model=model,
            config_tree=config_tree or {"model": asdict(model)},
            state=state,
            weights_dtype=weights_dtype,
            layout=SavedLayout(),
            tokenizer=None if tokenizer is None else stage_tokenizer(tokenizer, staging),
        )
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    if replaced is not None and (replaced / MANIFEST).is_file() and not replaced.is_symlink():
        shutil.rmtree(replaced, ignore_errors=True)  # an import of before, which the user has asked for once more
    return target


def write_preset(path: Path, model: ModelConfig, tokenizer: Path | None) -> None:
    """A preset with the model's settings, for the run that continues from these weights."""
    assert model.max_position_embeddings is not None
    preset: dict[str, Any] = {"model": asdict(model)}
    preset["data"] = {"seq_length": min(DataConfig.seq_length, model.max_position_embeddings)}
    if tokenizer is not None:
        preset["tokenizer"] = {"path": str(tokenizer)}
    replace_file(path, yaml.safe_dump(preset, sort_keys=False).encode())
