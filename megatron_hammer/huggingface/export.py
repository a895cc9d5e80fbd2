"""Exports a checkpoint as a Hugging Face folder, which gets its name only after it was proved to be the same model.

::

    checkpoint --band by band, rounded--> OUTPUT.tmp-ID/ --certificate.py, in a process of its own--> OUTPUT/

No tensor is permuted, split or renamed on the way; that makes the round trip bit-equal. Memory: 30 MiB while writing;
the proof needs one fp32 model.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_hammer.base.errors import ConfigError, RefusedError, from_fields
from megatron_hammer.base.files import dump_json, staged_folder, write_durably
from megatron_hammer.base.paths import RENAME_REMEDY, is_unicode
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.folder import Note, open_checkpoint
from megatron_hammer.checkpoint.manifest import Manifest, checked_tokenizer_folder, saved_model
from megatron_hammer.config import ModelConfig
from megatron_hammer.dataset.look.document_marks import documents_begin_with
from megatron_hammer.huggingface.certified import CERTIFICATE, check_output
from megatron_hammer.huggingface.config import (
    CONFIG,
    GENERATION_CONFIG,
    check_vocabulary,
    hf_config_from_model,
    read_json,
    token_ids_of,
)
from megatron_hammer.huggingface.weights import DEFAULT_SHARD_BYTES, export_weights
from megatron_hammer.tokenizer.convert import conversion_obstacle, convert_tokenizer, form_line
from megatron_hammer.tokenizer.load import load_tokenizer

Prove = Callable[..., object]
"""Takes the checkpoint's folder, the export's, the type of the weights, and why the tokenizer is not proved, if so."""
TokenizerForm = Literal["exact", "as-is", "none"]
"""Of an export: one that transformers loads, proved to give the same ids; the checkpoint's files unchanged; none."""


def parse_size(text: str) -> int:
    """``5GB`` (decimal, as in transformers), ``512MiB`` or plain bytes, as a number of bytes.

    Raises:
        ConfigError: not a size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B)?", text.strip().upper())
    size = int(float(match[1]) * units.get(match[2] or "", 0)) if match else 0
    if size < 1 or (not match[2] and size < 1000):  # type: ignore[index]
        raise ConfigError(80, f"--max-shard-size={text}", "is not a size", "write it like 5GB, 512MiB or 1000000")
    return size


def export_hf(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    step: int | None = None,
    prove: Prove | None = None,
    note: Note = say,
    tokenizer: TokenizerForm = "exact",
) -> dict[str, Any]:
    """Write a checkpoint as a Hugging Face folder, prove it, and only then give it its name.

    Args:
        checkpoint: a checkpoint folder or a run.
        output: a folder that does not exist, is empty, or is an earlier export, which is then replaced.
        dtype: of the written weights; None: that in which the model was trained.
        step: of a run, the checkpoint of this step; None: its newest.
        prove: writes ``certificate.json`` into the folder or raises; None: ``prove_in_child_process``.
        tokenizer: what is written of it; where it is not exact, the certificate says so and why.

    Returns:
        the certificate.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: E288, the output's name is no text.
        RefusedError: the output belongs to somebody else, or the written folder is not the checkpoint's model.
            Nothing is left at ``output``, or what was there before.
    """
    manifest = open_checkpoint(checkpoint, step)
    original = Original(manifest, saved_model(manifest), checked_tokenizer_folder(manifest))
    dtype = dtype or manifest.weights_dtype
    output = Path(output).resolve()  # a link to a folder stays a link
    if not is_unicode(output):
        raise ConfigError(88, f"--output {output}", "is not UTF-8, and no tokenizer is read from there", RENAME_REMEDY)
    if output.exists():
        check_output(output)
    with staged_folder(output, replace=True) as staging:
        unproved = write_hf(original, staging, dtype, max_shard_bytes, note, tokenizer)
        if unproved:
            note(f"the tokenizer is not proved: {unproved}")
        if prove is None:
            return prove_in_child_process(manifest.folder, staging, dtype, unproved)
        prove(manifest.folder, staging, dtype, *([unproved] if unproved else []))
        return read_json(staging / CERTIFICATE)


@dataclass(frozen=True)
class Original:
    """What is exported: a checkpoint, and what has been read and checked of it."""

    manifest: Manifest
    model: ModelConfig
    """``saved_model``."""
    tokenizer_folder: Path | None
    """``checked_tokenizer_folder``."""


def write_hf(
    original: Original,
    folder: Path,
    dtype: str,
    max_shard_bytes: int,
    note: Note = say,
    form: TokenizerForm = "exact",
) -> str:
    """Write weights, configs and tokenizer into an empty folder, without any proof.

    Returns:
        why the tokenizer is not one that can be compared with the checkpoint's; an empty string where it is.
    """
    unproved, manifest, model = "", original.manifest, original.model
    token_ids = dict(manifest.state.get("token_ids") or {})  # of an imported model
    if original.tokenizer_folder is None:
        note("the checkpoint has no tokenizer: the model is exported without one")
    else:
        tokenizer = load_tokenizer(original.tokenizer_folder)
        check_vocabulary(tokenizer, model)
        if form == "exact":
            begin_with_bos = documents_begin_with(manifest.config, tokenizer.bos_id)
            try:
                why = convert_tokenizer(tokenizer, folder, begin_with_bos, model.max_position_embeddings)
            except RefusedError as error:
                raise _with_weights_alone(error) from None
            if why:
                note(f"the tokenizer is exported as {form_line(why)}")
        else:
            unproved = conversion_obstacle(tokenizer) or f"--tokenizer {form} was asked for"
            if form == "as-is":
                tokenizer.save_files(folder)
        token_ids = token_ids_of(tokenizer)
    write_durably(folder / CONFIG, dump_json(hf_config_from_model(model, token_ids, dtype)))
    present = {name: value for name, value in token_ids.items() if value is not None}
    write_durably(folder / GENERATION_CONFIG, dump_json(present))
    export_weights(manifest, folder, dtype, max_shard_bytes)
    return unproved


def _with_weights_alone(error: RefusedError) -> RefusedError:
    """A refusal of the tokenizer, with what can be done in an export."""
    remedy = f"{error.remedy}; or export the weights with --tokenizer as-is or none"
    return RefusedError(error.number, error.what, error.rule, remedy)


def prove_in_child_process(checkpoint: Path, folder: Path, dtype: str, unproved: str = "") -> dict[str, Any]:
    """Run ``prove`` in a fresh process, so that its memory goes with it and nothing of the export's state is reused.

    Returns:
        the certificate, as in the folder.

    Raises:
        HammerError: what the child raised, or that it died.
    """
    command = [sys.executable, "-m", "megatron_hammer.huggingface.certificate", str(checkpoint), str(folder)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        # glibc raises this threshold as it goes, and then keeps freed weights: half of ours would stay beside theirs.
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
    }
    child = subprocess.run(
        [*command, "--dtype", dtype, "--report", "--unproved-tokenizer", unproved],
        env=environment,
        stdout=subprocess.PIPE,
        check=False,
    )
    report: dict[str, Any] = {}
    with suppress(ValueError):
        report = json.loads(child.stdout)
    if "error" in report:
        raise from_fields(report["error"])
    if child.returncode != 0:
        raise _no_verdict(folder, child.returncode)
    return report


def _no_verdict(folder: Path, status: int) -> RefusedError:
    cause = f"exit status {status}" if status > 0 else f"signal {-status}"
    remedy = "see the lines above; signal 9 usually means too little memory for one fp32 model"
    return RefusedError(26, f"the proof of {folder.name}", f"ended by {cause} without a verdict", remedy)
