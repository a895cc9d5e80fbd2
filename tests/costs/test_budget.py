"""The limits of a step: the FLOPs are those of flops.py, the times those of a count made without this code."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_hammer.config import ModelConfig, load_config
from megatron_hammer.costs import budget
from megatron_hammer.costs.budget import Cost, Rates, StepShape, step_costs
from megatron_hammer.costs.flops import flops_per_token
from megatron_hammer.model.parameters import count_parameters, logical_shapes

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def test_the_limits_of_the_1b4_model_on_an_h200() -> None:
    """Milliseconds that were computed by hand, of products at 790 TFLOP/s and bytes at 4.3 TB/s."""
    overrides = ["model.vocab_size=105789", "train.micro_batch_size=8", "train.global_batch_size=8"]
    shape = StepShape.of(load_config(CONFIGS / "hammerllm_1b4.yaml", overrides), fused_accumulation=True)
    rates = Rates(790e12, 4.3e12)
    ms = {part: 1e3 * rates.seconds(cost) for part, cost in step_costs(shape).items()}
    assert ms[budget.LAYER_PRODUCTS] == pytest.approx(120.6, abs=0.05)
    assert ms[budget.HEAD_PRODUCTS] == pytest.approx(27.0, abs=0.05)
    assert ms[budget.ATTENTION] == pytest.approx(11.5, abs=0.05)
    assert ms[budget.OPTIMIZER] == pytest.approx(11.1, abs=0.05)
    # By hand 45.25 hidden tensors of 67 MB a layer; here 8.25 F fewer, for no product of SwiGLU is written twice.
    elementwise = ms[budget.NORM] + ms[budget.ROPE] + ms[budget.SWIGLU]
    assert elementwise == pytest.approx(22 * (45.25 - 2.75) * 67.1e6 / 4.3e9, rel=0.02)


def test_flops_are_those_of_the_metrics() -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    for _ in range(20):
        groups, d = rng.randint(1, 4), 2 * rng.randint(1, 40)
        model = ModelConfig(
            hidden_size=rng.randint(8, 999),
            ffn_hidden_size=rng.randint(8, 999),
            num_layers=rng.randint(1, 9),
            num_attention_heads=groups * rng.randint(1, 4),
            num_query_groups=groups,
            head_dim=d,
            vocab_size=rng.randint(100, 99_999),
            tie_word_embeddings=rng.random() < 0.5,
        )
        s, b, accumulation = rng.randint(2, 999), rng.randint(1, 9), rng.randint(1, 9)
        shape = StepShape(model, s * b, accumulation, s, 2, rng.random() < 0.5)
        flops = sum(cost.flops for cost in step_costs(shape).values())
        assert flops == pytest.approx(s * b * accumulation * flops_per_token(model, s)[1], rel=1e-12), f"seed {seed}"


def test_bytes_of_one_layer_by_hand() -> None:
    """h 8, f 12, n 4 and g 2 heads of 2, v 128, fp32, T 10, 3 micro-batches."""
    model = ModelConfig(8, 12, 1, 4, 2, vocab_size=100)
    costs = step_costs(StepShape(model, 10, 3, 5.0, 4, False))
    assert costs[budget.SWIGLU] == Cost(0, 3 * (3 + 5) * 10 * 12 * 4)
    assert costs[budget.ROPE] == Cost(0, 3 * 4 * 10 * (4 + 2) * 2 * 4)
    # first norm: 2 + 4 tensors, second: 4 + 4, last: 4 + 3
    assert costs[budget.NORM] == Cost(0, 3 * (6 + 8 + 7) * 10 * 8 * 4)
    assert costs[budget.LOSS] == Cost(0, 3 * 2 * 10 * 128 * 4)
    weights = (4 + 4) * 2 * 8 + 8 * 8 + 3 * 8 * 12 + 128 * 8
    assert costs[budget.GRADIENTS] == Cost(0, 4 * weights * (1 + 2 + 2))
    assert costs[budget.OPTIMIZER] == Cost(0, 32 * count_parameters(model))
    assert sum(len(shape) == 2 for shape in logical_shapes(model).values()) == 9, (
        "seven in the layer and two vocabularies"
    )
    fused = step_costs(StepShape(model, 10, 3, 5.0, 4, True))
    assert budget.GRADIENTS not in fused
    moved = sum(fused[p].bytes - costs[p].bytes for p in (budget.LAYER_PRODUCTS, budget.HEAD_PRODUCTS))
    assert moved == pytest.approx(costs[budget.GRADIENTS].bytes)
    halves = step_costs(StepShape(model, 10, 3, 5.0, 2, False))
    assert halves[budget.OPTIMIZER] == Cost(0, 34 * count_parameters(model))


def test_a_limit_is_the_longer_of_computing_and_moving() -> None:
    rates = Rates(100.0, 10.0)
    assert rates.seconds(Cost(200, 10)) == 2 and rates.seconds(Cost(100, 40)) == 4


def test_masked_documents_need_less_attention() -> None:
    config = load_config(CONFIGS / "tiny.yaml", ["model.vocab_size=300", "train.precision=bf16"])
    shape = StepShape.of(config)
    shorter = replace(shape, attention_length=shape.attention_length / 4)
    whole, masked = step_costs(shape)[budget.ATTENTION], step_costs(shorter)[budget.ATTENTION]
    assert masked.flops == whole.flops / 4 and masked.bytes == whole.bytes
