"""data.attention_mask=document in the whole model: nothing leaks, and each document is what it is alone."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels.attention import each_document
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.kernels.selection import select_operations
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import Stage, build_stage
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.parallel.context import ParallelContext
from tests.model.test_llama import MODELS, carry_weights, hugging_face

# Two samples of 40 tokens: the first holds documents of 11, 1 and 28 tokens, the second of 25 and 15.
LENGTHS, SAMPLES, SIZE = (11, 1, 28, 25, 15), 2, 40
BOUNDS = list(itertools.pairwise(np.cumsum([0, *LENGTHS]).tolist()))
DOCUMENTS = PackedSequences.from_cu_seqlens(np.cumsum([0, *LENGTHS]).astype(np.int32), torch.device("cpu"))


def model_of(name: str = "gqa", dtype: torch.dtype = torch.float32, documents: bool = True) -> Stage:
    config = MODELS[name]
    operations = Operations(attention=each_document) if documents else None
    model = build_stage(config, ParallelContext.single(), dtype=dtype, operations=operations)
    initialise(model, parameter_table(config), seed=3)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.attention.qkv.weight.mul_(8)  # attention that prefers some tokens: else a leak would hardly show
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 301, (SAMPLES, SIZE + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_no_document_leaks_into_another(changed: int, dtype: torch.dtype) -> None:
    """Other tokens in one document: all outputs of the others are the same bits."""
    model = model_of(dtype=dtype)
    tokens, labels = batch()
    start, stop = BOUNDS[changed]
    others = torch.ones(SAMPLES * SIZE, dtype=torch.bool)
    others[start:stop] = False
    again = tokens.clone().view(-1)
    again[start:stop] = (again[start:stop] + 1) % 301
    again = again.view_as(tokens)
    before, after = (model.logits(t, DOCUMENTS).flatten(0, 1) for t in (tokens, again))
    assert torch.equal(before[others], after[others]) and not torch.equal(before[~others], after[~others])
    loss, loss_again = (model(t, labels, DOCUMENTS).flatten() for t in (tokens, again))
    assert torch.equal(loss[others], loss_again[others])


def _gradient_at_the_input(model: Stage, tokens: Tensor, labels: Tensor, documents: PackedSequences | None) -> Tensor:
    """|d loss of the last 15 targets / d embedding|, [b s]."""
    kept: list[Tensor] = []
    hook = model.embedding.register_forward_hook(lambda module, inputs, out: kept.append(out.requires_grad_()))
    loss = model(tokens, labels, documents).flatten()[-15:].sum()
    hook.remove()
    (grad,) = torch.autograd.grad(loss, kept)  # [s, b, h], or [b s, 1, h] with documents
    return grad.transpose(0, 1).flatten(0, 1).abs().sum(-1)


def test_no_gradient_leaks() -> None:
    """From the loss of the last document none at all reaches the tokens of others; under a causal mask some does."""
    tokens, labels = batch()
    masked = _gradient_at_the_input(model_of(), tokens, labels, DOCUMENTS)
    assert (masked[:-15] == 0).all() and (masked[-15:] > 0).all()
    causal = _gradient_at_the_input(model_of(documents=False), tokens, labels, None)
    assert (causal[:SIZE] == 0).all() and (causal[SIZE:] > 0).all(), "other samples never mattered, other documents do"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "dynamic rope"])  # that stretches by length
def test_equals_each_document_alone(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Loss, logits and the gradient of all weights; of the norm, the rounding of sums in another order.

    The loss itself is fp32 unless the logits are fp64.
    """
    tokens, labels = (x.clone() % MODELS[name].vocab_size for x in batch())  # type: ignore[operator]
    together, alone = model_of(name, dtype), model_of(name, dtype, documents=False)
    loss = together(tokens, labels, DOCUMENTS)
    loss.sum().backward()
    parts = []
    for start, stop in BOUNDS:
        row = slice(start, stop)
        parts.append(alone(tokens.reshape(1, -1)[:, row], labels.reshape(1, -1)[:, row]))
        logits = alone.logits(tokens.reshape(1, -1)[:, row])[0]
        found = together.logits(tokens, DOCUMENTS).flatten(0, 1)[row]
        assert (found - logits).norm() <= tolerance * logits.norm()
    expected = torch.cat(parts, dim=1)
    expected.sum().backward()
    assert loss.shape == tokens.shape
    assert (loss.flatten() - expected.flatten()).norm() <= tolerance * expected.norm()
    for (parameter, mine), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert (mine.grad - other.grad).norm() <= tolerance * other.grad.norm(), parameter


@pytest.mark.parametrize("name", ["gqa", "llama3 rope", "qwen2", "qwen3 biases"])
def test_equals_transformers_with_a_block_mask(name: str) -> None:
    """Position ids and a 4D mask there; 1e-5 of the norm in fp32, as without documents."""
    torch.manual_seed(5)
    config = MODELS[name]
    theirs, ours = hugging_face(config), model_of(name)
    carry_weights(ours, dict(theirs.named_parameters()))
    tokens, labels = batch()
    document = torch.repeat_interleave(torch.tensor(LENGTHS)).view(SAMPLES, SIZE)
    allowed = (document[:, :, None] == document[:, None, :]) & torch.ones(SIZE, SIZE, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)[:, None]
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).view(SAMPLES, SIZE)
    expected = theirs(tokens, attention_mask=mask, position_ids=positions).logits
    logits = ours.logits(tokens, DOCUMENTS)
    assert (logits - expected).norm() < 1e-5 * expected.norm()
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    ours(tokens, labels, DOCUMENTS).mean().backward()
    gradients = {k: v.grad for k, v in theirs.named_parameters()}
    weights = dict(ours.named_parameters())
    for p in parameter_table(config):
        grad = weights[p.name].grad
        assert grad is not None
        for s in p.slices:
            mine, other = grad[s.local_row : s.local_row + s.num_rows], gradients[s.tensor]
            assert (mine - other).norm() < 1e-5 * other.norm(), s.tensor


def test_whole_samples_as_documents_are_the_causal_mask() -> None:
    """Samples of one document each: both modes compute the same; 1e-6, a few roundings of fp32 in another order."""
    tokens, labels = batch()
    whole = PackedSequences.from_cu_seqlens(np.array([0, SIZE, 2 * SIZE], np.int32), torch.device("cpu"))
    losses = model_of()(tokens, labels, whole), model_of(documents=False)(tokens, labels)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_compiled_rope_takes_the_positions_of_documents() -> None:
    """The one fused operation that meets them, in the whole model: 1e-5 of the norm, as for the operation itself."""
    kernels = KernelsConfig(compile="operations", rope="torch")
    operations = select_operations(kernels, Requirements(mask="document", heads=8, groups=2))
    results: list[Any] = []
    for fused in (
        Operations(attention=operations.attention, rope=operations.rope),
        Operations(attention=each_document),
    ):
        model = build_stage(MODELS["gqa"], ParallelContext.single(), operations=fused)
        initialise(model, parameter_table(MODELS["gqa"]), seed=3)
        loss = model(*batch(), DOCUMENTS)
        loss.sum().backward()
        results.append([loss.detach(), *(w.grad for w in model.parameters())])
    for found, reference in zip(*results, strict=True):
        assert (found - reference).norm() <= 1e-5 * reference.norm()
