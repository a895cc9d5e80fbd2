"""A run of twenty steps whose losses are known: ``tools/selftest.py`` trains it again and compares.

Data and initial weights are functions of integers and of fixed seeds, so every machine trains the same model on the
same tokens; what differs is the order in which fp32 numbers are added. ``LOSSES`` were recorded on an EPYC with
AVX-512 (torch 2.13, our compiled kernels, one thread) on 2026-11-30. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.sampling import index_builder_numpy

WRONG = 42  # E542: the self-test has another result than it must have
VOCAB_SIZE, DOCUMENTS, SHORTEST, LONGEST = 384, 96, 24, 280
DATA_SHA256 = "3ffe6ee879d707c6e30e6b730cd07c05f9b25fffa4473cb35fa36f2eb3b6d044"
SAMPLES_DIGEST = "ecd32da64311a90610c01dee39a4102b"
"""Of all samples of the run, as the last line of metrics.jsonl has it: which tokens, in which order."""
LOSSES = (
    5.9573193, 5.9499278, 5.9286461, 5.8887014, 5.8397918, 5.8334866, 5.7673793,
    5.7634406, 5.6613970, 5.6416750, 5.6423926, 5.6121769, 5.5752959, 5.5867925,
    5.5507178, 5.5547757, 5.5238452, 5.5118089, 5.5092030, 5.5118132,
)  # fmt: skip
TOLERANCE = {"cpu": 2e-6, "cuda": 2e-5}
"""Largest relative difference of a loss. On a CPU other kernels (torch's, ours, loss in chunks, micro-batches of one)
differ by 9e-8 at most, so 2e-6 leaves room for other processors and versions of torch. What it tells from rounding, as
measured: bf16 in place of fp32 8e-5, beta2 0.951 for 0.950 1.5e-5, eps 1e-7 for 1e-8 1.8e-5, a learning rate 0.3 %
higher 1.7e-4, norm_eps 2e-5 for 1e-5 2.1e-4, the document mask left out 4e-3. RoPE's base 1 % larger is 7e-7, and is
not seen. On a GPU libraries may choose other algorithms: ten times as much, which TF32's 10 bits would still exceed; no
GPU was there to measure it."""


def wrong(what: str, rule: str) -> RefusedError:
    """The error of a result of the self-test that is not what it must be; the remedy is the part's cure."""
    return RefusedError(WRONG, what, rule, "see the remedy of this part of the self-test")


def golden_config(data: Path, output: Path, device: str = "cpu") -> Config:
    """The config of the run: every part of a Llama, in fp32, so that rounding is the only difference."""
    tree = {
        "model": {
            "hidden_size": 64, "ffn_hidden_size": 192, "num_layers": 2, "num_attention_heads": 4,
            "num_query_groups": 2, "vocab_size": VOCAB_SIZE,
        },
        "data": {"train": {str(data): 1.0}, "seq_length": 64, "attention_mask": "document"},
        "optimizer": {"lr": 3.0e-3, "min_lr": 3.0e-4, "beta2": 0.95, "weight_decay": 0.1},
        "schedule": {"style": "cosine", "warmup_steps": 4},
        "train": {
            "output": str(output), "num_steps": 20, "micro_batch_size": 2, "global_batch_size": 4, "precision": "fp32",
            "device": device, "seed": 3407,
        },
        "checkpoint": {"save_interval_steps": 20},
        "log": {"tensorboard": False},
    }  # fmt: skip
    return config_from_tree(tree)


def write_golden_data(prefix: Path) -> str:
    """Documents in which a token mostly decides the next, and their hash.

    Args:
        prefix: of the dataset to write.

    Returns:
        SHA-256 of the lengths and tokens.
    """
    lengths = SHORTEST + index_builder_numpy.permute(LONGEST - SHORTEST, 1, 0, DOCUMENTS)
    digest = hashlib.sha256()
    with IndexedWriter(prefix, vocab_size=VOCAB_SIZE) as writer:
        for number, length in enumerate(lengths.tolist()):
            tokens = index_builder_numpy.permute(2**20, number + 2, 0, length) % VOCAB_SIZE
            make_predictable(tokens, VOCAB_SIZE)
            writer.add(tokens, np.array([length]))
            digest.update(np.asarray([length, *tokens], dtype="<i8").tobytes())
    return digest.hexdigest()


def make_predictable(tokens: np.ndarray, vocab_size: int) -> None:
    """Have every second token of a document follow from the one before it, so that there is something to learn."""
    tokens[1::2] = (tokens[::2][: len(tokens[1::2])] * 5 + 7) % vocab_size


def compare_with_golden(lines: Sequence[Mapping[str, Any]], device: str) -> str:
    """Hold the lines of metrics.jsonl against what was recorded.

    Returns:
        a line about it.

    Raises:
        RefusedError: E542 other samples, or a loss that is further off than rounding explains.
    """
    if len(lines) != len(LOSSES) or lines[-1]["samples_digest"] != SAMPLES_DIGEST:
        raise wrong(f"the known run on {device}", "read other samples than recorded")
    differences = [abs(line["loss"] - known) / known for line, known in zip(lines, LOSSES)]
    off = [step for step, difference in enumerate(differences) if not difference <= TOLERANCE[device]]
    if off:  # not a number is off, too
        step = off[0]
        raise wrong(
            f"the known run on {device}",
            f"has the loss {lines[step]['loss']:.7f} at step {step + 1}, not {LOSSES[step]:.7f}: off by "
            f"{differences[step]:.1e}, and rounding explains {TOLERANCE[device]:.0e}",
        )
    worst = max(differences)
    return f"{len(LOSSES)} known losses on {device}, off by {worst:.0e} at most (bound {TOLERANCE[device]:.0e})"
