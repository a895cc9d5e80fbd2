"""Exports a checkpoint as a Hugging Face folder, which gets its name only after it was proved to be the same model.

::

    checkpoint --band by band, rounded--> OUTPUT.tmp-ID/ --certificate.py--> OUTPUT/
         '------ tokenizer --prover.py-------^

The tokenizer is written while the weights are, in the process that proves all of it then (``prover.py``). No tensor is
permuted, split or renamed on the way; that makes the round trip bit-equal. Memory: 30 MiB while writing; the other
process needs one fp32 model.

Needs no torch until it writes weights.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError, RefusedError, from_fields
from megatron_hammer.base.files import dump_json, staged_folder, write_durably
from megatron_hammer.base.paths import RENAME_REMEDY, is_unicode
from megatron_hammer.base.progress import say
from megatron_hammer.base.signals import blocked
from megatron_hammer.checkpoint.folder import Note, open_checkpoint
from megatron_hammer.checkpoint.manifest import read_manifest, saved_model
from megatron_hammer.config import ModelConfig
from megatron_hammer.huggingface.certified import CERTIFICATE, check_output, remark_on
from megatron_hammer.huggingface.config import CONFIG, GENERATION_CONFIG, hf_config_from_model, read_json
from megatron_hammer.huggingface.exported_tokenizer import TokenizerForm, write_tokenizer

Prove = Callable[..., object]
"""Takes the checkpoint's folder, the export's, the type of the weights, and why the tokenizer is not proved, if so."""


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
    max_shard_bytes: int | None = None,
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
        max_shard_bytes: largest size of a file of weights; None: 5 GB, as of transformers.
        step: of a run, the checkpoint of this step; None: its newest.
        prove: writes ``certificate.json`` into the folder or raises, and all is done in this process; None: what
            proves, and what writes the tokenizer, is a process of its own.
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
    model, dtype = saved_model(manifest), dtype or manifest.weights_dtype
    output = Path(output).resolve()  # a link to a folder stays a link
    if not is_unicode(output):
        raise ConfigError(88, f"--output {output}", "is not UTF-8, and no tokenizer is read from there", RENAME_REMEDY)
    if output.exists():
        check_output(output)
    with staged_folder(output, replace=True) as staging:
        given = manifest.folder, staging, dtype, tokenizer
        prover: Prover | ProverHere = Prover(*given) if prove is None else ProverHere(*given, prove)
        with prover:
            from megatron_hammer.huggingface.weights import export_weights  # torch's seconds pass beside the prover's

            export_weights(manifest, staging, dtype, max_shard_bytes, prover.look)
            write_configs(model, prover.token_ids(), staging, dtype)
            certificate = prover.prove()
    if remark := remark_on(certificate.get("tokenizer", {})):
        note(remark)
    return certificate


def write_configs(model: ModelConfig, token_ids: dict[str, Any], folder: Path, dtype: str) -> None:
    """After the tokenizer: transformers chooses its class by ``config.json`` where there is one."""
    write_durably(folder / CONFIG, dump_json(hf_config_from_model(model, token_ids, dtype)))
    present = {name: value for name, value in token_ids.items() if value is not None}
    write_durably(folder / GENERATION_CONFIG, dump_json(present))


class Prover(AbstractContextManager["Prover"]):
    """A fresh process that writes the tokenizer, then proves (``prover.py``); it is gone when the block ends.

    Its memory goes with it, and nothing is reused of what wrote the weights.

    Raises:
        HammerError: from all methods, what the process raised, or that it died.
    """

    def __init__(self, checkpoint: Path, folder: Path, dtype: str, form: TokenizerForm) -> None:
        command = [sys.executable, "-m", "megatron_hammer.huggingface.prover", str(checkpoint), str(folder)]
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            # glibc raises this threshold as it goes, then keeps freed weights: half of ours would stay beside theirs.
            "MALLOC_MMAP_THRESHOLD_": str(2**20),
        }
        self._folder = folder
        self._token_ids: dict[str, Any] | None = None
        with blocked([signal.SIGINT]):  # Ctrl-C is the export's affair
            self._process = subprocess.Popen(
                [*command, dtype, form], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )

    def look(self) -> None:
        """Raise where the process has refused the tokenizer, or is dead; waits for nothing."""
        assert self._process.stdout is not None
        if self._token_ids is None and select.select([self._process.stdout], [], [], 0)[0]:
            self.token_ids()

    def token_ids(self) -> dict[str, Any]:
        """The special ids that the configs name, once the tokenizer is written and proved."""
        if self._token_ids is None:
            self._token_ids = self._answer()["token_ids"]
        return self._token_ids

    def prove(self) -> dict[str, Any]:
        """The certificate, as in the folder, which must be complete."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, as its answer will say
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
        certificate = self._answer()
        if self._process.wait():
            raise self._no_verdict()
        return certificate

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = {}
        with suppress(ValueError):
            answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise from_fields(answer["error"])
        if not answer:
            raise self._no_verdict()
        return answer

    def _no_verdict(self) -> RefusedError:
        status = self._process.wait()
        cause = f"exit status {status}" if status > 0 else f"signal {-status}"
        remedy = "see the lines above; signal 9 usually means too little memory for one fp32 model"
        what = f"the process that writes the tokenizer of {self._folder.name} and proves it"
        return RefusedError(26, what, f"ended by {cause} without a verdict", remedy)

    def __exit__(self, *rest: object) -> None:
        with suppress(BrokenPipeError), self._process:  # closes the pipes and waits for its end
            self._process.kill()


class ProverHere(nullcontext["ProverHere"]):
    """In the place of ``Prover``: the same in this process, where ``prove`` says what a proof is."""

    def __init__(self, checkpoint: Path, folder: Path, dtype: str, form: TokenizerForm, prove: Prove) -> None:
        super().__init__(self)
        self._places, self._prove = (checkpoint, folder, dtype), prove
        manifest = read_manifest(checkpoint)
        self._tokenizer = write_tokenizer(manifest, saved_model(manifest), folder, form)

    def look(self) -> None:
        """Nothing runs beside."""

    def token_ids(self) -> dict[str, Any]:
        """As of ``Prover``."""
        return self._tokenizer.token_ids

    def prove(self) -> dict[str, Any]:
        """As of ``Prover``."""
        unproved = self._tokenizer.unproved
        self._prove(*self._places, *([unproved] if unproved else []))
        return read_json(self._places[1] / CERTIFICATE)
