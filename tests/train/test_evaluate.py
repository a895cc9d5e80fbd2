"""Evaluation counts each target once, by documents where they are kept apart; a step never waits for the device."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_hammer.config import Config
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import build_stage
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.samples import ValidData
from megatron_hammer.train.build import build
from megatron_hammer.train.evaluate import evaluate
from megatron_hammer.train.source_sums import Sources
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.host_waits import OperationNames
from tests.model.tiny import make_context, rank_batches, tiny_config


@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_evaluation_counts_each_target_once(data: Path, micro_batch_size: int) -> None:
    """Against a plain sum over the whole file; the padded end of the last window does not count."""
    config = tiny_config()
    ctx = ParallelContext.single()
    model = build_stage(config.model, ctx)
    initialise(model, parameter_table(config.model), seed=1)
    valid = ValidData("x", data / "x", 32)
    stream = np.concatenate([valid.dataset.read(i) for i in range(len(valid.dataset.lengths))]).astype(np.int64)
    sizes = torch.arange(301) % 5 << 32 | torch.arange(301) % 3  # ids 0, 5, 10 ... stand for no bytes, as specials do
    total, targets = 0.0, 0
    for start in range(0, len(stream) - 1, 32):
        window = torch.from_numpy(stream[start : start + 33])
        logits = model.logits(window[None, :-1])[0]
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        targets += len(window) - 1
    result = evaluate(model, valid, micro_batch_size, sizes, ctx)
    assert targets == len(stream) - 1
    assert result.loss == pytest.approx(total / targets, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / targets), rel=1e-4)
    expected_bytes = int((stream[1:] % 5).sum())
    assert result.bits_per_byte == pytest.approx(total / math.log(2) / expected_bytes, rel=1e-5)
    expected_characters = int((stream[1:] % 3).sum())
    assert result.bits_per_character == pytest.approx(total / math.log(2) / expected_characters, rel=1e-5)
    plain = evaluate(model, valid, micro_batch_size, None, ctx)
    assert plain.bits_per_byte is None and plain.bits_per_character is None


def test_evaluation_reads_each_document_alone(data: Path) -> None:
    """With document masks: against each piece of a document run by itself; the target of its last token counts too."""
    config = tiny_config(data__attention_mask="document")
    ctx = ParallelContext.single()
    model, _ = build(config, ctx)
    causal = build_stage(config.model, ctx)
    causal.load_state_dict(model.state_dict())
    valid = ValidData("x", data / "x", 32, document_mask=True)
    total, targets = 0.0, 0
    for j in range(len(valid)):
        window = valid.read([j])
        assert window.loss_weights is not None and isinstance(window.documents, np.ndarray)
        for start, stop in itertools.pairwise(window.documents.tolist()):
            tokens, labels = (torch.from_numpy(x[:, start:stop]) for x in (window.tokens, window.labels))
            counted = torch.from_numpy(window.loss_weights[0, start:stop])
            total += float((causal(tokens, labels)[0].detach() * counted).sum())
            targets += int(counted.sum())
    assert targets == valid.dataset.num_tokens - 1
    for micro_batch_size in (1, 3):
        result = evaluate(model, valid, micro_batch_size, None, ctx)
        assert result.loss == pytest.approx(total / targets, rel=1e-5)
    shared = tiny_config(data__attention_mask="document", parallel__context_parallel_size=2)
    for loss in run_distributed(2, _evaluated, shared, data / "x"):
        assert loss == pytest.approx(total / targets, rel=1e-5)


def _evaluated(rank: int, config: Config, prefix: Path) -> float:
    """Loss of this set with the initial weights."""
    ctx = make_context(config)
    model, _ = build(config, ctx)
    return evaluate(model, ValidData("x", prefix, 32, document_mask=True), 3, None, ctx).loss


@pytest.mark.parametrize(
    "precision, mask", [("fp32", "causal"), ("bf16", "causal"), ("fp16", "causal"), ("bf16", "document")]
)
def test_a_step_never_waits_for_the_device(precision: str, mask: str) -> None:
    """No operation of a step turns a tensor into a Python value or has a shape that depends on values."""
    config = tiny_config(
        train__precision=precision,
        model__hidden_size=32,
        model__ffn_hidden_size=64,
        data__seq_length=16,
        data__attention_mask=mask,
        # A CPU's compiled kernels read divisor and skip where they lie; a GPU's do not, but this mode sees torch only.
        **{f"kernels__{name}": "torch" for name in ("norm", "rope", "swiglu", "loss", "adamw")},
    )
    ctx = ParallelContext.single()
    model, optimizer = build(config, ctx)
    batches = rank_batches(config, 1, ctx)
    with OperationNames() as seen:
        train_step(model, optimizer, batches, config, 1, ctx, sources=Sources(2, torch.arange(301)))
    assert not seen.waits()
    assert "aten::_fused_adamw_" in seen.names or "aten::_fused_adamw" in seen.names, "the mode must see the update too"
