"""Exports without what takes most of their time: the proof, or the process that it has of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_hammer.checkpoint.manifest import Manifest, saved_model
from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.export import ProverHere, write_configs
from megatron_hammer.huggingface.exported_tokenizer import write_tokenizer
from megatron_hammer.huggingface.weights import export_weights


def write_unproved(manifest: Manifest, folder: Path, dtype: str = "bfloat16") -> None:
    """The export of a checkpoint, into a new folder."""
    folder.mkdir()
    model = saved_model(manifest)
    token_ids, _ = write_tokenizer(manifest, model, folder, "exact")
    export_weights(manifest, folder, dtype, None)
    write_configs(model, token_ids, folder, dtype)


PROVER_HERE = partial(ProverHere, prove=prove)
"""In the place of ``export.Prover``: the same work in this process, where torch is imported already."""
