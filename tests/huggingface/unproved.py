"""Exports without the proof that takes most of their time."""

from __future__ import annotations

from pathlib import Path

from megatron_hammer.checkpoint.manifest import Manifest, checked_tokenizer_folder, saved_model
from megatron_hammer.huggingface.export import Original, write_hf


def write_unproved(manifest: Manifest, folder: Path, dtype: str = "bfloat16") -> None:
    """The export of a checkpoint, into a new folder."""
    folder.mkdir()
    original = Original(manifest, saved_model(manifest), checked_tokenizer_folder(manifest))
    write_hf(original, folder, dtype, 10**9, note=lambda text: None)
