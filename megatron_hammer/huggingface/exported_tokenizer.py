"""The tokenizer of an export, in the form that was asked for, proved as far as it can be.

Needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.checkpoint.manifest import Manifest, checked_tokenizer_folder
from megatron_hammer.config import ModelConfig
from megatron_hammer.dataset.look.document_marks import documents_begin_with
from megatron_hammer.huggingface.config import check_vocabulary, token_ids_of
from megatron_hammer.tokenizer.convert import conversion_obstacle, convert_tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer

TokenizerForm = Literal["exact", "as-is", "none"]
"""Of an export: one that transformers loads, proved to give the same ids; the checkpoint's files unchanged; none."""


class ExportedTokenizer(NamedTuple):
    """What an export must know of its tokenizer."""

    token_ids: dict[str, Any]
    """The special ids that the configs name."""
    unproved: str
    """Why it is not one that can be compared with the checkpoint's; empty where it is, or the checkpoint has none."""


def write_tokenizer(manifest: Manifest, model: ModelConfig, folder: Path, form: TokenizerForm) -> ExportedTokenizer:
    """Write the tokenizer of a checkpoint, if it has one, into a folder that holds no ``config.json`` yet.

    Raises:
        CheckpointError: E415 it is not as it was saved.
        RefusedError: E501, E502 it has no exact form; E528 the model has no row for some of its ids.
    """
    if (source := checked_tokenizer_folder(manifest)) is None:
        return ExportedTokenizer(dict(manifest.state.get("token_ids") or {}), "")  # of an imported model
    tokenizer, unproved = load_tokenizer(source), ""
    check_vocabulary(tokenizer, model)
    if form == "exact":
        begin_with_bos = documents_begin_with(manifest.config, tokenizer.bos_id)
        try:
            convert_tokenizer(tokenizer, folder, begin_with_bos, model.max_position_embeddings)
        except RefusedError as error:
            remedy = f"{error.remedy}; or export the weights with --tokenizer as-is or none"
            raise RefusedError(error.number, error.what, error.rule, remedy) from None
    else:
        unproved = conversion_obstacle(tokenizer) or f"--tokenizer {form} was asked for"
        if form == "as-is":
            tokenizer.save_files(folder)
    return ExportedTokenizer(dict(token_ids_of(tokenizer)), unproved)
