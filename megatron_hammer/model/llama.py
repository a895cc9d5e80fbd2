"""The Llama (arXiv 2302.13971) with grouped-query attention: a stage of layers, of which the whole model is one case.

::

    tokens [b, s] -> embedding [s/t, b, h] -> layers of the stage -> final norm -> head -> loss [b, s]
                     first stage only                                last stage only; others: hidden states [s/t, b, h]

    DecoderLayer:  x + attention(norm(x));  x + mlp(norm(x))        the sum is taken by the norm that reads it

Inside the model the sequence comes first (``[s, b, h]``): shards of it are contiguous. Only the embedding and the loss
change the order. Under document masks the samples of a micro-batch lie one after the other, ``[b s, 1, h]``
for every layer; only attention and the positions know of documents. The mathematics is that of ``LlamaForCausalLM`` in
transformers, or with the config's biases and norms of heads that of ``Qwen2ForCausalLM`` or ``Qwen3ForCausalLM``, and
``tests/model/test_llama.py`` holds it to that. A layer reads from here through ``layers.py`` and ``kernels/``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from megatron_hammer.config import KernelsConfig, ModelConfig
from megatron_hammer.kernels.linear import Gradient, GradientStore, GraphProducts, Overlap, Products
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.packed_sequences import GraphPackedSequences, PackedSequences
from megatron_hammer.kernels.ranges import EMBEDDING, HEAD, NORM, RangeOf, no_range
from megatron_hammer.model import layers, layers_te
from megatron_hammer.model.head_loss import HeadAndLoss, Objective
from megatron_hammer.model.layer_interface import LayerModule
from megatron_hammer.model.layers import LayerOptions, ready_after
from megatron_hammer.model.recompute import Layer, Recompute
from megatron_hammer.model.residence import run_with_weights, uses_of
from megatron_hammer.model.rope import cos_and_sin
from megatron_hammer.parallel.collectives import all_gather_rows
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import Placement, place

Result = TypeVar("Result")
CosSin = tuple[Tensor, Tensor]
"""Of the angles of RoPE: [s, 1, 1, d/2] each; [b s, 1, 1, d/2] of a packed micro-batch."""


class Attention(nn.Module):
    """Causal self-attention, within documents where they are given: [s/t, b, h] -> [s/t, b, h]."""

    def __init__(self, config: ModelConfig, at: Placement, options: LayerOptions, parts: LayerModule) -> None:
        super().__init__()
        h, d = config.hidden_size, config.head_size
        self.rope, self.attend = options.operations.rope, options.operations.attention
        self.heads_local, self.groups_local = at.heads_local, at.groups_local
        self.qkv = parts.QKVLinear(h, at.heads_local, at.groups_local, d, options, config.qkv_bias)
        self.has_norms = config.qk_norm
        if self.has_norms:
            self.q_norm = parts.RMSNorm(d, config.norm_eps, options)
            self.k_norm = parts.RMSNorm(d, config.norm_eps, options)
        self.output = parts.RowParallelLinear(at.heads_local * d, h, options, config.attention_output_bias)

    def forward(self, x: Tensor, rope: CosSin, documents: PackedSequences | None) -> Tensor:
        qkv = self.qkv(x)  # [s, b, n + 2g, d]
        if self.has_norms:
            q, k, v = qkv.split((self.heads_local, self.groups_local, self.groups_local), dim=2)
            qkv = torch.cat((self.q_norm(q.contiguous())[0], self.k_norm(k.contiguous())[0], v), dim=2)
        q, k, v = self.rope(qkv, *rope, self.heads_local, self.groups_local)  # [s, b, heads, d] each
        return self.output(self.attend(q, k, v, documents).flatten(2))


class MLP(nn.Module):
    """SwiGLU feed-forward: [s/t, b, h] -> [s/t, b, h]."""

    def __init__(self, config: ModelConfig, at: Placement, options: LayerOptions, parts: LayerModule) -> None:
        super().__init__()
        self.swiglu = options.operations.swiglu
        h, bias = config.hidden_size, config.mlp_bias
        self.gate_up = parts.ColumnParallelLinear(h, 2 * at.ffn_local, options, bias)
        self.down = parts.RowParallelLinear(at.ffn_local, h, options, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.swiglu(self.gate_up(x)))


class DecoderLayer(nn.Module):
    """One layer with its two residual connections, each added by the norm that comes next.

    x [s/t, b, h], the residual stream, and branch [s/t, b, h], what the sublayer before adds to it (None: nothing) ->
    the same two after this layer.
    """

    def __init__(self, config: ModelConfig, at: Placement, options: LayerOptions, parts: LayerModule) -> None:
        super().__init__()
        self.attention_norm = parts.RMSNorm(config.hidden_size, config.norm_eps, options)
        self.attention = Attention(config, at, options, parts)
        self.mlp_norm = parts.RMSNorm(config.hidden_size, config.norm_eps, options)
        self.mlp = MLP(config, at, options, parts)

    def forward(
        self, x: Tensor, branch: Tensor | None, rope: CosSin, documents: PackedSequences | None
    ) -> tuple[Tensor, Tensor]:
        normed, x = self.attention_norm(x, branch)
        normed, x = self.mlp_norm(x, self.attention(normed, rope, documents))
        return x, self.mlp(normed)


class Stage(nn.Module):
    """What one rank runs of the model: consecutive layers, and with the first of them the embedding, with the last the
    final norm, the head and the loss. The whole model is the case of one stage.

    Its parameters are those of ``parameter_table`` for the same placement, by name and local shape; layers keep the
    number that they have in the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        at: Placement,
        options: LayerOptions,
        parts: LayerModule,
        recompute: Recompute,
        range_of: RangeOf = no_range,
    ) -> None:
        super().__init__()
        self.range_of = range_of
        assert config.vocab_size is not None, "model.vocab_size must be resolved before a model is built"
        self.config, self.placement, self.options, self.vocab_size = config, at, options, config.vocab_size
        rows, h = at.vocab_rows_local(config.vocab_size), config.hidden_size
        self.is_tied = config.tie_word_embeddings and at.has_embedding and at.has_head
        """Whether head and embedding are one parameter here; a last stage without embedding has a copy of its own."""
        if at.has_embedding:
            self.embedding = layers.VocabParallelEmbedding(rows, h, options)
        self.layers = nn.ModuleDict({str(i): DecoderLayer(config, at, options, parts) for i in range(*at.layers)})
        if at.has_head:
            self.final_norm = parts.RMSNorm(h, config.norm_eps, options)
            if not self.is_tied:
                self.head = layers.ColumnParallelLinear(h, rows, options)
            last = self.embedding if self.is_tied else self.head
            self.head_and_loss = HeadAndLoss(last.weight, self.vocab_size, options, last.gradient, shared=self.is_tied)
        self.uses = uses_of(at.layers, at.has_embedding, at.has_head, self.is_tied)
        self.recompute, self.region = recompute, recompute.region(parts.forward_region(options))
        self.compiled, self.recorded_layers = False, self._recorded(self.layers.values())
        self.plain_layers: list[Layer] = [self._held(f"layers.{i}", layer) for i, layer in self.layers.items()]
        """What runs each layer where no gradients are recorded."""
        self.ends: dict[str, Callable[..., Any]] = {}
        """What runs the parts before and after the layers."""
        if at.has_embedding:
            self.ends["embedding"] = self._held("embedding", self.embedding, again=False)
        if at.has_head:
            self.ends["norm"] = self._held("final_norm", self.final_norm)
            self.ends["loss"] = self._held("head", self.head_and_loss)
            self.ends["loss and gradients"] = self._held("head", self.head_and_loss, again=False)
        self.rope_cache: dict[int, CosSin] = {}

    def _held(
        self, part: str, run: Callable[..., Result], again: bool = True, by_itself: bool = False
    ) -> Callable[..., Result]:
        """``run`` with the weights of a part there, as ``run_with_weights`` says; itself where they always are."""
        store = self.options.store
        if store is None or not store.needs_acquire:
            return run
        return partial(run_with_weights, store, self.uses[part], run, again, by_itself)

    def _recorded(self, plain: Iterable[Layer], by_itself: bool = False) -> list[Layer]:
        """What runs each layer where gradients are recorded."""
        return [
            self._held(f"layers.{i}", self.recompute.layer(i, layer, self.region), by_itself=by_itself)
            for i, layer in enumerate(plain, self.placement.layers[0])
        ]

    def rope(self, length: int) -> CosSin:
        """cos and sin of every position below ``length``, computed in fp32 and then rounded, as in Hugging Face."""
        if length not in self.rope_cache:
            self.rope_cache[length] = cos_and_sin(self.config, length, self.options.device, self.options.dtype)
        return self.rope_cache[length]

    def change_rope(self, config: ModelConfig) -> None:
        """Compute with the RoPE of another config from now on, whose weights mean the same otherwise."""
        self.config = config
        self.rope_cache.clear()

    def compile_layers(self) -> None:
        """Have the first training step compile a layer, whole; the others run that code, on their own weights."""
        run = torch.compile(self.recompute.body, fullgraph=True, dynamic=False)
        self.recorded_layers = self._recorded((partial(run, layer) for layer in self.layers.values()), by_itself=True)
        self.compiled = True

    def hidden(
        self, tokens: Tensor, documents: PackedSequences | None = None, received: Tensor | None = None
    ) -> Tensor:
        """What the head reads, or on an earlier stage the next one: [s/t, b, h], and [b s/t, 1, h] with documents.

        Args:
            tokens: [b, s] int64; only their shape is read where there is no embedding.
            received: what this method returned on the stage before; None on the first.
        """
        told: PackedSequences | GraphPackedSequences | None  # what attention is told
        rope = self.rope(tokens.shape[1] * (1 if documents is None else documents.shards))
        if documents is not None:
            tokens = tokens.reshape(1, -1)  # [1, b s]; of a context-parallel rank's share s is the rank's part
            rope = (rope[0][documents.positions], rope[1][documents.positions])
        assert (received is None) == self.placement.has_embedding, "the first stage receives nothing, all others do"
        x, told = received, documents
        branch: Tensor | None = None
        if x is None:
            with self.range_of(EMBEDDING):
                x = self.ends["embedding"](tokens.t())
        recorded = torch.is_grad_enabled()
        runs = self.recorded_layers if recorded else self.plain_layers
        compiled = self.compiled and recorded  # evaluation comes in many shapes: it is never compiled
        if compiled:
            branch = torch.zeros_like(x).requires_grad_()  # so that the first layer can run the code of the others
            told = None if documents is None else GraphPackedSequences.of(documents)
        with self.region():
            for layer, run in zip(self.layers.values(), runs, strict=True):
                if compiled:
                    x = ready_after(x, gradients_of(layer))
                x, branch = run(x, branch, rope, told)
        if not self.placement.has_head:
            return x if branch is None else x + branch
        normed: Tensor
        with self.range_of(NORM):
            normed, _ = self.ends["norm"](x, branch)
        return normed

    def empty_hidden(self, tokens: Tensor, packed: bool) -> Tensor:
        """A place for what ``hidden`` receives of these tokens; packed: with documents."""
        b, s = tokens.shape
        rows, b = (b * s, 1) if packed else (s, b)
        shape = rows // self.placement.sequence_shards, b, self.config.hidden_size
        return torch.empty(shape, dtype=self.options.dtype, device=self.options.device)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        documents: PackedSequences | None = None,
        objective: Objective | None = None,
        received: Tensor | None = None,
    ) -> Tensor:
        """Loss of every token; on a stage that is not the last, the hidden states that the next one receives.

        A schedule of stages calls backward on the losses of the last stage, and on the hidden states of the others with
        the gradient that ``received`` got on the stage after.

        Args:
            tokens, labels: [b, s] int64; label i is the token after token i.
            documents: where attention and positions start anew, over the whole sequence on every tensor-parallel rank;
                None: at the start of each sample only. The attention backend was chosen for one or the other.
            objective: what backward will start from, so that forward can leave the head's gradient behind.
            received: what the stage before returned; None on the first.

        Returns:
            [b, s] fp32, the same on all tensor-parallel ranks; or [s/t, b, h], and [b s/t, 1, h] with documents.
        """
        x = self.hidden(tokens, documents, received)
        if not self.placement.has_head:
            return x
        with self.range_of(HEAD):  # with an objective nothing is left for backward to compute
            run = self.ends["loss" if objective is None else "loss and gradients"]
            losses: Tensor = run(x, labels, objective)
        return losses

    def _head_columns(self, x: Tensor) -> Tensor:
        return layers.column_parallel(x, self.head_and_loss.weight, self.options)

    @torch.no_grad()
    def logits(self, tokens: Tensor, documents: PackedSequences | None = None) -> Tensor:
        """[b, s] int64 -> [b, s, v] over the true vocabulary, gathered on every rank: for proofs, not for training."""
        x = self.hidden(tokens, documents)
        columns = self._held("head", self._head_columns)(x)
        columns = columns.permute(2, 1, 0)  # [v/t, b, s]
        gathered = all_gather_rows(columns, self.options.tp)[: self.vocab_size]
        return gathered.permute(1, 2, 0).reshape(*tokens.shape, -1)


Model = Stage | Sequence[Stage]
"""What a rank runs: a stage, or several of an interleaved pipeline, first to last."""


def stages_of(model: Model) -> list[Stage]:
    """The stages of a rank."""
    return [model] if isinstance(model, Stage) else list(model)


def gradients_of(layer: nn.Module) -> list[Gradient]:
    """Where the gradients of all weights of a layer are summed; empty where autograd keeps them."""
    places = [getattr(m, name, None) for m in layer.modules() for name in ("gradient", "bias_gradient")]
    return [gradient for gradient in places if gradient is not None]


def build_stage(
    config: ModelConfig,
    ctx: ParallelContext,
    placement: Placement | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    operations: Operations | None = None,
    kernels: KernelsConfig | None = None,
    recompute: Recompute | None = None,
    store: GradientStore | None = None,
    range_of: RangeOf = no_range,
    tp_comm_overlap: Overlap = "bulk",
) -> Stage:
    """This rank's part of the model, all weights zero until ``initialise`` or a checkpoint fills them.

    The decoder's parts come from one of two modules with the same names, as ``kernels.layers`` says; embedding and head
    are those of ``layers.py`` in both.

    Args:
        placement: what this rank holds; None: its tensor-parallel share of all layers, without sequence parallelism.
        store: who owns the weights and sums their gradients; None: the layers and autograd.
        range_of: entered around the parts of a forward, for a profiler; not inside of layers that are compiled.
        tp_comm_overlap: ``parallel.tp_comm_overlap``.
    """
    kernels, recompute = kernels or KernelsConfig(), recompute or Recompute()
    placement = placement or place(config, ctx.tp.rank, ctx.tp.size)
    assert (placement.tp_rank, placement.tp_size) == (ctx.tp.rank, ctx.tp.size), "a placement of another rank"
    parts: LayerModule = layers
    if kernels.layers == "te":
        parts = layers_te  # an assignment of its own: mypy holds each module to the interface
    inside = no_range if kernels.compile == "layers" else range_of
    operations = operations or Operations(products=GraphProducts() if kernels.compile == "layers" else Products())
    plain = parts.operations(operations).across(ctx.cp).within(inside)  # what is done again is in its range, too
    options = LayerOptions(
        dtype,
        ctx.device,
        ctx.tp,
        placement.sequence_parallel,
        recompute.operations(plain).within(inside),
        fp8=kernels.fp8,
        world=ctx.world,
        store=store,
        range_of=inside,
        tp_comm_overlap=tp_comm_overlap,
    )
    model = Stage(config, placement, options, parts, recompute, range_of)
    if kernels.compile == "layers":
        model.compile_layers()
    return model
