"""Finds and loads the models to evaluate: a checkpoint, a run, or a Hugging Face folder.

::

    RUN, RUN/checkpoints/step-N  --> our model, weights from the checkpoint
    Hugging Face folder          --> our model where we know the family (Llama, Mistral, Qwen2, Qwen3), with the same
                                     kernels as in training; else the class of transformers

Both ways give ``train/evaluate.py`` something to call with tokens, labels and documents that answers with the loss of
each token. A description holds config and tokenizer alone, so that mistakes in the last of several models are found
before the first is loaded; weights are there for one model at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.base.paths import missing_remedy
from megatron_hammer.checkpoint.dtypes import DTYPES, PRECISION_DTYPES, common_dtype
from megatron_hammer.checkpoint.folder import open_checkpoint, run_of
from megatron_hammer.checkpoint.manifest import Manifest, checked_tokenizer_folder, saved_model
from megatron_hammer.checkpoint.read import load_model
from megatron_hammer.config import Config, DataConfig, KernelsConfig, ModelConfig, ParallelConfig, config_from_tree
from megatron_hammer.dataset.look.document_marks import documents_begin_with
from megatron_hammer.huggingface.certified import recorded_documents
from megatron_hammer.huggingface.config import CONFIG, FAMILIES, check_vocabulary, model_config_from_hf, read_json
from megatron_hammer.huggingface.text_model import choose_place
from megatron_hammer.huggingface.transformers_model import load_causal
from megatron_hammer.huggingface.weights import HfWeights, check_tensors, fill_stage
from megatron_hammer.model.llama import Model, build_stage
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.train.build import choose_kernels

ModelReader = Literal["auto", "ours", "transformers"]
_PRECISIONS = {dtype: precision for precision, dtype in PRECISION_DTYPES.items()}
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


@dataclass(frozen=True)
class Subject:
    """A model that is going to be evaluated."""

    name: str
    """In the table."""
    path: str
    """What was read: the checkpoint's folder, or the Hugging Face folder."""
    kind: str
    """How it is computed: "checkpoint", "hf" (by our model) or "transformers"."""
    tokenizer: Tokenizer | None
    vocab_size: int
    longest: int | None
    """Tokens of the longest context that the model is made for; None where it is not stated."""
    load: Callable[[ParallelContext, str | None], Model]
    """Loads the weights to the context's device, in this type or, for None, in their own."""
    seq_length: int = DataConfig.seq_length
    """Of the windows, where the command does not say."""
    micro_batch_size: int = 1
    document_mask: bool = False
    valid: dict[str, str] = field(default_factory=dict)
    """Name -> prefix of the run's own validation sets."""
    begins_with_bos: bool = False
    """Whether documents began with the tokenizer's bos in training, as far as that is known."""
    step: int | None = None


def describe_subject(argument: str, step: int | None = None, backend: ModelReader = "auto") -> Subject:
    """What ``[NAME=]PATH`` means; nothing large is read.

    Raises:
        ConfigError, CheckpointError, DataError: no model is there, or one that cannot be evaluated.
    """
    name, equals, path = argument.partition("=")
    if not equals or "/" in name:
        name, path = "", argument
    folder = Path(path)
    is_ours = (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file() or step is not None
    if (folder / CONFIG).is_file() and not is_ours:
        return _of_folder(name or folder.resolve().name, folder, backend)
    if not folder.exists():
        remedy = missing_remedy(folder, "name a run, a checkpoint of it or a Hugging Face folder")
        raise CheckpointError(90, path, "does not exist", remedy)
    if backend == "transformers":
        remedy = "export it with tools/checkpoint_to_hf.py first, or leave --backend out"
        raise ConfigError(33, "--backend transformers", f"cannot read {path}, a checkpoint of ours", remedy)
    return _of_checkpoint(name, open_checkpoint(path, step))


def _of_checkpoint(name: str, manifest: Manifest) -> Subject:
    model = saved_model(manifest)
    config = replace(config_from_tree(manifest.config), model=model)
    folder = checked_tokenizer_folder(manifest)
    tokenizer = None if folder is None else load_tokenizer(folder)
    begins = None if tokenizer is None else documents_begin_with(manifest.config, tokenizer.bos_id)
    assert model.vocab_size is not None
    run = run_of(manifest.folder)
    return Subject(
        name or (f"{run.name}@{manifest.step}" if run else f"{manifest.step}"),
        str(manifest.folder),
        "checkpoint",
        tokenizer,
        model.vocab_size,
        model.max_position_embeddings,
        partial(_load_checkpoint, manifest, config),
        config.data.seq_length,
        config.train.micro_batch_size,
        config.data.attention_mask == "document",
        dict(config.data.valid or {}),
        (tokenizer is not None and tokenizer.begins_with_bos) if begins is None else begins,
        manifest.step,
    )


def _of_folder(name: str, folder: Path, backend: ModelReader) -> Subject:
    tree = read_json(folder / CONFIG)
    tokenizer = load_tokenizer(folder) if any((folder / file).is_file() for file in _TOKENIZER_FILES) else None
    model: ModelConfig | None = None
    if backend == "ours" or (backend == "auto" and tree.get("model_type") in FAMILIES):
        try:
            model = model_config_from_hf(tree, str(folder / CONFIG))
        except CheckpointError as error:
            if backend == "ours" or error.number != 21:  # E421: a feature that only the class of transformers has
                raise
    if model is None:
        return _of_transformers(name, folder, tree, tokenizer)
    if tokenizer is not None:
        check_vocabulary(tokenizer, model)
    assert model.vocab_size is not None and model.max_position_embeddings is not None
    return Subject(
        name,
        str(folder),
        "hf",
        tokenizer,
        model.vocab_size,
        model.max_position_embeddings,
        partial(_load_folder, folder, model),
        min(DataConfig.seq_length, model.max_position_embeddings),
        begins_with_bos=_folder_begins_with_bos(folder, tokenizer),
    )


def _of_transformers(name: str, folder: Path, tree: dict[str, Any], tokenizer: Tokenizer | None) -> Subject:
    text = tree.get("text_config")
    sizes = {**(text if isinstance(text, dict) else {}), **tree}
    vocab_size = sizes.get("vocab_size")
    if type(vocab_size) is not int or vocab_size < 1:
        remedy = "name the folder of a causal language model"
        raise CheckpointError(
            22, f"{folder / CONFIG}: vocab_size={vocab_size}", "must be a positive whole number", remedy
        )
    lengths = [sizes.get(key) for key in ("max_position_embeddings", "n_positions", "max_sequence_length")]
    longest = next((length for length in lengths if type(length) is int and length > 0), None)
    return Subject(
        name,
        str(folder),
        "transformers",
        tokenizer,
        vocab_size,
        longest,
        partial(_load_transformers, folder),
        min(DataConfig.seq_length, longest or DataConfig.seq_length),
        begins_with_bos=_folder_begins_with_bos(folder, tokenizer),
    )


def _folder_begins_with_bos(folder: Path, tokenizer: Tokenizer | None) -> bool:
    """Whether documents began with bos: as the export recorded it, else as transformers puts it before a text."""
    if tokenizer is None or tokenizer.bos_id is None:
        return False
    begins, _ = recorded_documents(folder)
    if begins is not None:
        return begins
    if (definition := folder / "tokenizer.json").is_file():
        return (tokenizer if tokenizer.path == definition else load_tokenizer(definition)).begins_with_bos
    settings = folder / "tokenizer_config.json"  # a tokenizer.model's Llama class has bos unless told not to
    return not settings.is_file() or read_json(settings).get("add_bos_token") is not False


def _plain(config: Config, precision: str, device: torch.device) -> Config:
    """The config of one process that computes what training evaluates: the fastest kernels of this machine."""
    kernels = KernelsConfig(loss_chunk_tokens=config.kernels.loss_chunk_tokens)
    train = replace(config.train, precision=cast(Any, precision), device=cast(Any, device.type))
    return replace(config, parallel=ParallelConfig(), kernels=kernels, train=train)


def _build(config: Config, ctx: ParallelContext) -> Any:
    operations = choose_kernels(config, ctx.device).operations
    dtype = DTYPES[PRECISION_DTYPES[config.train.precision]]
    return build_stage(config.model, ctx, dtype=dtype, operations=operations, kernels=config.kernels)


def _load_checkpoint(manifest: Manifest, config: Config, ctx: ParallelContext, dtype: str | None) -> Model:
    stage = _build(_plain(config, _PRECISIONS[dtype or manifest.weights_dtype], ctx.device), ctx)
    load_model(stage, parameter_table(config.model), manifest, ctx)
    return cast(Model, stage)


def _load_folder(folder: Path, model: ModelConfig, ctx: ParallelContext, dtype: str | None) -> Model:
    with HfWeights(folder, model.tie_word_embeddings) as weights:
        check_tensors(weights, model)
        own = common_dtype(weights.entry(name).dtype for name in weights.where)
        config = Config(model=model)
        stage = _build(_plain(config, _PRECISIONS[dtype or own], ctx.device), ctx)
        fill_stage(stage, parameter_table(model), weights)
    return cast(Model, stage)


def _load_transformers(folder: Path, ctx: ParallelContext, dtype: str | None) -> Model:
    loaded = load_causal(folder, "auto" if dtype is None else DTYPES[dtype])
    return cast(Model, [_TransformersLosses(loaded.to(ctx.device))])


class _TransformersLosses:
    """A class of transformers, called as a stage of ours is: the losses of a batch."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, tokens: Tensor, labels: Tensor, documents: object) -> Tensor:
        """[b, s] fp32, -ln p of each label."""
        assert documents is None, "only our own models keep documents apart"
        logits = self._model(tokens, use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(
            labels
        )


def check_model_names(subjects: Sequence[Subject]) -> None:
    """Raise ``ConfigError`` where two models have one name."""
    names = [subject.name for subject in subjects]
    for subject in subjects:
        if names.count(subject.name) > 1:
            rule = "is the name of two models"
            raise ConfigError(33, subject.name, rule, f"name them: FIRST={subject.path} SECOND=...")


def device_of_argument(wanted: str) -> str:
    """``--device`` as torch names it.

    Raises:
        ConfigError: E233 it is no device, E204 it is not here.
    """
    return choose_place(wanted, unknown=33, absent=4)
