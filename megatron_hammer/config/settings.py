"""The settings: a frozen dataclass for each group, a docstring under each field, and what a group checks by itself.

A field's docstring says its meaning, its unit and the reason of its default; ``--help`` prints it. Its type says what
a change of it means for a run that goes on (``effects.py``): ``Free[int]`` may change at any time,
``Mathematics[float]`` must be accepted by name. What must hold between groups is in ``tree.py``.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Literal

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config.checks import at_least, at_most, divisors, require
from megatron_hammer.config.effects import Content, Free, Length, Mathematics, Model, Place, Samples

MAX_LAYERS = 10_000
"""Thirty times the deepest model known. Tables have a row for each layer, so a number from a file must have a limit."""
Sharded = Literal["optimizer", "gradients", "weights"]
"""What data-parallel ranks divide; each includes those before it. The planner tries them all."""
Recompute = Literal["none", "selective", "full"]
"""What backward computes again, from nothing on; the planner tries them all."""


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE is stretched for longer contexts than the model was first trained for (Hugging Face: rope_parameters).

    llama3: long wavelengths stretched, short ones left, between them a blend (arXiv 2407.21783). linear: all of them
    stretched alike. yarn: as llama3 by numbers of turns, and queries and keys scaled (arXiv 2309.00071). dynamic: not
    stretched up to model.max_position_embeddings; readers of the exported model stretch longer texts by their length.
    """

    factor: float
    """By how much the wavelengths are stretched."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are stretched in full."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are left alone."""
    original_max_position_embeddings: int | None = None
    """llama3, yarn: context length in tokens for which the model was first trained."""
    rope_type: Literal["llama3", "linear", "yarn", "dynamic"] = "llama3"
    """Which of them."""
    beta_fast: float | None = None
    """yarn: dimensions that turn more often than this over the first context are left alone; absent: 32."""
    beta_slow: float | None = None
    """yarn: dimensions that turn less often than this are stretched in full; absent: 1."""
    attention_factor: float | None = None
    """yarn: what cos and sin are multiplied by; absent: 0.1 ln(factor) + 1."""
    truncate: bool | None = None
    """yarn: round the bounds between the dimensions to whole ones; absent: true."""

    @property
    def cos_sin_factor(self) -> float:
        """What cos and sin are multiplied by, and so queries and keys each: yarn's ``attention_factor``."""
        if self.rope_type != "yarn":
            return 1.0
        return self.attention_factor or yarn_attention_factor(self.factor)

    def check(self) -> None:
        """Raise ``ConfigError`` unless the type has the fields that it needs, and no others."""
        where, fields = "model.rope_scaling", {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        needed, others = ROPE_FIELDS[self.rope_type]
        for name, value in fields.items():
            if name in needed:
                require(value is not None, f"{where}.{name}", f"is needed by rope_type={self.rope_type}", "set it")
            elif name not in (*others, "rope_type"):
                require(
                    value is None,
                    f"{where}.{name}={value}",
                    f"is not a field of rope_type={self.rope_type}",
                    "leave it out",
                )
        at_least(where, {"factor": self.factor}, 1)
        at_least(where, {"original_max_position_embeddings": self.original_max_position_embeddings}, 1)
        positive = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
        for name in positive:
            value = fields[name]
            require(
                value is None or 0 < value < math.inf,
                f"{where}.{name}={value}",
                "must be a positive number",
                f"raise {where}.{name}",
            )
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            require(
                self.high_freq_factor > self.low_freq_factor,
                f"{where}.high_freq_factor={self.high_freq_factor}",
                f"must be above low_freq_factor={self.low_freq_factor}",
                "1 and 4 are usual",
            )


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """What yarn multiplies cos and sin by for a stretching by ``factor`` (arXiv 2309.00071, with mscale 1)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


ROPE_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "linear": (("factor",), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "attention_factor", "truncate"),
    ),
    "dynamic": (("factor",), ()),
}
"""Of each type of RoPE scaling: the fields that it needs, and those that it may have."""


@dataclass(frozen=True)
class ModelConfig:
    """A Llama, or what Qwen2 and Qwen3 make of it: sizes are global, never those of one rank.

    The exported model's class follows from the fields (``family``).
    """

    hidden_size: Model[int]
    """Width h of the residual stream."""
    ffn_hidden_size: Model[int]
    """Width f of the SwiGLU feed-forward layer (Hugging Face: intermediate_size)."""
    num_layers: Model[int]
    """Number of decoder layers."""
    num_attention_heads: Model[int]
    """Number n of query heads."""
    num_query_groups: Model[int | None] = None
    """Number g of key/value heads (Hugging Face: num_key_value_heads); absent: as many as query heads."""
    head_dim: Model[int | None] = None
    """Width d of one head; absent: hidden_size / num_attention_heads."""
    vocab_size: Model[int | None] = None
    """True number v of token ids, without padding; absent: that of the tokenizer."""
    norm_eps: Model[float] = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: Model[float] = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Model[RopeScaling | None] = None
    """How RoPE is stretched for long contexts; absent: not at all."""
    qkv_bias: Model[bool] = False
    """Add a bias to queries, keys and values. By itself: Qwen2; with attention_output_bias: attention_bias of Llama."""
    attention_output_bias: Model[bool] = False
    """Add a bias to what attention adds to the residual stream."""
    mlp_bias: Model[bool] = False
    """Add a bias to the three matrices of the feed-forward layer."""
    qk_norm: Model[bool] = False
    """RMSNorm of each head's queries and keys before RoPE, with a weight that all heads of a layer share: Qwen3."""
    max_position_embeddings: Free[int | None] = None
    """Longest context written to the exported model's config; absent: data.seq_length."""
    tie_word_embeddings: Model[bool] = False
    """Use the embedding matrix as output head too."""
    init_std: Free[float] = 0.02
    """Standard deviation of the initial weights, N(0, std); norms start at one."""

    @property
    def query_groups(self) -> int:
        """``num_query_groups`` with its default filled in."""
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def head_size(self) -> int:
        """``head_dim`` with its default filled in."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def family(self) -> Literal["llama", "qwen2", "qwen3"] | None:
        """The class of transformers that computes this (its ``model_type``); None where none does."""
        qkv, output, mlp = self.qkv_bias, self.attention_output_bias, self.mlp_bias
        if self.qk_norm:
            return "qwen3" if qkv == output and not mlp else None
        if qkv == output:
            return "llama"
        return "qwen2" if qkv and not mlp else None

    def check(self) -> None:
        """Raise ``ConfigError`` unless the shape is a possible model of a class of transformers."""
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "int" in str(f.type)}
        at_least("model", sizes, 1)
        at_most("model", {"num_layers": self.num_layers}, MAX_LAYERS)
        at_most("model", sizes, 2**31 - 1)
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            require(value > 0, f"model.{name}={value}", "must be positive", f"raise model.{name}")
        at_least("model", {"init_std": self.init_std}, 0)
        heads, groups = self.num_attention_heads, self.query_groups
        if heads % groups:
            rule = f"must divide model.num_attention_heads={heads}"
            raise ConfigError(4, f"model.num_query_groups={groups}", rule, f"use {divisors(heads)}")
        if self.head_dim is None:
            require(
                self.hidden_size % heads == 0,
                f"model.num_attention_heads={heads}",
                f"must divide model.hidden_size={self.hidden_size}",
                "change one of them or set model.head_dim",
            )
        require(
            self.head_size % 2 == 0, f"model.head_dim={self.head_size}", "must be even for RoPE", "set model.head_dim"
        )
        if self.rope_scaling is not None:
            self._check_rope_scaling(self.rope_scaling)
        if self.family is None:
            raise self._no_family()

    def _check_rope_scaling(self, scaling: RopeScaling) -> None:
        scaling.check()
        require(
            self.head_size > 2 or scaling.rope_type != "dynamic",
            f"model.head_dim={self.head_size}",
            "must be above 2 for model.rope_scaling.rope_type=dynamic",
            "raise model.head_dim",
        )

    def _no_family(self) -> ConfigError:
        chosen = [n for n in ("qkv_bias", "attention_output_bias", "mlp_bias", "qk_norm") if getattr(self, n)]
        return ConfigError(
            4,
            ", ".join(f"model.{name}=true" for name in chosen),
            "is together a model that no class of transformers computes, so it could not be exported",
            "a Llama has qkv_bias and attention_output_bias or none, and mlp_bias as you like; Qwen2 qkv_bias alone; "
            "Qwen3 qk_norm, and both biases of attention or none",
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks share the work. data_parallel_size is what is left: world size / (tensor_model_parallel_size x
    context_parallel_size x pipeline_model_parallel_size)."""

    tensor_model_parallel_size: Free[int] = 1
    """Ranks that share each layer's matrices (TP)."""
    sequence_parallel: Free[bool] = False
    """Between the matrices, keep only seq_length / TP rows on each rank (arXiv 2205.05198). Needs TP of 2 or more."""
    context_parallel_size: Free[int] = 1
    """Ranks that share the tokens of each sample (CP): each has seq_length / CP of them, and gathers the others' keys
    and values in attention (arXiv 2407.21783). For sequences whose activations do not fit on a rank."""
    pipeline_model_parallel_size: Free[int] = 1
    """Groups of ranks that have different layers (PP), one stage of the model after the other (1F1B)."""
    virtual_pipeline_stages: Free[int] = 1
    """Stages of each rank (interleaved 1F1B): with v of them ranks wait for each other a v-th of the time, and keep and
    send more. Needs PP of 2 or more, and micro-batches a step that are a multiple of it."""
    pipeline_split: Free[tuple[int, ...] | None] = None
    """Layers of each stage, first to last: [13, 9]. Absent: as alike in work as whole layers allow, counting the head
    and the embedding."""
    gradient_bucket_bytes: Free[int] = 64 * 2**20
    """Size of one fp32 gradient bucket: a bucket's reduce-scatter starts as soon as its last gradient is there. On more
    than 64 data-parallel ranks a bucket grows with them, so that a rank's share of it (1 MiB) does not shrink."""
    shard: Free[Sharded] = "optimizer"
    """What data-parallel ranks divide instead of holding it each (ZeRO, arXiv 1910.02054). optimizer: masters and
    moments (ZeRO 1, Megatron's distributed optimizer). gradients: the fp32 sums too (ZeRO 2); each micro-batch is
    reduced, which communicates more where several are accumulated. weights: these too (ZeRO 3, FSDP); a layer's are
    gathered ahead of its use, given up after it and gathered again in backward. Checkpoints are the same."""
    shard_size: Free[int | None] = None
    """Divide over so many neighbouring data-parallel ranks only, those of one node say, and keep copies on the others
    (hybrid sharding): gathers stay within the node, and gradients are summed over the copies afterwards. Divides the
    data-parallel ranks; absent: all of them."""
    reshard_after_forward: Free[bool] = True
    """With shard=weights: give a layer's weights up after its forward. false: keep them until its backward, which saves
    a gather and costs the memory of all weights of a micro-batch."""
    overlap_param_gather: Free[bool] = True
    """After an update, let the gather of the new weights run beside the next forward, which waits for each bucket when
    its first layer needs it; with shard=weights, gather the next layer while one computes. false: wait for what is
    asked for, at once. The numbers are the same."""
    overlap_grad_reduce: Free[bool] = True
    """Let the reduction of a bucket of gradients run beside backward: in the last micro-batch of a step, as a rank sums
    the others by itself, or in each with shard=gradients|weights. false: wait for each at once. The numbers are the
    same."""
    tp_comm_overlap: Free[Literal["off", "bulk", "chunks"]] = "bulk"
    """How tensor-parallel collectives run beside the matrix products of a layer. off: each is waited for at once. bulk:
    in backward, beside a product that does not need them. chunks: under sequence parallelism the others too, in chunks
    of a rank's rows, each beside the product of another. Sums of chunks are made in another order; those of off and
    bulk are the same to the bit."""
    timeout_seconds: Free[int] = 600
    """How long a rank waits for the others in one collective."""

    @property
    def divides_gradients(self) -> bool:
        """Whether a rank keeps its shard of the gradients' sums alone, so that each micro-batch's are reduced."""
        return self.shard != "optimizer"

    @property
    def divides_weights(self) -> bool:
        """Whether a rank keeps its shard of the weights alone, so that each micro-batch gathers them."""
        return self.shard == "weights"

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible sizes."""
        sizes = [f.name for f in dataclasses.fields(self) if f.type in ("Free[int]", "Free[int | None]")]
        at_least("parallel", {name: getattr(self, name) for name in sizes}, 1)
        require(
            self.reshard_after_forward or self.divides_weights,
            "parallel.reshard_after_forward=false",
            "is for parallel.shard=weights only",
            "leave it out or set parallel.shard=weights",
            number=5,
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel=true",
            "needs parallel.tensor_model_parallel_size of 2 or more",
            "set it to false or raise the size",
        )
        require(
            self.tp_comm_overlap != "chunks" or self.sequence_parallel,
            "parallel.tp_comm_overlap=chunks",
            "needs parallel.sequence_parallel=true: chunks are the rows of a rank",
            "set it, or use parallel.tp_comm_overlap=bulk",
        )
        require(
            self.virtual_pipeline_stages == 1 or self.pipeline_model_parallel_size > 1,
            f"parallel.virtual_pipeline_stages={self.virtual_pipeline_stages}",
            "needs parallel.pipeline_model_parallel_size of 2 or more",
            "leave it out or raise the size",
        )


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer made the data and goes into the exported model."""

    path: Content[str | None] = None
    """A sentencepiece .model, a tokenizer.json, a .tiktoken vocabulary, or a folder that holds one."""


@dataclass(frozen=True)
class PhaseConfig:
    """A stretch of the run with a mix of its own; each source goes on where the phases before have left it."""

    train: dict[str, float]
    """As data.train."""
    tokens: int | None = None
    """Length in tokens (targets): as many samples as hold them; to the end of a step where the next phase differs in
    seq_length or RoPE."""
    samples: int | None = None
    """Length in samples, exact: it says the same at every train.global_batch_size."""
    steps: int | None = None
    """Length in steps of train.global_batch_size samples."""
    weights: Literal["share", "tokens", "epochs"] | None = None
    """As data.weights; absent: that."""
    seq_length: int | None = None
    """As data.seq_length; absent: that."""
    rope_theta: float | None = None
    """model.rope_theta from this phase on, for a longer context; absent: as before."""
    rope_scaling: RopeScaling | None = None
    """model.rope_scaling from this phase on; absent: as before."""

    def check(self, where: str, is_last: bool) -> None:
        """Raise ``ConfigError`` for an impossible mix or length."""
        lengths = {name: getattr(self, name) for name in ("tokens", "samples", "steps")}
        given = [name for name, value in lengths.items() if value is not None]
        require(
            len(given) == 1 or (is_last and not given),
            f"{where}: {' and '.join(given) or 'no length'}",
            "must be one length: tokens, samples or steps; the last phase alone may have none and runs to the end",
            f"give {where} one of the three",
        )
        at_least(where, lengths | {"seq_length": self.seq_length}, 1)
        _check_mix(f"{where}.train", self.train)
        theta = self.rope_theta
        require(theta is None or theta > 0, f"{where}.rope_theta={theta}", "must be positive", "raise it")
        if self.rope_scaling is not None:
            self.rope_scaling.check()


def _check_mix(where: str, mix: dict[str, float]) -> None:
    for prefix, weight in mix.items():
        require(
            0 < weight < math.inf,
            f"{where}[{prefix}]={weight}",
            "must be a positive number",
            "give every source a weight above zero or leave it out",
        )


@dataclass(frozen=True)
class FimConfig:
    """Fill-in-the-middle of one source (arXiv 2207.14255): sampling/fill_in_the_middle.py draws the forms."""

    rate: float = 0.5
    """Share of the document pieces that are rearranged; half costs nothing of what is learnt from left to right."""
    spm_rate: float = 0.5
    """Of those, how many get the suffix before the prefix (SPM), so that both forms are learnt."""
    prefix: str = "<fim_prefix>"
    """Token of the tokenizer before the prefix. Qwen2.5's is <|fim_prefix|>."""
    middle: str = "<fim_middle>"
    """Token before the middle."""
    suffix: str = "<fim_suffix>"
    """Token before the suffix."""

    def check(self, where: str) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        for name in ("rate", "spm_rate"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"{where}.{name}={value}", "must lie in [0, 1]", "0.5 is usual")
        tokens = [self.prefix, self.middle, self.suffix]
        require(len(set(tokens)) == 3, f"{where}: {', '.join(tokens)}", "must be three tokens", "name three")


@dataclass(frozen=True)
class DataConfig:
    """Indexed datasets (prefix P of P.bin and P.idx) and how samples are cut from them."""

    train: Content[dict[str, float] | None] = None
    """One prefix, or {prefix: weight, ...}; data.weights says what a weight is."""
    weights: Samples[Literal["share", "tokens", "epochs"]] = "share"
    """What the weights of data.train are. share: of the samples, in proportion. tokens: tokens to draw (142e9). epochs:
    passes over the source (1.5). train.num_steps stays the length of the run: all sources are scaled to it alike, and
    the plan printed before training says what each one gives and which length fits."""
    phases: Content[tuple[PhaseConfig, ...] | None] = None
    """In place of data.train: [{tokens: N, train: {prefix: weight, ...}}, ..., {train: ...}], mixes one after the
    other. A phase has a length in tokens, samples or steps (the last without one runs to the end), and may have
    weights, seq_length, rope_theta and rope_scaling of its own. Each source goes on where it stood, so that nothing of
    an unfinished pass is read twice or left out. What has not been consumed may be changed at any time."""
    fim: Samples[dict[str, FimConfig] | None] = None
    """{prefix: {rate: 0.5, spm_rate: 0.5, prefix: ..., middle: ..., suffix: ...}}: sources, of code mostly, pieces of
    whose documents are rearranged as prefix, suffix and middle between three tokens of the tokenizer."""
    max_epochs: Free[float | None] = None
    """Refuse a run that would read a source more often than this over all its phases; absent: no limit."""
    valid: Content[dict[str, str] | None] = None
    """{name: prefix, ...}: validation sets, each reported under its name; absent: no evaluation."""
    seq_length: Samples[int] = 2048
    """Targets s in one sample; a sample holds s + 1 tokens."""
    order: Samples[Literal["independent", "megatron"]] = "independent"
    """independent: a pure function of (seed, sources and weights, epoch, position), unchanged when a run is extended.
    megatron: Megatron-LM's own order, for those who move a run; it depends on train.num_steps."""
    index_folder: Place[str | None] = None
    """Where the indices of large datasets are kept, built once and shared by all processes; absent: P.index beside each
    dataset P. Set it where the datasets cannot be written."""
    attention_mask: Mathematics[Literal["causal", "document"]] = "causal"
    """causal: each sample is one stretch of text, attention crosses the documents in it (HammerLLM's recipe).
    document: no attention across documents, and positions restart at 0 in each. What a sample holds of a document
    counts as a whole one: where it was cut, positions begin at 0 too. In the order megatron a document is one sequence
    of the dataset. Both have the same targets: the last token of a document predicts the first of the next one (a bos
    where documents have one). So the two losses can be compared, and each step's number of targets is known."""

    def check(self) -> None:
        """Raise ``ConfigError`` for an impossible mix or length."""
        at_least("data", {"seq_length": self.seq_length}, 1)
        require(
            self.max_epochs is None or self.max_epochs > 0,
            f"data.max_epochs={self.max_epochs}",
            "must be positive",
            "leave it out for no limit",
        )
        _check_mix("data.train", self.train or {})
        if self.phases is not None:
            self._check_phases(self.phases)
        for prefix, fim in (self.fim or {}).items():
            fim.check(f"data.fim[{prefix}]")
            require(
                prefix in self.train_prefixes,
                f"data.fim[{prefix}]",
                "must be a source of data.train or of a phase",
                f"name one of {', '.join(self.train_prefixes) or 'them'}",
            )
        for name in self.valid or {}:
            require(
                name != "" and "/" not in name,
                f"data.valid[{name!r}]",
                "must be a name without '/'",
                "rename this validation set",
            )

    def _check_phases(self, phases: tuple[PhaseConfig, ...]) -> None:
        require(
            bool(phases) and not self.train,
            "data.phases" if not phases else f"data.train={self.train}",
            "is empty" if not phases else "cannot stand beside data.phases, which name their own mixes",
            "leave one of them out; data.train=null takes it from a preset",
        )
        require(
            self.order == "independent",
            "data.order=megatron",
            "cannot have data.phases: its order is of one mix, shuffled for the length of the whole run",
            "use data.order=independent, or a new run with checkpoint.init_from for each mix",
        )
        for i, phase in enumerate(phases):
            phase.check(f"data.phases[{i}]", i == len(phases) - 1)

    @property
    def mixes(self) -> tuple[PhaseConfig, ...]:
        """The phases; ``data.train`` alone is one. None where no data are named."""
        return self.phases or (() if not self.train else (PhaseConfig(self.train),))

    @property
    def train_prefixes(self) -> list[str]:
        """All training sources, each once, in the order in which they are named."""
        return list(dict.fromkeys(prefix for mix in self.mixes for prefix in mix.train))


MUON_ONLY = ("muon_momentum", "muon_per_head", "newton_schulz")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101), or Muon for the matrices of the layers, with global-norm clipping, sharded over the
    data-parallel ranks (ZeRO-1)."""

    style: Mathematics[Literal["adamw", "muon"]] = "adamw"
    """adamw: for everything. muon: the matrices of the layers (q, k, v, o, gate, up, down, each by itself, whole on any
    layout) move along the orthogonalised momentum of their gradient, 0.2 sqrt(max(rows, columns)) of it, which makes
    lr and weight_decay mean what they mean in AdamW (Moonlight, arXiv 2502.16982); embedding, head, norms and biases
    stay with AdamW. One moment less to keep. A run does not change from one to the other."""
    lr: Mathematics[float] = 5e-4
    """Peak learning rate."""
    min_lr: Mathematics[float] = 5e-5
    """Floor of the learning rate."""
    weight_decay: Mathematics[float] = 0.0
    """Decoupled weight decay, on matrices only."""
    beta1: Mathematics[float] = 0.9
    """Decay of the first moment."""
    beta2: Mathematics[float] = 0.999
    """Decay of the second moment."""
    eps: Mathematics[float] = 1e-8
    """Added to the root of the second moment."""
    muon_momentum: Mathematics[float] = 0.95
    """muon only: decay of the matrices' momentum (Nesterov's), as in Keller Jordan's Muon and in Moonlight."""
    muon_per_head: Mathematics[bool] = False
    """muon only: take q, k and v head by head, each [head_dim, hidden_size] a matrix of its own."""
    newton_schulz: Mathematics[Literal["auto", "bf16", "fp32"]] = "auto"
    """muon only: the type in which matrices are sent to the rank that orthogonalises them, and in which it does so.
    auto: bf16 on a GPU and on CPUs with bf16 products (avx512_bf16, amx), else fp32. The momentum is always fp32."""
    clip_grad: Mathematics[float] = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    initial_loss_scale: Free[float] = 65536.0
    """fp16 only: first loss scale; halved at an overflow, doubled after loss_scale_window good steps."""
    loss_scale_window: Mathematics[int] = 1000
    """fp16 only: good steps before the loss scale is doubled."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        at_least("optimizer", {k: getattr(self, k) for k in ("lr", "min_lr", "weight_decay", "clip_grad")}, 0)
        at_least(
            "optimizer", {"initial_loss_scale": self.initial_loss_scale, "loss_scale_window": self.loss_scale_window}, 1
        )
        for name in ("beta1", "beta2", "muon_momentum"):
            value = getattr(self, name)
            require(
                0 <= value < 1, f"optimizer.{name}={value}", "must lie in [0, 1)", "0.9 and 0.95 to 0.999 are usual"
            )
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require(
                self.style == "muon" or f.name not in MUON_ONLY or value == f.default,
                f"optimizer.{f.name}={value}",
                "belongs to optimizer.style=muon only",
                "remove it or choose muon",
            )
        require(self.eps > 0, f"optimizer.eps={self.eps}", "must be positive", "1e-8 is usual")
        require(
            self.min_lr <= self.lr,
            f"optimizer.min_lr={self.min_lr}",
            f"must not exceed optimizer.lr={self.lr}",
            "lower min_lr",
        )


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step (optim/schedule.py draws the shapes)."""

    style: Mathematics[Literal["cosine", "cosine-clamped", "wsd", "linear", "constant"]] = "cosine"
    """cosine: between lr and min_lr. cosine-clamped: to zero, held at min_lr (HammerLLM's). wsd: constant, then a
    linear descent over anneal_steps. linear: to min_lr. constant: lr. Each after the warm-up."""
    warmup_steps: Mathematics[int] = 0
    """Steps of linear warm-up; step warmup_steps is the first at the peak. A shorter run cuts it to
    its length, but not with decay_steps or style=constant."""
    decay_steps: Mathematics[int | None] = None
    """Step at which the descent ends, warm-up included; absent: train.num_steps."""
    anneal_steps: Mathematics[int | None] = None
    """wsd only: length of the final descent; absent: a tenth of decay_steps."""

    @property
    def follows_run(self) -> bool:
        """Whether the rate of a step depends on how long the run is."""
        return self.decay_steps is None and self.style != "constant"

    def check(self) -> None:
        """Raise ``ConfigError`` for impossible lengths."""
        at_least("schedule", {"warmup_steps": self.warmup_steps}, 0)
        at_least("schedule", {"decay_steps": self.decay_steps, "anneal_steps": self.anneal_steps}, 1)
        require(
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

    compile: Free[Literal["none", "operations", "layers"]] = "none"
    """operations: torch.compile fuses those of norm, RoPE and SwiGLU that have no kernel of their own. layers: each
    decoder layer is compiled whole, once for all; not with kernels.layers=te, whose modules the compiler cannot look
    into. Either costs seconds at start; on a CPU it needs a C++ compiler."""
    cuda_graph: Free[bool] = False
    """Launch each micro-batch's forward and backward as one CUDA graph: for steps so small that a GPU waits for Python.
    For causal masks and the torch layers without fp8. Under data parallelism the last backward does not hide the
    reduction of the gradients."""
    norm: Free[Literal["auto", "torch", "fused", "triton", "te", "apex", "liger"]] = "auto"
    """Residual add and RMSNorm. auto: fused where it can run, else triton, else torch; the same for the next three.
    fused: our own compiled kernel, C++ on a CPU, CUDA on a GPU. triton: its twin, which needs no nvcc. te, apex, liger:
    that library's, where it is installed."""
    rope: Free[Literal["auto", "torch", "fused", "triton", "liger"]] = "auto"
    """Rotary position embedding."""
    swiglu: Free[Literal["auto", "torch", "fused", "triton", "liger"]] = "auto"
    """SwiGLU's product."""
    adamw: Free[Literal["auto", "torch", "fused", "triton", "apex"]] = "auto"
    """The update, with clipping and the 16-bit copy in the same pass, and the gradient's norm."""
    attention: Free[
        Literal[
            "auto",
            "fused",
            "cudnn",
            "sdpa",
            "varlen",
            "sdpa-documents",
            "flash-attn",
            "flash-attn-3",
            "flash-attn-4",
            "te",
        ]
    ] = "auto"
    """auto: the first of the others that can do what the config asks for; one that is named and cannot is an error.
    fused: our own, for either mask on a CPU. cudnn: cuDNN's by way of torch, causal, on a GPU in 16 bits; auto takes it
    on Hopper and Blackwell. sdpa: torch's scaled_dot_product_attention, causal. varlen: torch's own FlashAttention for
    document masks, on a GPU in 16 bits, with heads of a multiple of 8 elements. sdpa-documents: one sdpa call a
    document, anywhere. flash-attn, flash-attn-3, flash-attn-4: those packages, te: what Transformer Engine chooses; for
    either mask on a GPU in 16 bits, by name only."""
    layers: Free[Literal["torch", "te"]] = "torch"
    """torch: the layers in plain torch. te: linear layers and norms of NVIDIA's Transformer Engine, on a GPU; the
    weight's gradient is accumulated in the matrix product. Checkpoints are the same."""
    fp8: Mathematics[Literal["off", "delayed", "current"]] = "off"
    """8-bit matrix products of the layers in training, with bf16 on a GPU. current: each tensor scaled by its own
    largest value. delayed: by those of past steps, which no checkpoint holds, so that a resumed run scales anew; with
    kernels.layers=te only."""
    fp8_head: Mathematics[bool] = False
    """With kernels.fp8: the output head's products too. It is the layer that 8 bits disturb most; hence an option."""
    deterministic: Free[bool] = False
    """Equal bits from run to run on one machine and layout: takes only backends that can, and tells torch's own kernels
    to. On a CPU all do without it."""
    loss: Free[Literal["auto", "fused", "triton", "torch"]] = "auto"
    """Softmax and gradient of the logits. auto: on a CPU fused, our own compiled kernel, on a GPU triton, where it is
    there, else torch."""
    loss_chunk_tokens: Free[int | None] = None
    """Tokens of a micro-batch whose logits exist at once, [tokens, vocabulary / TP]; absent: 2048 on a GPU, 512 on a
    CPU. Fewer take less memory and more time: the gradient of the output head is read and written once a chunk."""

    def check(self) -> None:
        """Raise ``ConfigError`` for an impossible size."""
        at_least("kernels", {"loss_chunk_tokens": self.loss_chunk_tokens}, 1)


@dataclass(frozen=True)
class EvaluatorConfig:
    """Evaluation of committed checkpoints by a process of its own beside the run, which training never waits for."""

    interval_steps: int | None = None
    """Of checkpoints whose step is a multiple of this, and of the last; absent: of every checkpoint. While one is being
    evaluated only the newest of the next waits its turn; the others are passed over, which is said."""
    sets: dict[str, str] | None = None
    """{name: path, ...}: prefixes of indexed datasets, or text files; absent: data.valid."""
    samples: int | None = None
    """Windows of each set; absent: all."""
    command: tuple[str, ...] | None = None
    """A program to run in place of our own evaluation: [python, my_eval.py, "{checkpoint}", "{step}"]. It prints one
    JSON object of numbers as its last line."""
    prompts: tuple[str, ...] | None = None
    """Texts that each evaluated checkpoint continues, into OUT/generations.jsonl, which reports show: [The weather,
    今天天气]; absent: none."""
    new_tokens: int = 48
    """Longest continuation of a prompt."""
    device: str = "cpu"
    """Where our own evaluation computes: cpu, cuda or cuda:N (one that the run leaves memory on)."""
    threads: int = 1
    """Of the process, on a CPU."""
    nice: int = 10
    """Added to the niceness of the process: 19 computes only when nobody else wants to."""
    timeout_seconds: float = 3600.0
    """An evaluation that takes longer is ended; the next checkpoint is evaluated as usual."""
    finish_seconds: float = 30.0
    """How long a run that has done all its steps waits for the evaluation of its last checkpoint."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        group = "train.evaluator"
        counts = {"interval_steps": self.interval_steps, "samples": self.samples, "threads": self.threads,
                  "new_tokens": self.new_tokens}  # fmt: skip
        at_least(group, counts, 1)
        at_least(group, {"nice": self.nice, "finish_seconds": self.finish_seconds}, 0)
        at_most(group, {"nice": self.nice}, 19)
        at_most(group, {"finish_seconds": self.finish_seconds}, 3600)
        seconds = self.timeout_seconds
        require(
            0 < seconds < math.inf, f"{group}.timeout_seconds={seconds}", "must be a positive number", "leave it out"
        )
        require(
            re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None,
            f"{group}.device={self.device}",
            "must be cpu, cuda or cuda:N",
            "use cpu",
        )
        require(
            self.command is None or (len(self.command) > 0 and self.sets is None and self.samples is None),
            f"{group}.command",
            "must name a program, and stands in the place of train.evaluator.sets and samples",
            "leave out one of them",
        )


@dataclass(frozen=True)
class BatchSizeRamp:
    """Fewer samples a step while a run is young, as Megatron-LM's rampup-batch-size."""

    start: int
    """Samples of the first step."""
    increment: int
    """By how much a step grows at once."""
    samples: int
    """Consumed samples after which a step has train.global_batch_size; it grows at equal distances until then."""

    def check(self, final: int) -> None:
        """Raise ``ConfigError`` unless steps grow from ``start`` to ``final``."""
        where = "train.batch_size_ramp"
        at_least(where, {name: getattr(self, name) for name in ("start", "increment", "samples")}, 1)
        require(
            self.start < final and (final - self.start) % self.increment == 0,
            f"{where}: start={self.start}, increment={self.increment}",
            f"must lead to train.global_batch_size={final}",
            f"use a start below it, and an increment that divides {max(0, final - self.start)}",
        )


@dataclass(frozen=True)
class TrainConfig:
    """Length, sizes and place of the run."""

    output: Place[str] = "runs/default"
    """Folder of the run: checkpoints/, metrics.jsonl, tensorboard/."""
    num_steps: Length[int] = 1000
    """Total number of steps, counted from 1 over all restarts."""
    micro_batch_size: Free[int] = 1
    """Samples b that one rank processes at once."""
    global_batch_size: Mathematics[int] = 8
    """Samples a step over all ranks; a multiple of micro_batch_size x data_parallel_size."""
    batch_size_ramp: Mathematics[BatchSizeRamp | None] = None
    """{start: 64, increment: 64, samples: 1e6}: steps of start samples at first, which grow by increment at equal
    distances until samples are consumed; each size is a multiple of micro_batch_size x data_parallel_size. A pure
    function of consumed samples. num_steps and the schedule go on counting steps, whatever their size; absent: all
    steps have global_batch_size."""
    seed: Samples[int] = 1234
    """Seeds the initial weights and the order of the data."""
    precision: Mathematics[Literal["fp32", "bf16", "fp16"]] = "bf16"
    """Type of weights and activations; masters, moments and gradient sums are always fp32."""
    recompute: Free[Recompute] = "none"
    """What backward computes again instead of keeping it; the results are the same. selective: the outputs of norms,
    attention and SwiGLU. full: whole layers, of which only the input is kept; a third more of their work."""
    recompute_layers: Free[int | None] = None
    """With full: the first so many layers; absent: all."""
    z_loss: Mathematics[float] = 0.0
    """Weight c of c log^2(sum of exponentials) in what is minimised, which keeps logits small (arXiv 2204.02311; usual:
    1e-4). No reported loss contains it."""
    eval_interval_steps: Free[int | None] = None
    """Evaluate every set of data.valid after so many steps and after the last; absent: after the last only."""
    eval_samples: Free[int] = 256
    """Samples of each validation set (all of them when it has fewer)."""
    evaluator: Free[EvaluatorConfig | None] = None
    """Evaluate committed checkpoints in a process of its own, while training goes on: {interval_steps, sets, samples,
    command, prompts, new_tokens, device, threads, nice, timeout_seconds, finish_seconds}, each with a default ({} has
    all of them). Results go to OUT/evaluations.jsonl, TensorBoard and trackers. Its death, slowness or full disk costs
    no step."""
    max_consecutive_skips: Free[int] = 30
    """End the run (exit code 9) after so many skipped steps in a row; a step is skipped when its gradient is not
    finite."""
    on_nonfinite: Free[Literal["skip", "stop", "rewind"]] = "skip"
    """A step whose loss or gradient is not finite changes nothing. skip: the run goes on; stop: it ends (exit code 9);
    rewind: see on_spike. The first of several in a row is written to OUT/incidents/: first bad layer, rank,
    documents."""
    on_spike: Free[Literal["report", "skip", "stop", "rewind"]] = "report"
    """What to do where the loss or the gradient norm is far above what it was in the last steps. report: say so; skip:
    leave the step's update out; stop: leave it out and end the run (exit code 9); rewind: go back to the last
    checkpoint before the samples around it and train on without these, which OUT/ledger.jsonl records. All but report
    write to OUT/incidents/ too."""
    rewind_skip_steps_before: Free[int] = 1
    """A rewind leaves out the samples of the bad step and of so many before it: a loss is that of weights which the
    step before has changed. PaLM left out 200 to 500 steps, from some 100 before the spike on (arXiv 2204.02311,
    5.1)."""
    rewind_skip_steps_after: Free[int] = 0
    """And those of so many steps after it."""
    max_rewinds: Free[int] = 3
    """A run that would go back to the same checkpoint once more than so often ends instead (exit code 9)."""
    replay: Place[str | None] = None
    """Ledger of another run (its ledger.jsonl, or its folder): a new run leaves out from its start what that one has
    left out in the end; ignored once the run has a checkpoint or a ledger of its own."""
    spike_z_score: Free[float] = 12.0
    """How far is far: robust standard deviations (of the median distance from the median) above the median."""
    spike_window_steps: Free[int] = 128
    """Steps that median and distance are of; nothing is a spike before 20 are known."""
    drift_check_interval_steps: Free[int] = 100
    """Steps between two checks, and before each checkpoint, that ranks hold the same bits of what they hold in common:
    weights on data-parallel ranks, norms and copied key and value rows on tensor-parallel ones, their optimizer state.
    The run ends where they do not (exit code 11), and nothing is saved. A check is a pass over the weights: at 100 it
    costs 0.1 % of the time. 0: never."""
    sdc_check_interval_steps: Free[int] = 0
    """Steps between two checks for silent data corruption: the first micro-batch of the step is run twice, and each
    rank compares the bits of its losses and gradients before anything is updated. Where they differ the run ends (exit
    code 11), the rank and the parameter are named, and OUT/incidents/ says more. Costs one micro-batch and two
    passes over gradients in so many steps: at 100 0.3 % with four micro-batches a step, about 1 % with one. On a GPU
    with kernels.deterministic=true only. 0: never."""
    deterministic_reduction: Free[Literal["off", "tree"]] = "off"
    """tree: losses, gradients and their norm are summed in a fixed tree over the global batch's micro-batches, so that
    the loss curve and the checkpoints are the same bit for bit on 1, 2, 4, 8 ... data-parallel ranks, also when
    their number changes in mid-run (with the same micro_batch_size and, on a GPU, kernels.deterministic=true). Takes
    a buffer of gradients more for each doubling of the accumulated micro-batches."""
    device: Free[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: the GPU of this local rank when torch sees one, else the CPU."""
    dry_run: Free[bool] = False
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
            "max_rewinds",
        )
        if self.evaluator is not None:
            self.evaluator.check()
        if self.batch_size_ramp is not None:
            self.batch_size_ramp.check(self.global_batch_size)
        at_least("train", {"spike_window_steps": self.spike_window_steps}, 20)
        z = self.spike_z_score
        require(z > 0, f"train.spike_z_score={z}", "must be above 0", "12 is the default; a larger one reports less")
        at_least("train", {k: getattr(self, k) for k in names}, 1)
        at_least("train", {k: getattr(self, k) for k in ("z_loss", "drift_check_interval_steps")}, 0)
        at_least("train", {"sdc_check_interval_steps": self.sdc_check_interval_steps}, 0)
        at_least("train", {k: getattr(self, k) for k in ("rewind_skip_steps_before", "rewind_skip_steps_after")}, 0)
        require(0 <= self.seed < 2**32, f"train.seed={self.seed}", "must lie in [0, 2^32)", "choose a smaller seed")
        require(self.output != "", "train.output=''", "must name a folder", "set train.output")


@dataclass(frozen=True)
class CheckpointConfig:
    """When and how to save, what to keep, where to start."""

    save_interval_steps: Free[int | None] = None
    """Save after so many steps, and always after the last; absent: after the last only."""
    keep_last: Free[int] = 2
    """Newest checkpoints kept; older ones are removed after a newer one is committed. Only those count that were
    written whole and have not been touched since; the last two of these are never removed."""
    keep_every_steps: Free[int | None] = None
    """Checkpoints of a multiple of so many steps are never removed; absent: keep_last alone decides."""
    pinned_steps: Free[tuple[int, ...] | None] = None
    """Steps to save after whatever save_interval_steps says, whose checkpoints are never removed: [1000, 5000]."""
    mode: Free[Literal["blocking", "background"]] = "blocking"
    """blocking: training waits until a checkpoint is committed. background: each rank copies its part to host memory
    while the next step goes forward and backward, and a process beside it writes the copy; the files have the same
    bytes. Costs the memory of a rank's part of a checkpoint (12 bytes for each parameter, over all ranks)."""
    background_timeout_seconds: Free[float] = 1800.0
    """A save in the background that takes longer is given up, and a blocking one follows. The next save waits as long
    for old checkpoints to be removed. Far above what any healthy disk needs: 1.4 billion parameters are 16 GB."""
    on_save_error: Free[Literal["stop", "continue"]] = "stop"
    """What a save means that fails on a full or failing disk. stop: the run ends with its error. continue: a warning,
    and the next save tries again; the last save of a run must succeed in any case."""
    max_save_errors: Free[int] = 3
    """With on_save_error=continue: so many saves that fail one after the other end the run all the same."""
    fallback: Free[bool] = True
    """Where the newest checkpoint is damaged, go on from the newest one that is not: the damaged one is named, with the
    file and the tensor, and kept aside. false: refuse (exit code 4)."""
    init_from: Place[str | None] = None
    """Checkpoint (or run) whose weights a new run starts from; ignored once the run has checkpoints of its own."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        counts = {"save_interval_steps": self.save_interval_steps, "keep_every_steps": self.keep_every_steps}
        at_least("checkpoint", counts | {"max_save_errors": self.max_save_errors}, 1)
        at_least("checkpoint", {"keep_last": self.keep_last}, 2)
        seconds = self.background_timeout_seconds
        require(
            0 < seconds < math.inf,
            f"checkpoint.background_timeout_seconds={seconds}",
            "must be a positive number of seconds",
            "leave it out for half an hour",
        )
        require(
            all(step >= 1 for step in self.pinned_steps or ()),
            f"checkpoint.pinned_steps={list(self.pinned_steps or ())}",
            "must name steps, which count from 1",
            "take the others out",
        )


# What each service takes as the name of a project, and that in words.
_PROJECT_NAMES = {
    "wandb": (r"[^/\\#?%:]{1,128}", "1 to 128 characters, none of / \\ # ? % :,"),
    "swanlab": (r"[0-9A-Za-z_\-+.]{1,100}", "1 to 100 letters, digits and _ - + ."),
    "mlflow": (r".+", "not empty"),
}


@dataclass(frozen=True)
class LogConfig:
    """What is shown; metrics.jsonl has every step whatever stands here."""

    interval_steps: Free[int] = 10
    """Steps between two printed lines (a terminal gets a progress bar)."""
    tensorboard: Free[bool] = True
    """Write OUT/tensorboard/NAME/ too, NAME being OUT's own: TensorBoard calls the run so."""
    trackers: Free[tuple[Literal["wandb", "swanlab", "mlflow", "prometheus", "opentelemetry"], ...]] = ()
    """Services that get what metrics.jsonl has: [wandb, swanlab, mlflow, prometheus, opentelemetry], any of them. One
    that is named and not installed is an error; one that fails later costs a warning and no step."""
    tracker_project: Free[str] = "megatron_hammer"
    """The project (MLflow: experiment) under which the services show the run."""
    tracker_run_name: Free[str | None] = None
    """The run's name there; absent: that of the folder train.output."""
    trackers_offline: Free[bool] = False
    """Write the services' files to OUT/trackers/ and send nothing, to be sent later with their own commands. false:
    online, or as the clients' own variables say (WANDB_MODE=offline)."""
    prometheus_textfile: Place[str | None] = None
    """With trackers=[prometheus]: folder of node_exporter's textfile collector, where the run keeps a .prom file;
    absent: an HTTP endpoint."""
    prometheus_address: Free[str] = "127.0.0.1:9464"
    """Where that endpoint listens: HOST:PORT. The default is for this machine alone; 0.0.0.0:9464 for all networks."""
    peak_tflops: Free[float | None] = None
    """Dense peak of one device in the run's precision, for MFU; absent: a known GPU's (in fp32 without TF32), else MFU
    is null."""

    def check(self) -> None:
        """Raise ``ConfigError`` for values outside their range."""
        at_least("log", {"interval_steps": self.interval_steps}, 1)
        require(
            len(set(self.trackers)) == len(self.trackers),
            f"log.trackers={list(self.trackers)}",
            "must name each service once",
            "take the second one out",
        )
        for service, (allowed, words) in _PROJECT_NAMES.items():
            require(
                service not in self.trackers or re.fullmatch(allowed, self.tracker_project) is not None,
                f"log.tracker_project={self.tracker_project!r}",
                f"must be {words} for {service}",
                "choose another name",
            )
        host, _, port = self.prometheus_address.rpartition(":")
        require(
            bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65536,
            f"log.prometheus_address={self.prometheus_address!r}",
            "must be HOST:PORT with a port from 1 to 65535",
            "use 127.0.0.1:9464",
        )
        peak = self.peak_tflops
        require(
            peak is None or peak > 0, f"log.peak_tflops={peak}", "must be positive", "state the device's dense peak"
        )
