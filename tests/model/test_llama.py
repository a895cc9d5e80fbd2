"""Our Llama against ``transformers`` on random tiny models: logits, loss and every gradient tensor."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from megatron_hammer.config import ModelConfig, RopeScaling
from megatron_hammer.huggingface.config import hf_config_from_model
from megatron_hammer.model.head_loss import Objective
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import Stage, build_stage
from megatron_hammer.model.parameters import count_parameters, logical_shapes, parameter_table
from megatron_hammer.parallel.context import Group, ParallelContext

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = RopeScaling(4.0, original_max_position_embeddings=32, rope_type="yarn")
MODELS = {
    "gqa": ModelConfig(64, 176, 3, 8, 2, vocab_size=301),
    "mha": ModelConfig(64, 96, 2, 4, vocab_size=257),
    "one group": ModelConfig(48, 80, 2, 6, 1, vocab_size=129),
    "tied": ModelConfig(64, 176, 2, 8, 4, vocab_size=301, tie_word_embeddings=True),
    "head_dim": ModelConfig(64, 176, 2, 4, 2, head_dim=32, vocab_size=301, norm_eps=1e-6, rope_theta=5e5),
    "llama3 rope": ModelConfig(64, 176, 2, 4, 2, vocab_size=301, rope_scaling=SCALING, rope_theta=5e5),
    "linear rope": ModelConfig(64, 176, 2, 4, 2, vocab_size=301, rope_scaling=RopeScaling(4.0, rope_type="linear")),
    "yarn rope": ModelConfig(64, 176, 2, 4, 2, vocab_size=301, rope_scaling=YARN, rope_theta=1e6),
    "yarn by hand": ModelConfig(
        64, 96, 2, 4, 2, vocab_size=301, norm_eps=1e-6,
        rope_scaling=replace(YARN, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3, truncate=False),
    ),
    "dynamic rope": ModelConfig(
        64, 96, 2, 4, 2, vocab_size=301, rope_scaling=RopeScaling(2.0, rope_type="dynamic"), max_position_embeddings=24
    ),
    "biases": ModelConfig(
        64, 176, 2, 8, 2, vocab_size=301, qkv_bias=True, attention_output_bias=True, mlp_bias=True
    ),
    "mlp bias": ModelConfig(48, 80, 1, 6, 1, vocab_size=129, mlp_bias=True),
    "qwen2": ModelConfig(64, 176, 2, 8, 2, vocab_size=301, qkv_bias=True, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2 head_dim": ModelConfig(64, 96, 2, 4, 2, head_dim=24, vocab_size=129, qkv_bias=True, norm_eps=1e-6),
    "qwen3": ModelConfig(64, 176, 2, 8, 2, head_dim=16, vocab_size=301, qk_norm=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3 biases": ModelConfig(
        64, 96, 2, 4, 1, vocab_size=301, qk_norm=True, qkv_bias=True, attention_output_bias=True,
        tie_word_embeddings=True, rope_scaling=YARN,
    ),
}  # fmt: skip
LONGEST = 24  # positions: the texts of these tests are longer, so that the dynamic RoPE is stretched


def hugging_face(config: ModelConfig, attention: str = "sdpa") -> Any:
    """A random model of transformers of the same shape; norms away from one and biases from zero, so that they matter.

    Its config is what an export writes, read as a folder's is.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    words = hf_config_from_model(replace(config, max_position_embeddings=LONGEST), {}, "float32")
    settings = AutoConfig.for_model(**words)
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            if name.endswith(".bias"):
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(1 + 0.2 * noise if weight.dim() == 1 else 0.08 * noise)
            assert name in logical_shapes(config)
    return model


def carry_weights(model: Stage, theirs: dict[str, torch.Tensor]) -> None:
    """Fill ours from Hugging Face's through the parameter table."""
    ours = dict(model.named_parameters())
    with torch.no_grad():
        for p in parameter_table(model.config):
            for s in p.slices:
                ours[p.name][s.local_row : s.local_row + s.num_rows] = theirs[s.tensor]


@pytest.mark.parametrize("name", MODELS)
def test_equals_transformers(name: str) -> None:
    """1e-5 of the norm in fp32: both sides round about as often, in another order."""
    torch.manual_seed(zlib.crc32(name.encode()))
    config = MODELS[name]
    theirs = hugging_face(config)
    ours = build_stage(config, ParallelContext.single())
    carry_weights(ours, dict(theirs.named_parameters()))
    tokens = torch.randint(0, config.vocab_size or 0, (3, 48))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()

    expected = theirs(inputs).logits
    logits = ours.logits(inputs)
    assert (logits - expected).norm() / expected.norm() < 1e-5
    assert logits.shape == expected.shape, "padding must not show"

    objective = Objective(torch.tensor(1 / labels.numel()))
    losses = ours(inputs, labels, objective=objective)
    loss = (losses * objective.weight).sum()
    expected_loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    loss.backward()
    expected_loss.backward()
    gradients = {k: v.grad for k, v in theirs.named_parameters()}
    weights = dict(ours.named_parameters())
    for p in parameter_table(config):
        grad = weights[p.name].grad
        assert grad is not None
        for s in p.slices:
            mine, other = grad[s.local_row : s.local_row + s.num_rows], gradients[s.tensor]
            assert (mine - other).norm() / other.norm() < 1e-5, s.tensor
    assert sum(p.numel() for p in theirs.parameters()) == count_parameters(config)


@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_padding_gets_no_gradient(name: str) -> None:
    config = MODELS[name]
    model = build_stage(config, ParallelContext.single())
    initialise(model, parameter_table(config), seed=3)
    assert model.embedding.weight.shape[0] == 384, "301 padded to a multiple of 128"
    tokens = torch.randint(0, 301, (2, 17))
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    for weight in (model.embedding.weight, *([] if config.tie_word_embeddings else [model.head.weight])):
        assert weight.grad is not None
        assert not weight[301:].any() and not weight.grad[301:].any()
        assert weight.grad[:301].any()


def test_initial_weights_do_not_depend_on_the_layout() -> None:
    """A rank draws only its blocks; together they are what one process draws."""
    config = ModelConfig(64, 96, 1, 4, 2, vocab_size=600)
    whole = build_stage(config, ParallelContext.single())
    initialise(whole, parameter_table(config), seed=5)
    reference = whole.head.weight.detach()
    assert float(reference[:600].std()) == pytest.approx(0.02, rel=0.02)
    for rank in range(2):
        ctx = ParallelContext(torch.device("cpu"), tp=Group(rank, 2))
        part = build_stage(config, ctx)
        initialise(part, parameter_table(config, part.placement), seed=5)
        rows = part.head.weight.shape[0]
        mine = part.head.weight[: min(rows, 600 - rank * rows)]
        assert torch.equal(mine, reference[rank * rows : rank * rows + mine.shape[0]])
        columns = slice(32 * rank, 32 * (rank + 1))
        assert torch.equal(
            part.layers["0"].attention.output.weight, whole.layers["0"].attention.output.weight[:, columns]
        )
    other = build_stage(config, ParallelContext.single())
    initialise(other, parameter_table(config), seed=6)
    assert not torch.equal(other.head.weight, reference[: other.head.weight.shape[0]])


def test_future_tokens_do_not_matter() -> None:
    config = MODELS["gqa"]
    model = build_stage(config, ParallelContext.single())
    initialise(model, parameter_table(config), seed=1)
    a = torch.randint(0, 301, (1, 20))
    b = a.clone()
    b[0, 12:] = torch.randint(0, 301, (8,))
    assert torch.equal(model.logits(a)[:, :12], model.logits(b)[:, :12])
    assert not torch.equal(model.logits(a)[:, 12:], model.logits(b)[:, 12:])
