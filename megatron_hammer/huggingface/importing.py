"""Imports a Hugging Face model as a checkpoint of step 0 that holds weights only, in the types that they have.

::

    HF folder --4 MiB by 4 MiB--> SAVE/checkpoints/step-00000000/
                                  SAVE/model.yaml   a preset with the model's settings, for the run that continues

A feature that our model does not have is refused by its name, never dropped; keys without effect are named.
Memory: 30 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial
from pathlib import Path

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.base.paths import missing_remedy, unusable_remedy, what_is
from megatron_hammer.base.progress import say, track
from megatron_hammer.checkpoint.commit import SliceToWrite
from megatron_hammer.checkpoint.dtypes import common_dtype
from megatron_hammer.checkpoint.first import chunks_from, refuse_taken, write_first_checkpoint, write_preset
from megatron_hammer.checkpoint.folder import Note, step_name
from megatron_hammer.checkpoint.manifest import TOKENIZER
from megatron_hammer.huggingface.config import CONFIG, TOKEN_IDS, check_vocabulary, model_config_from_hf, read_json
from megatron_hammer.huggingface.weights import HfWeights, check_tensors
from megatron_hammer.model.parameters import logical_shapes
from megatron_hammer.tokenizer.load import load_tokenizer


def import_hf(hf_dir: str | Path, save_dir: str | Path, note: Note = say, ignore: Collection[str] = ()) -> Path:
    """Write a Llama, Mistral, Qwen2 or Qwen3 as ``save_dir/checkpoints/step-00000000``: weights only, in their types.

    ``save_dir`` can then be named wherever a checkpoint or run can: ``--load`` and ``checkpoint.init_from``. Its
    ``model.yaml`` is a preset with the model's settings, for the run that continues.

    Args:
        ignore: unknown keys of ``config.json`` that do not change what the model computes.

    Raises:
        CheckpointError: a feature, tensor or type that cannot be converted, by name.
        RefusedError: ``save_dir`` holds checkpoints of a training run, or a Hugging Face model.
    """
    source, folder = Path(hf_dir), Path(save_dir) / "checkpoints"
    target = folder / step_name(0)
    if not source.is_dir():
        remedy = "name the folder of a Hugging Face model"
        if source.is_file():
            remedy = f"did you mean {source.parent}?" if what_is(source.parent) == "a Hugging Face model" else remedy
        elif unusable := unusable_remedy(hf_dir if isinstance(hf_dir, str) else str(source)):
            remedy = unusable
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            remedy = missing_remedy(
                source, f"models of the Hub are fetched before: hf download {source} --local-dir NEW"
            )
        raise CheckpointError(20, str(source), "is not a folder", remedy)
    if not (source / CONFIG).exists() and (kind := what_is(source)) in (
        "a folder of datasets",
        "the folder of a tokenizer",
    ):
        raise CheckpointError(20, str(source), f"is {kind}", "name the folder of a Hugging Face model")
    tree = read_json(source / CONFIG)
    model = model_config_from_hf(tree, str(source / CONFIG), ignore, note)
    refuse_taken(Path(save_dir), "--save")
    tokenizer = None
    if any((source / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        tokenizer = load_tokenizer(source)
        check_vocabulary(tokenizer, model)
    else:
        note(f"{source} has no tokenizer: only the weights are converted")
    with HfWeights(source, model.tie_word_embeddings) as weights:
        check_tensors(weights, model)
        shapes = logical_shapes(model)
        slices = [_whole(weights, name, shapes[name]) for name in sorted(shapes, key=weights.place)]
        write_first_checkpoint(
            folder,
            slices,
            model=model,
            state={"token_ids": {key: tree.get(key) for key in TOKEN_IDS}},
            weights_dtype=common_dtype(s.dtype for s in slices),
            tokenizer=tokenizer,
            watch=lambda items: track(items, "reading weights", len(items), "tensors"),
        )
    write_preset(Path(save_dir) / "model.yaml", model, target / TOKENIZER if tokenizer else None)
    return target


def _whole(weights: HfWeights, name: str, shape: tuple[int, ...]) -> SliceToWrite:
    cols = (0, shape[1]) if len(shape) == 2 else None
    dtype = weights.entry(name).dtype
    return SliceToWrite(name, "weight", (0, shape[0]), cols, shape, dtype, chunks_from(partial(weights.parts, name)))
