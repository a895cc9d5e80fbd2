"""Shrinks a user's config so that it is proved in a minute on CPUs, and leaves everything that ranks share as it is.

Widths, layers, vocabulary, length and batch shrink. What stays: every axis of the layout and what it divides (heads,
query groups, sequence, padding of the vocabulary), mask, tying, RoPE's scaling, recompute, clipping, decay and the
z-loss. Needs no torch.
"""

from __future__ import annotations

import dataclasses

from megatron_hammer.config import Config, DataConfig, KernelsConfig, OptimizerConfig, ParallelConfig
from megatron_hammer.parallel.placement import VOCAB_PADDING_MULTIPLE

HEAD_SIZE, FFN_PER_RANK, LAYERS, LENGTH_PER_RANK, SHORTEST = 8, 24, 2, 8, 32
MICRO_BATCH, ACCUMULATED, BUCKETS = 2, 2, 5
STEPS = 2


def shrink(config: Config, world_size: int, on_gpus: bool = False) -> tuple[Config, list[str]]:
    """A small config of the same structure that is valid for ``world_size`` ranks, and what was left out of it.

    Args:
        config: valid for ``world_size`` ranks.
        on_gpus: for GPUs, with precision and kernels kept too.
    """
    model, tp, train = config.model, config.parallel.tensor_model_parallel_size, config.train
    assert model.vocab_size is not None, "model.vocab_size must be resolved"
    pipeline = config.pipeline()
    head = min(64, model.head_size) if on_gpus else HEAD_SIZE  # GPU kernels want usual sizes
    padding = VOCAB_PADDING_MULTIPLE * tp
    unit = LENGTH_PER_RANK * tp * config.parallel.context_parallel_size
    length = min(config.data.seq_length, -(-SHORTEST // unit) * unit)
    small_model = dataclasses.replace(
        model,
        hidden_size=model.num_attention_heads * head,
        head_dim=None if model.head_dim is None else head,
        ffn_hidden_size=(FFN_PER_RANK, 64)[on_gpus] * tp,
        num_layers=min(model.num_layers, max(LAYERS, pipeline.num_stages + 1)),  # no even split
        vocab_size=model.vocab_size % padding + padding if model.vocab_size > 2 * padding else model.vocab_size,
        max_position_embeddings=length,
        init_std=0.1,
    )
    micro_batch = min(train.micro_batch_size, MICRO_BATCH)
    # A pipeline with all its stages at work at once; where a rank has several, whole groups of its ranks.
    most = pipeline.ranks + 1 if pipeline.stages_per_rank == 1 else 2 * pipeline.ranks
    accumulated = min(config.grad_accum(world_size), max(ACCUMULATED, most))
    layers = None if train.recompute_layers is None else min(train.recompute_layers, small_model.num_layers)
    small_train = dataclasses.replace(
        train,
        num_steps=STEPS,
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch * accumulated * config.data_parallel_size(world_size),
        batch_size_ramp=None,
        recompute_layers=layers,
        evaluator=None,
        replay=None,
        precision=train.precision if on_gpus else "fp32",
        device="cuda" if on_gpus else "cpu",
        dry_run=False,
    )
    split = (
        None if config.parallel.pipeline_split is None else _small_split(small_model.num_layers, pipeline.num_stages)
    )
    elements = 4 * small_model.num_layers * small_model.hidden_size * (small_model.hidden_size + 24) // tp
    small = dataclasses.replace(
        config,
        model=small_model,
        train=small_train,
        tokenizer=dataclasses.replace(config.tokenizer, path=None),
        data=DataConfig(seq_length=length, attention_mask=config.data.attention_mask),
        # Large steps at once: an update that differs must show after two of them. A large eps: without it AdamW's first
        # step is the sign of the gradient, which rounding decides where a gradient is near zero.
        optimizer=dataclasses.replace(
            config.optimizer if on_gpus else exact_optimizer(config.optimizer),
            lr=0.01, min_lr=0.01, eps=max(1e-3, config.optimizer.eps),
        ),
        schedule=dataclasses.replace(config.schedule, style="constant", warmup_steps=0, decay_steps=None,
                                     anneal_steps=None),
        parallel=dataclasses.replace(
            config.parallel, gradient_bucket_bytes=max(1, 4 * elements // BUCKETS), pipeline_split=split
        ),
        kernels=config.kernels if on_gpus else KernelsConfig(loss_chunk_tokens=max(1, length * micro_batch // 2 + 1)),
        checkpoint=dataclasses.replace(config.checkpoint, init_from=None),
    )  # fmt: skip
    return small, [] if on_gpus else _left_out(config)


def _small_split(layers: int, stages: int) -> tuple[int, ...]:
    """One layer in each stage, and what is left in the first."""
    return (layers - stages + 1, *(1 for _ in range(stages - 1)))


def exact_optimizer(optimizer: OptimizerConfig) -> OptimizerConfig:
    """The same without products in bf16."""
    return dataclasses.replace(optimizer, newton_schulz="fp32") if optimizer.style == "muon" else optimizer


def alone(config: Config) -> Config:
    """The same run on one process."""
    parallel = ParallelConfig(gradient_bucket_bytes=config.parallel.gradient_bucket_bytes)
    return dataclasses.replace(config, parallel=parallel)


def chosen_kernels(config: Config) -> list[str]:
    """The settings of kernels that take no part in a proof by other kernels, as they would be written."""
    default, kernels = KernelsConfig(), config.kernels
    names = [
        f.name for f in dataclasses.fields(kernels) if getattr(kernels, f.name) != getattr(default, f.name)
    ]  # fmt: skip
    return [f"kernels.{name}={getattr(kernels, name)}" for name in names if name != "loss_chunk_tokens"]


def _left_out(config: Config) -> list[str]:
    """What of the user's config takes no part in the proof on CPUs."""
    precision = config.train.precision
    left = [*chosen_kernels(config), *([] if precision == "fp32" else [f"train.precision={precision}"])]
    chosen = config.optimizer.newton_schulz
    return left + ([f"optimizer.newton_schulz={chosen}"] if chosen == "bf16" else [])
