"""Tiny random models and a training run of a few steps on any layout: what the parity tests compare."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_hammer.config import Config, config_from_tree
from megatron_hammer.model.llama import Stage
from megatron_hammer.model.parameters import logical_shapes, parameter_table
from megatron_hammer.parallel.context import ParallelContext, build_parallel_context
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.drift import DriftCheck
from megatron_hammer.train.step import Checks, StepReport, train_step
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.steps import take_steps


def tiny_config(**changes: Any) -> Config:
    """8 heads on 2 groups, an odd vocabulary, widths that 8 ranks can share; ``group__field=value`` changes it."""
    tree: dict[str, dict[str, Any]] = {
        "model": dict(
            hidden_size=64, ffn_hidden_size=176, num_layers=2, num_attention_heads=8, num_query_groups=2, vocab_size=301
        ),
        "data": dict(seq_length=32),
        "train": dict(num_steps=20, micro_batch_size=2, global_batch_size=8, precision="fp32", seed=7),
        "optimizer": dict(lr=1e-2, min_lr=1e-3, weight_decay=0.1, beta2=0.95),
        "schedule": dict(warmup_steps=4),
        # Small buckets, so that there are several and a shard boundary falls inside tensors.
        "parallel": dict(gradient_bucket_bytes=40_000),
    }
    for key, value in changes.items():
        group, field = key.split("__")
        tree.setdefault(group, {})[field] = value
    return config_from_tree(tree)


# Of models with a bias of keys: one vector added to all keys changes attention by RoPE alone, so the gradient of this
# bias is hardly more than rounding (1e-9), and with the usual eps of 1e-8 AdamW would make a whole step of it.
KEY_BIAS = dict(model__qkv_bias=True, optimizer__eps=1e-5)
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": dict(**KEY_BIAS, model__rope_scaling=dict(factor=2.0, rope_type="linear")),
    "qwen3": dict(
        model__qk_norm=True, model__head_dim=12,
        model__rope_scaling=dict(factor=4.0, rope_type="yarn", original_max_position_embeddings=16),
    ),
    "biases": dict(
        **KEY_BIAS, model__attention_output_bias=True, model__mlp_bias=True,
        model__rope_scaling=dict(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
        ),
    ),
}  # fmt: skip
"""Kinds of model with the fields that each has beside a plain Llama's, and a kind of RoPE."""


def random_batch(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: tokens and labels [global_batch_size, s], the same on every rank."""
    generator = torch.Generator().manual_seed(1000 + step)
    assert config.model.vocab_size is not None
    shape = (config.train.global_batch_size, config.data.seq_length + 1)
    # Learnable within a few steps: each token decides the next, and a few high ids exercise the last rank's rows.
    samples = torch.randint(0, 47, shape, generator=generator)
    for i in range(1, shape[1]):
        samples[:, i] = (samples[:, i - 1] * 5 + 7) % 47
    samples = torch.where(samples < 8, config.model.vocab_size - 1 - samples, samples)
    return samples[:, :-1], samples[:, 1:]


def random_documents(config: Config, step: int, samples: range) -> np.ndarray:
    """Documents of 1 to 20 tokens in some samples of the global batch, packed: the same for every layout."""
    lengths: list[int] = []
    for sample in samples:
        rng, left = np.random.default_rng([step, sample]), config.data.seq_length
        while left:
            lengths.append(min(left, int(rng.integers(1, 21))))
            left -= lengths[-1]
    return np.cumsum([0, *lengths]).astype(np.int32)


def rank_batches(config: Config, step: int, ctx: ParallelContext) -> list[Batch[Tensor]]:
    """This rank's micro-batches of the step, in the order that the loader defines; with documents if it masks them."""
    tokens, labels = random_batch(config, step)
    b, stride = config.train.micro_batch_size, config.train.micro_batch_size * ctx.samples.size
    starts = range(b * ctx.samples.rank, config.train.global_batch_size, stride)
    masked = config.data.attention_mask == "document"
    return [
        Batch(
            tokens[i : i + b].contiguous().numpy(),
            labels[i : i + b].contiguous().numpy(),
            documents=random_documents(config, step, range(i, i + b)) if masked else None,
        )
        .shard(ctx.cp.rank, ctx.cp.size)
        .to(torch.device("cpu"))
        for i in starts
    ]


def make_context(config: Config) -> ParallelContext:
    """The context of this process in torch's default group (or alone)."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return build_parallel_context(config.grid(world_size), torch.device("cpu"))


def train(rank: int, config: Config, steps: int) -> tuple[list[tuple[float, float, bool]], dict[str, Tensor]]:
    """Train ``steps`` steps, each with a drift check.

    Returns:
        (loss, grad norm, applied) of each, and this rank's pieces of the logical weights.
    """
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    drift = DriftCheck(config, optimizer, ctx)
    reports: list[StepReport] = [
        train_step(model, optimizer, rank_batches(config, n, ctx), config, n, ctx, checks=Checks(drift))
        for n in range(1, steps + 1)
    ]
    for found in (*(r.drift for r in reports), drift.check(steps)):
        assert found is not None
        drift.raise_on(found)
    return [(float(r.loss), float(r.grad_norm), bool(r.applied)) for r in reports], logical_parts(model, config, ctx)


def exact_steps(rank: int, config: Config) -> Outcome:
    """Two steps in fp64 on the proof's batches, and what they leave."""
    return take_steps(config, make_context(config), torch.float64)


def logical_parts(model: Stage, config: Config, ctx: ParallelContext, grads: bool = False) -> dict[str, Tensor]:
    """This rank's rectangles as full-size logical tensors, NaN where it holds nothing."""
    shapes = logical_shapes(config.model)
    weights = dict(model.named_parameters())
    parts: dict[str, Tensor] = {}
    for p in parameter_table(config.model, model.placement):
        if model.options.store is not None:
            model.options.store.acquire(p.part)
        local = weights[p.name].grad if grads else weights[p.name].detach()
        assert local is not None
        for s in p.slices:
            full = parts.setdefault(s.tensor, torch.full(shapes[s.tensor], torch.nan, dtype=local.dtype))
            rows = local[s.local_row : s.local_row + s.num_rows]
            if s.cols is None:
                full[s.rows[0] : s.rows[1]] = rows
            else:
                full[s.rows[0] : s.rows[1], s.cols[0] : s.cols[1]] = rows
    return parts


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The logical tensors of all ranks put together; copies must agree bit for bit."""
    whole: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            have = whole.setdefault(name, tensor.clone())
            both = ~have.isnan() & ~tensor.isnan()
            assert torch.equal(have[both], tensor[both]), f"ranks hold different copies of {name}"
            have[have.isnan()] = tensor[have.isnan()]
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"no rank holds all of {name}"
    return whole
