"""Every setting of a run: one tree of frozen dataclasses, read from YAML, overridden by ``group.field=value``.

::

    CONFIG.yaml ----> tree of plain values ----> Config (frozen) ----> validate(world_size) ----> everything else
    group.field=value ^ (last one wins)            types checked         ranges and relations

The docstring under a field is its documentation and what ``--help`` prints. What can be computed is not a field:
``data_parallel_size``, ``grad_accum``, ``padded_vocab_size`` are functions here. Nothing mutates a config; the
resolved one (with ``model.vocab_size`` filled in from the tokenizer) is stored in each checkpoint and logged once.
Imports neither torch nor numpy.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_hammer.errors import ConfigError

FP8_MULTIPLE = 16  # elements: both sides of an fp8 matrix, or cuBLAS refuses it (Transformer Engine's autocast)
VOCAB_PADDING_MULTIPLE = 128  # rows a tensor-parallel rank: an odd vocabulary forces a slow matrix kernel


def _require(condition: bool, what: str, rule: str, remedy: str, number: int = 4) -> None:
    if not condition:
        raise ConfigError(number, what, rule, remedy)


def _at_least(group: str, values: Mapping[str, float | None], minimum: float) -> None:
    for name, value in values.items():
        if value is not None and not value >= minimum:  # also catches NaN
            raise ConfigError(4, f"{group}.{name}={value}", f"must be at least {minimum}", f"raise {group}.{name}")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of RoPE for longer contexts (Hugging Face ``rope_type: llama3``)."""

    factor: float
    """By how much the long wavelengths are stretched."""
    low_freq_factor: float
    """Wavelengths above original_max_position_embeddings / low_freq_factor are stretched in full."""
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / high_freq_factor are left alone."""
    original_max_position_embeddings: int
    """Context length in tokens for which the model was first trained."""


@dataclass(frozen=True)
class ModelConfig:
    """The Llama: sizes are global, never those of one rank."""

    hidden_size: int
    """Width h of the residual stream."""
    ffn_hidden_size: int
    """Width f of the SwiGLU feed-forward layer (Hugging Face: intermediate_size)."""
    num_layers: int
    """Number of decoder layers."""
    num_attention_heads: int
    """Number n of query heads."""
    num_query_groups: int | None = None
    """Number g of key/value heads (Hugging Face: num_key_value_heads); absent: as many as query heads."""
    head_dim: int | None = None
    """Width d of one head; absent: hidden_size / num_attention_heads."""
    vocab_size: int | None = None
    """True number v of token ids, without padding; absent: that of the tokenizer."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: RopeScaling | None = None
    """Llama 3's RoPE scaling; absent: none."""
    max_position_embeddings: int | None = None
    """Longest context written to the exported model's config; absent: data.seq_length."""
    tie_word_embeddings: bool = False
    """Use the embedding matrix as output head too."""
    init_std: float = 0.02
    """Standard deviation of the initial weights, N(0, std); norms start at one."""

    @property
    def query_groups(self) -> int:
        """``num_query_groups`` with its default filled in."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_size(self) -> int:
        """``head_dim`` with its default filled in."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def check(self) -> None:
        """Raise ``ConfigError`` unless the shape is a possible Llama."""
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "int" in str(f.type)}
        _at_least("model", sizes, 1)
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            _require(value > 0, f"model.{name}={value}", "must be positive", f"raise model.{name}")
        _at_least("model", {"init_std": self.init_std}, 0)
        heads, groups = self.num_attention_heads, self.query_groups
        _require(
            heads % groups == 0,
            f"model.num_query_groups={groups}",
            f"must divide model.num_attention_heads={heads}",
            f"use {_divisors(heads)}",
        )
        if self.head_dim is None:
            _require(
                self.hidden_size % heads == 0,
                f"model.num_attention_heads={heads}",
                f"must divide model.hidden_size={self.hidden_size}",
                "change one of them or set model.head_dim",
            )
        _require(
            self.head_size % 2 == 0, f"model.head_dim={self.head_size}", "must be even for RoPE", "set model.head_dim"
        )
        if self.rope_scaling is not None:
            _at_least("model.rope_scaling", {"factor": self.rope_scaling.factor}, 1)


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work. data_parallel_size is what is left: world size / tensor_model_parallel_size."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the stack of layers (PP). Only 1 is possible in this version."""
    sequence_parallel: bool = False
    """Between the matrices, keep only seq_length / TP rows on each rank (arXiv 2205.05198). Needs TP of 2 or more."""
    gradient_bucket_bytes: int = 64 * 2**20
    """Size of one fp32 gradient bucket: a bucket's reduce-scatter starts as soon as its last gradient is there."""
    timeout_seconds: int = 600
    """How long a rank waits for the others in one collective."""

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible sizes."""
        _at_least("parallel", {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, 0)
        _at_least(
            "parallel",
            {
                "tensor_model_parallel_size": self.tensor_model_parallel_size,
                "gradient_bucket_bytes": self.gradient_bucket_bytes,
                "timeout_seconds": self.timeout_seconds,
            },
            1,
        )
        pp = self.pipeline_model_parallel_size
        _require(
            pp == 1,
            f"parallel.pipeline_model_parallel_size={pp}",
            "must be 1 in this version",
            "use tensor and data parallelism",
        )
        _require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel=true",
            "needs parallel.tensor_model_parallel_size of 2 or more",
            "set it to false or raise the size",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer made the data and goes into the exported model."""

    path: str | None = None
    """A sentencepiece .model, a tokenizer.json, or a Hugging Face folder."""


@dataclass(frozen=True)
class DataConfig:
    """Indexed datasets (prefix P of P.bin and P.idx) and how samples are cut from them."""

    train: dict[str, float] | None = None
    """One prefix, or {prefix: weight, ...}; data.weights says what a weight is."""
    weights: Literal["share", "tokens", "epochs"] = "share"
    """What the weights of data.train are. share: of the samples, in proportion. tokens: tokens to draw (142e9). epochs:
    passes over the source (1.5). train.num_steps stays the length of the run: all sources are scaled to it alike, and
    the plan printed before training says what each one gives and which length fits."""
    max_epochs: float | None = None
    """Refuse a run that would read a source more often than this, counted from step 1; absent: no limit."""
    valid: dict[str, str] | None = None
    """{name: prefix, ...}: validation sets, each reported under its name; absent: no evaluation."""
    seq_length: int = 2048
    """Targets s in one sample; a sample holds s + 1 tokens."""
    order: Literal["independent", "megatron"] = "independent"
    """independent: a pure function of (seed, sources and weights, epoch, position), unchanged when a run is extended.
    megatron: Megatron-LM's own order, for those who move a run; it depends on train.num_steps."""
    index_folder: str | None = None
    """Where the indices of large datasets are kept, built once and shared by all processes; absent: P.index beside each
    dataset P. Set it where the datasets cannot be written."""
    attention_mask: Literal["causal", "document"] = "causal"
    """causal: each sample is one stretch of text, attention crosses the documents in it (HammerLLM's recipe).
    document: no attention across documents, and positions restart at 0 in each. What a sample holds of a document
    counts as a whole one: where it was cut, positions begin at 0 too. In the order megatron a document is one sequence
    of the dataset. Both have the same targets: the last token of a document predicts the first of the next one (a bos
    where documents have one). So the two losses can be compared, and each step's number of targets is known."""

    def check(self) -> None:
        """Raise ``ConfigError`` for an impossible mix or length."""
        _at_least("data", {"seq_length": self.seq_length}, 1)
        _require(
            self.max_epochs is None or self.max_epochs > 0,
            f"data.max_epochs={self.max_epochs}",
            "must be positive",
            "leave it out for no limit",
        )
        for prefix, weight in (self.train or {}).items():
            _require(
                0 < weight < math.inf,
                f"data.train[{prefix}]={weight}",
                "must be a positive number",
                "give every source a weight above zero or leave it out",
            )
        for name in self.valid or {}:
            _require(
                name != "" and "/" not in name,
                f"data.valid[{name!r}]",
                "must be a name without '/'",
                "rename this validation set",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) with global-norm clipping, sharded over the data-parallel ranks (ZeRO-1)."""

    lr: float = 5e-4
    """Peak learning rate."""
    min_lr: float = 5e-5
    """Floor of the learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    initial_loss_scale: float = 65536.0
    """fp16 only: first loss scale; halved at an overflow, doubled after loss_scale_window good steps."""
    loss_scale_window: int = 1000
    """fp16 only: good steps before the loss scale is doubled."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        _at_least("optimizer", {k: getattr(self, k) for k in ("lr", "min_lr", "weight_decay", "clip_grad")}, 0)
        _at_least(
            "optimizer", {"initial_loss_scale": self.initial_loss_scale, "loss_scale_window": self.loss_scale_window}, 1
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(
                0 <= value < 1, f"optimizer.{name}={value}", "must lie in [0, 1)", "0.9 and 0.95 to 0.999 are usual"
            )
        _require(self.eps > 0, f"optimizer.eps={self.eps}", "must be positive", "1e-8 is usual")
        _require(
            self.min_lr <= self.lr,
            f"optimizer.min_lr={self.min_lr}",
            f"must not exceed optimizer.lr={self.lr}",
            "lower min_lr",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step (optim/schedule.py draws the shapes)."""

    style: Literal["cosine", "cosine-clamped", "wsd", "linear", "constant"] = "cosine"
    """cosine: between lr and min_lr. cosine-clamped: to zero, held at min_lr (HammerLLM's). wsd: constant, then a
    linear descent over anneal_steps. linear: to min_lr. constant: lr. Each after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up; step warmup_steps is the first at the peak."""
    decay_steps: int | None = None
    """Step at which the descent ends, warm-up included; absent: train.num_steps."""
    anneal_steps: int | None = None
    """wsd only: length of the final descent; absent: a tenth of decay_steps."""

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible lengths."""
        _at_least("schedule", {"warmup_steps": self.warmup_steps}, 0)
        _at_least("schedule", {"decay_steps": self.decay_steps, "anneal_steps": self.anneal_steps}, 1)
        _require(
            self.anneal_steps is None or self.style == "wsd",
            f"schedule.anneal_steps={self.anneal_steps}",
            "belongs to schedule.style=wsd only",
            "remove it or choose wsd",
        )


ATTENTION_MASKS = {  # backend -> the values of data.attention_mask that it can do; the rest is kernels/attention.py's
    "fused": ("causal", "document"),
    "cudnn": ("causal",),
    "sdpa": ("causal",),
    "varlen": ("document",),
    "sdpa-documents": ("document",),
    "flash-attn": ("causal", "document"),
    "flash-attn-3": ("causal", "document"),
    "flash-attn-4": ("causal", "document"),
    "te": ("causal", "document"),
}


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation runs the hot operations."""

    compile: Literal["none", "operations", "layers"] = "none"
    """operations: torch.compile fuses those of norm, RoPE and SwiGLU that have no kernel of their own. layers: each
    decoder layer is compiled whole, once for all. Either costs seconds at start; on a CPU it needs a C++ compiler."""
    norm: Literal["auto", "torch", "fused", "te", "apex", "liger"] = "auto"
    """Residual add and RMSNorm. auto: fused where it can run, else torch; the same for the next three. fused: our own
    compiled kernel, C++ on a CPU, CUDA on a GPU. te, apex, liger: that library's, where it is installed."""
    rope: Literal["auto", "torch", "fused", "liger"] = "auto"
    """Rotary position embedding."""
    swiglu: Literal["auto", "torch", "fused", "liger"] = "auto"
    """SwiGLU's product."""
    adamw: Literal["auto", "torch", "fused", "apex"] = "auto"
    """The update, with clipping and the 16-bit copy in the same pass, and the gradient's norm."""
    attention: Literal[
        "auto", "fused", "cudnn", "sdpa", "varlen", "sdpa-documents", "flash-attn", "flash-attn-3", "flash-attn-4", "te"
    ] = "auto"
    """auto: the first of the others that can do what the config asks for; one that is named and cannot is an error.
    fused: our own, for either mask on a CPU. cudnn: cuDNN's by way of torch, causal, on a GPU in 16 bits; auto takes it
    on Hopper and Blackwell. sdpa: torch's scaled_dot_product_attention, causal. varlen: torch's own FlashAttention for
    document masks, on a GPU in 16 bits. sdpa-documents: one sdpa call a document, anywhere. flash-attn, flash-attn-3,
    flash-attn-4: those packages, te: what Transformer Engine chooses; for either mask on a GPU in 16 bits, by name
    only."""
    layers: Literal["torch", "te"] = "torch"
    """torch: the layers in plain torch. te: linear layers and norms of NVIDIA's Transformer Engine, on a GPU; the
    weight's gradient is accumulated in the matrix product. Checkpoints are the same."""
    fp8: Literal["off", "delayed", "current"] = "off"
    """8-bit matrix products of the layers in training, with bf16 on a GPU. current: each tensor scaled by its own
    largest value. delayed: by those of past steps, which no checkpoint holds, so that a resumed run scales anew; with
    kernels.layers=te only."""
    fp8_head: bool = False
    """With kernels.fp8: the output head's products too. It is the layer that 8 bits disturb most; hence an option."""
    deterministic: bool = False
    """Equal bits from run to run on one machine and layout: takes only backends that can, and tells torch's own kernels
    to. On a CPU all do without it."""
    loss: Literal["auto", "fused", "triton", "torch"] = "auto"
    """Softmax and gradient of the logits. auto: on a CPU fused, our own compiled kernel, on a GPU triton, where it is
    there, else torch."""
    loss_chunk_tokens: int | None = None
    """Tokens of a micro-batch whose logits exist at once, [tokens, vocabulary / TP]; absent: 2048 on a GPU, 256 on a
    CPU. Fewer take less memory and more time: the gradient of the output head is read and written once a chunk."""

    def check(self) -> None:
        """Raise ``ConfigError`` for an impossible size."""
        _at_least("kernels", {"loss_chunk_tokens": self.loss_chunk_tokens}, 1)


@dataclass(frozen=True)
class TrainConfig:
    """Length, sizes and place of the run."""

    output: str = "runs/default"
    """Folder of the run: checkpoints/, metrics.jsonl, tensorboard/."""
    num_steps: int = 1000
    """Total number of steps, counted from 1 over all restarts."""
    micro_batch_size: int = 1
    """Samples b that one rank processes at once."""
    global_batch_size: int = 8
    """Samples a step over all ranks; a multiple of micro_batch_size x data_parallel_size."""
    seed: int = 1234
    """Seeds the initial weights and the order of the data."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of weights and activations; masters, moments and gradient sums are always fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward computes again instead of keeping it; the results are the same. selective: the outputs of norms,
    attention and SwiGLU. full: whole layers, of which only the input is kept; a third more of their work."""
    recompute_layers: int | None = None
    """With full: the first so many layers; absent: all."""
    z_loss: float = 0.0
    """Weight c of c log^2(sum of exponentials) in what is minimised, which keeps logits small (arXiv 2204.02311; usual:
    1e-4). No reported loss contains it."""
    eval_interval_steps: int | None = None
    """Evaluate every set of data.valid after so many steps and after the last; absent: after the last only."""
    eval_samples: int = 256
    """Samples of each validation set (all of them when it has fewer)."""
    max_consecutive_skips: int = 30
    """End the run (exit code 9) after so many skipped steps in a row; a step is skipped when its gradient is not
    finite."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU of this local rank when torch sees one, else the CPU."""
    dry_run: bool = False
    """Print the resolved config, the parameter count, the parallel layout and the step's tokens, and stop."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        names = (
            "num_steps",
            "micro_batch_size",
            "global_batch_size",
            "recompute_layers",
            "eval_interval_steps",
            "eval_samples",
            "max_consecutive_skips",
        )
        _at_least("train", {k: getattr(self, k) for k in names}, 1)
        _at_least("train", {"z_loss": self.z_loss}, 0)
        _require(0 <= self.seed < 2**32, f"train.seed={self.seed}", "must lie in [0, 2^32)", "choose a smaller seed")
        _require(self.output != "", "train.output=''", "must name a folder", "set train.output")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep, where to start."""

    save_interval_steps: int | None = None
    """Save after so many steps, and always after the last; absent: after the last only."""
    keep_last: int = 2
    """Newest checkpoints kept; older ones are removed after a newer one is committed."""
    init_from: str | None = None
    """Checkpoint (or run) whose weights a new run starts from; ignored once the run has checkpoints of its own."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        _at_least("checkpoint", {"save_interval_steps": self.save_interval_steps}, 1)
        _at_least("checkpoint", {"keep_last": self.keep_last}, 2)


@dataclass(frozen=True)
class LogConfig:
    """What is shown; metrics.jsonl has every step whatever stands here."""

    interval_steps: int = 10
    """Steps between two printed lines (a terminal gets a progress bar)."""
    tensorboard: bool = True
    """Write OUT/tensorboard/ too."""
    peak_tflops: float | None = None
    """Dense peak of one device in the run's precision, for MFU; absent: known data-centre GPUs, else MFU is null."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        _at_least("log", {"interval_steps": self.interval_steps}, 1)
        peak = self.peak_tflops
        _require(
            peak is None or peak > 0, f"log.peak_tflops={peak}", "must be positive", "state the device's dense peak"
        )


@dataclass(frozen=True)
class Config:
    """The whole tree; one group per field."""

    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def validate(self, world_size: int) -> None:
        """Check every group and every relation between groups for ``world_size`` ranks.

        Raises:
            ConfigError: names field, value, rule and remedy. Nothing is communicated.
        """
        for group in dataclasses.fields(self):
            check = getattr(getattr(self, group.name), "check", None)
            if check is not None:
                check()
        model, tp = self.model, self.parallel.tensor_model_parallel_size
        allowed = [t for t in range(1, model.num_attention_heads + 1) if not _tp_obstacle(self, t)]
        obstacle = _tp_obstacle(self, tp)
        _require(
            not obstacle, f"parallel.tensor_model_parallel_size={tp}", obstacle, "use " + _choices(allowed), number=5
        )
        _require(
            world_size % tp == 0,
            f"parallel.tensor_model_parallel_size={tp}",
            f"must divide the {world_size} ranks",
            f"start a multiple of {tp} ranks or use {_divisors(world_size)}",
            number=5,
        )
        train = self.train
        samples = train.micro_batch_size * self.data_parallel_size(world_size)
        _require(
            train.global_batch_size % samples == 0,
            f"train.global_batch_size={train.global_batch_size}",
            f"must be a multiple of train.micro_batch_size={train.micro_batch_size} x data_parallel_size="
            f"{self.data_parallel_size(world_size)}",
            f"use a multiple of {samples}",
            number=5,
        )
        _require(
            train.precision != "fp16" or self.optimizer.initial_loss_scale >= 1,
            "optimizer.initial_loss_scale",
            "must be at least 1",
            "65536 is usual",
        )
        attention, mask = self.kernels.attention, self.data.attention_mask
        able = [name for name, masks in ATTENTION_MASKS.items() if mask in masks]
        _require(
            attention in ("auto", *able),
            f"kernels.attention={attention}",
            f"cannot do data.attention_mask={mask}",
            f"use {' or '.join(('auto', *able))}",
            number=9,
        )
        obstacles = {12: _te_obstacle, 13: _fp8_obstacle, 14: _recompute_obstacle, 15: _compile_obstacle}
        for number, (what, rule, remedy) in ((n, find(self)) for n, find in obstacles.items()):
            _require(not what, what, rule, remedy, number)
        longest = model.max_position_embeddings
        _require(
            longest is None or longest >= self.data.seq_length,
            f"data.seq_length={self.data.seq_length}",
            f"must not exceed model.max_position_embeddings={longest}",
            "shorten it or raise the limit",
            number=5,
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that process different samples."""
        return world_size // self.parallel.tensor_model_parallel_size

    def grad_accum(self, world_size: int) -> int:
        """Micro-batches that each rank processes in one step."""
        return self.train.global_batch_size // (self.train.micro_batch_size * self.data_parallel_size(world_size))

    @property
    def tokens_per_step(self) -> int:
        """Targets in one step, over all ranks."""
        return self.train.global_batch_size * self.data.seq_length

    def notes(self) -> list[str]:
        """Remarks on settings that are valid but do something other than their plain reading."""
        notes = []
        if self.schedule.warmup_steps > self.train.num_steps:
            notes.append(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is longer than the run: clamped to "
                f"train.num_steps={self.train.num_steps}"
            )
        if not self.data.valid:
            notes.append("data.valid is absent: no evaluation")
        if self.kernels.fp8 == "delayed":
            notes.append(
                "kernels.fp8=delayed: checkpoints hold no scales, so a resumed run is not bit-equal to one that went "
                "on, and the first micro-batches after each start lose small gradients; kernels.fp8=current has neither"
            )
        return notes


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Rows of embedding and head in memory: the next multiple of 128 x TP. Never on disk."""
    multiple = VOCAB_PADDING_MULTIPLE * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def _tp_obstacle(config: Config, tp: int) -> str:
    """Why ``tp`` tensor-parallel ranks cannot share this model, or an empty string."""
    model, groups = config.model, config.model.query_groups
    if model.num_attention_heads % tp:
        return f"must divide model.num_attention_heads={model.num_attention_heads}"
    if groups % tp and tp % groups:
        return f"must divide model.num_query_groups={groups} or be a multiple of it"
    if model.ffn_hidden_size % tp:
        return f"must divide model.ffn_hidden_size={model.ffn_hidden_size}"
    if config.parallel.sequence_parallel and config.data.seq_length % tp:
        return f"must divide data.seq_length={config.data.seq_length} under sequence parallelism"
    return ""


def _te_obstacle(config: Config) -> tuple[str, str, str]:
    """What a config without a GPU asks of Transformer Engine (setting, rule, remedy), or empty strings."""
    for name, remedy in (("layers", "torch"), ("attention", "auto"), ("norm", "auto")):
        if getattr(config.kernels, name) == "te" and config.train.device == "cpu":
            return f"kernels.{name}=te", "does not run with train.device=cpu", f"use kernels.{name}={remedy}"
    norm = config.kernels.norm
    if config.kernels.layers == "te" and norm not in ("auto", "te"):
        return f"kernels.norm={norm}", "is not for kernels.layers=te, which has its own norms", "use kernels.norm=auto"
    return "", "", ""


def _fp8_obstacle(config: Config) -> tuple[str, str, str]:
    """Why the layers' matrix products cannot run in 8 bits (setting, rule, remedy), or empty strings."""
    kernels, model, train, tp = config.kernels, config.model, config.train, config.parallel.tensor_model_parallel_size
    if kernels.fp8 == "off":
        lone_head = kernels.fp8_head
        return ("kernels.fp8_head=true", "needs kernels.fp8", "set it too") if lone_head else ("", "", "")
    what = f"kernels.fp8={kernels.fp8}"
    if kernels.layers == "torch" and kernels.fp8 == "delayed":
        return what, "is not for kernels.layers=torch", "use kernels.fp8=current or kernels.layers=te"
    if train.device == "cpu":
        return what, "does not run with train.device=cpu", "use kernels.fp8=off"
    if train.precision != "bf16":
        return what, f"is not for train.precision={train.precision}", "use bf16 or kernels.fp8=off"
    heads, groups, d = model.num_attention_heads // tp, max(1, model.query_groups // tp), model.head_size
    divided = config.parallel.sequence_parallel and kernels.layers == "te"  # which quantises before it gathers
    rows = train.micro_batch_size * config.data.seq_length // (tp if divided else 1)
    sizes = {
        "train.micro_batch_size x data.seq_length": rows,
        "model.hidden_size": model.hidden_size,
        "the rows of the fused query, key and value weight": (heads + 2 * groups) * d,
        "model.num_attention_heads x head size": heads * d,
        "model.ffn_hidden_size": model.ffn_hidden_size // tp,
        "kernels.loss_chunk_tokens": (kernels.loss_chunk_tokens or 0) if kernels.fp8_head else 0,
    }
    for name, size in sizes.items():
        if size % FP8_MULTIPLE:
            share = "" if tp == 1 else ", one rank's part"
            rule = f"needs a multiple of {FP8_MULTIPLE} for {name} ({size}{share})"
            return what, rule, "change the sizes or use kernels.fp8=off"
    return "", "", ""


def _recompute_obstacle(config: Config) -> tuple[str, str, str]:
    """Why this cannot be recomputed (setting, rule, remedy), or empty strings."""
    mode, layers = config.train.recompute, config.train.recompute_layers
    what = f"train.recompute_layers={layers}"
    if layers is not None and mode != "full":
        return what, f"is not for train.recompute={mode}", "leave it out or use train.recompute=full"
    if layers is not None and layers > config.model.num_layers:
        return what, f"must not exceed model.num_layers={config.model.num_layers}", "lower it or leave it out"
    if mode == "selective" and config.kernels.compile == "layers":
        rule = "is not for kernels.compile=layers, where the compiler chooses what a layer keeps"
        return "train.recompute=selective", rule, "use none or full, or kernels.compile=operations"
    return "", "", ""


def _compile_obstacle(config: Config) -> tuple[str, str, str]:
    """Why whole layers cannot be compiled (setting, rule, remedy), or empty strings."""
    if config.kernels.compile != "layers":
        return "", "", ""
    tp = config.parallel.tensor_model_parallel_size
    conflicts = {
        f"parallel.tensor_model_parallel_size={tp}": tp > 1,
        f"kernels.layers={config.kernels.layers}": config.kernels.layers != "torch",
        f"kernels.fp8={config.kernels.fp8}": config.kernels.fp8 != "off",
        f"data.attention_mask={config.data.attention_mask}": config.data.attention_mask != "causal",
    }
    for name, conflict in conflicts.items():
        if conflict:
            return "kernels.compile=layers", f"is not for {name}", "use kernels.compile=operations"
    return "", "", ""


def _divisors(number: int) -> str:
    return _choices([d for d in range(1, number + 1) if number % d == 0])


def _choices(values: Sequence[int]) -> str:
    shown = [str(v) for v in values]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Reading: YAML and overrides -> plain tree -> dataclasses
# ---------------------------------------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error instead of a silent loss of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; ``where`` names it in the error."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # derived from the safe loader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(8, where, f"is not valid YAML ({error})", "mend the syntax") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML preset, apply ``group.field=value`` overrides in order, and check names and types.

    Ranges and relations are checked by ``Config.validate``.

    Raises:
        ConfigError: missing or malformed file, unknown or misspelt key (the nearest is named), wrong type.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(8, str(path), f"is not UTF-8 text ({error.reason})", "name a YAML file") from None
    except OSError as error:
        raise ConfigError(6, str(path), f"could not be read ({error.strerror})", "name an existing YAML file") from None
    tree = parse_yaml(text, str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(8, str(path), "must hold groups (model:, train:, ...)", "see examples/configs/tiny.yaml")
    for override in overrides:
        _apply_override(tree, override)
    return config_from_tree(tree)


def _apply_override(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(1, f"argument {override!r}", "is not group.field=value", "see --help for every field")
    value = parse_yaml(text, key)
    node = tree
    for depth, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            where = ".".join(parts[: depth + 1])
            raise ConfigError(3, f"{where}={node!r}", "must be a group of fields", f"write {where} as a mapping")
    node[parts[-1]] = value


def config_from_tree(tree: Mapping) -> Config:
    """Build a ``Config`` from nested plain values, as ``load_config`` reads them and checkpoints store them."""
    return _build(Config, tree, "")


def config_to_tree(config: Config) -> dict:
    """The inverse: nested plain values, every field filled in."""
    return dataclasses.asdict(config)


def _build(cls: type, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(3, f"{where}={tree!r}", "must be a group of fields", f"write {where} as a mapping")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            name = f"{where}.{key}" if where else str(key)
            raise ConfigError(2, name, "is not a known setting", f"did you mean {_nearest(name)}?")
    values = {}
    for f in dataclasses.fields(cls):
        name = f"{where}.{f.name}" if where else f.name
        if f.name in tree and not (tree[f.name] is None and dataclasses.is_dataclass(hints[f.name])):
            values[f.name] = _convert(hints[f.name], tree[f.name], name)
        elif dataclasses.is_dataclass(hints[f.name]) and f.default_factory is dataclasses.MISSING:
            values[f.name] = _build(hints[f.name], {}, name)  # type: ignore[arg-type]  # names the first missing field
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(7, name, "is not set and has no default", f"add {name} to the YAML file or the arguments")
    return cls(**values)


def _nearest(name: str) -> str:
    known = [f"{g}.{f}" for g, fields in describe_fields().items() for f in fields] + list(describe_fields())
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    last = name.rsplit(".", 1)[-1]
    elsewhere = [k for k in known if k.rsplit(".", 1)[-1] == last]  # the right field in the wrong group
    return (elsewhere or match)[0]


def _convert(hint: Any, value: Any, name: str) -> Any:
    """``value`` (as YAML gives it) as the field's type, or a ``ConfigError`` naming the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, name)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, name)  # type: ignore[arg-type]
    if origin is Literal:
        if value is False and "off" in args:
            return "off"  # YAML 1.1 reads off as a bool
        if value not in args:
            near = difflib.get_close_matches(str(value), [str(a) for a in args], n=1)
            hinted = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(map(str, args))}"
            raise ConfigError(3, f"{name}={value}", f"must be one of {', '.join(map(str, args))}", hinted)
        return value
    if origin is dict:
        return _convert_dict(args[1], value, name)
    number = _number(value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and number is not None and float(number).is_integer():
        return int(number)
    if hint is float and number is not None:
        return float(number)
    if hint is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(3, f"{name}={value!r}", f"must be of type {hint.__name__}", "correct the value")


def _convert_dict(value_hint: Any, value: Any, name: str) -> dict | None:
    if value_hint is float and isinstance(value, str):
        return {value: 1.0}  # one prefix
    if not isinstance(value, dict) or not value:
        wanted = "one prefix or {prefix: weight}" if value_hint is float else "{name: prefix}"
        raise ConfigError(3, f"{name}={value!r}", f"must be {wanted}", "write it as a YAML mapping")
    return {str(k): _convert(value_hint, v, f"{name}[{k}]") for k, v in value.items()}


def _number(value: Any) -> int | float | None:
    """Numbers as people write them: YAML 1.1 reads ``5e-4`` (no dot) as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Help and echo
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FieldHelp:
    """One line of ``--help``."""

    type: str
    default: str
    text: str


def describe_fields() -> dict[str, dict[str, FieldHelp]]:
    """Group -> field -> type, default and the docstring under the field, read from this file's own source."""
    docs = _field_docstrings()
    described: dict[str, dict[str, FieldHelp]] = {}
    for group, hint in typing.get_type_hints(Config).items():
        described[group] = {}
        for f in dataclasses.fields(hint):
            default = "required" if f.default is dataclasses.MISSING else _plain(f.default)
            described[group][f.name] = FieldHelp(str(f.type), default, docs[hint.__name__][f.name])
    return described


def _plain(value: Any) -> str:
    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _field_docstrings() -> dict[str, dict[str, str]]:
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(inspect.getmodule(Config))).body:  # type: ignore[arg-type]
        if not isinstance(node, ast.ClassDef):
            continue
        pairs = zip(node.body, node.body[1:], strict=False)
        docs[node.name] = {
            a.target.id: " ".join(b.value.value.split())
            for a, b in pairs
            if isinstance(a, ast.AnnAssign)
            and isinstance(a.target, ast.Name)
            and isinstance(b, ast.Expr)
            and isinstance(b.value, ast.Constant)
            and isinstance(b.value.value, str)
        }
    return docs


def help_text() -> str:
    """Every field with its type, default and meaning, for ``--help``."""
    import textwrap

    lines = ["settings (in the YAML file, or as group.field=value arguments; the last one wins):"]
    for group, fields in describe_fields().items():
        lines.append(f"\n{group}:")
        for name, entry in fields.items():
            lines.append(f"  {group}.{name} ({entry.type}) = {entry.default}")
            lines += textwrap.wrap(entry.text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML text that ``load_config`` reads back to an equal config."""
    return yaml.safe_dump(config_to_tree(config), sort_keys=False, allow_unicode=True, width=1000)
