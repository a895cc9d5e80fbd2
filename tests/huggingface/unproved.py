"""Exports without what takes most of their time: the proof, or the process that it has of its own."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from megatron_hammer.checkpoint.manifest import Manifest, read_manifest, saved_model
from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.export import write_configs
from megatron_hammer.huggingface.exported_tokenizer import TokenizerForm, write_tokenizer
from megatron_hammer.huggingface.weights import export_weights


def write_unproved(manifest: Manifest, folder: Path, dtype: str = "bfloat16") -> None:
    """The export of a checkpoint, into a new folder."""
    folder.mkdir()
    model = saved_model(manifest)
    token_ids, _ = write_tokenizer(manifest, model, folder, "exact")
    export_weights(manifest, folder, dtype, None)
    write_configs(model, token_ids, folder, dtype)


class ProverHere(nullcontext["ProverHere"]):
    """In the place of ``export.Prover``: the same work in this process, where torch is imported already."""

    def __init__(self, checkpoint: Path, folder: Path, dtype: str, form: TokenizerForm) -> None:
        super().__init__(self)
        self._places = checkpoint, folder, dtype
        manifest = read_manifest(checkpoint)
        self._tokenizer = write_tokenizer(manifest, saved_model(manifest), folder, form)

    def look(self) -> None:
        """Nothing runs beside."""

    def token_ids(self) -> dict[str, Any]:
        """Of the tokenizer."""
        return self._tokenizer.token_ids

    def prove(self) -> dict[str, Any]:
        """The certificate."""
        return prove(*self._places, self._tokenizer.unproved)
