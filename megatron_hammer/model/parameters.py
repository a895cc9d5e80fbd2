"""The parameter table: for every tensor in memory, which rectangles of which logical tensors it holds.

A *logical* tensor is one of Hugging Face's model (``LlamaForCausalLM``, say): its name and its true global shape. A
*local* one is what a rank keeps of it, as its placement says (``parallel/placement.py``): fused, sharded, padded. This
table is the only place that knows how they relate; initialisation, gradient sums, gradient norm, weight decay,
checkpoints and conversion all read it. For example, rank 1 of TP 2 with 8 heads and 2 groups holds (d = size of a
head)::

    layers.0.attention.qkv.weight  [6d, h]     q_proj rows [4d, 8d)  ->  local rows [0, 4d)
                                               k_proj rows [ d, 2d)  ->  local rows [4d, 5d)
                                               v_proj rows [ d, 2d)  ->  local rows [5d, 6d)

Local rows that no slice covers are vocabulary padding: zero, masked, without gradient, never saved.
Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from megatron_hammer.config import Config, ModelConfig
from megatron_hammer.parallel.placement import Placement, Range, place

SumOver = Literal["none", "tp", "kv", "stages"]
"""stages: the first and the last stage, which both hold a tied embedding."""


@dataclass(frozen=True)
class Slice:
    """A rectangle of one logical tensor and where it lies in the local tensor (whose columns it spans in full)."""

    tensor: str
    """Hugging Face name of the logical tensor."""
    rows: Range
    """Row range in the logical tensor."""
    cols: Range | None
    """Column range in the logical tensor; None for a vector."""
    local_row: int = 0
    """First row in the local tensor."""
    owned: bool = True
    """False on ranks that hold a copy of what a lower rank holds: not saved, not counted in norms."""
    sum_over: SumOver = "none"
    """Group over which this slice's gradient must still be summed after backward."""

    @property
    def num_rows(self) -> int:
        """Rows of the rectangle."""
        return self.rows[1] - self.rows[0]

    @property
    def num_cols(self) -> int:
        """Columns of the rectangle; 1 for a vector."""
        return 1 if self.cols is None else self.cols[1] - self.cols[0]


@dataclass(frozen=True)
class Parameter:
    """One local tensor."""

    name: str
    """Name in our module tree."""
    shape: tuple[int, ...]
    """Local shape on this rank."""
    slices: tuple[Slice, ...]
    """The rectangles that it holds."""
    initial: Literal["normal", "ones", "zeros"]
    """How initialisation fills it: matrices, weights of norms, biases."""
    head_rows: int | None = None
    """Rows of a head, where rows are those of heads: queries, keys and values."""

    @property
    def decay(self) -> bool:
        """Whether weight decay applies: to matrices yes, to norms and biases no."""
        return self.initial == "normal"

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it consists of matrices of a layer, from hidden state to hidden state: no vector, no vocabulary."""
        return self.decay and self.part.startswith("layers.")

    @property
    def part(self) -> str:
        """The part of the model that computes with it: embedding, layers.3, final_norm or head."""
        first, second, *_ = self.name.split(".")
        return f"{first}.{second}" if first == "layers" else first

    @property
    def numel(self) -> int:
        """Number of local elements, padding included."""
        rows, *cols = self.shape
        return rows * (cols[0] if cols else 1)


EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def parameter_table(model: ModelConfig, placement: Placement | None = None) -> tuple[Parameter, ...]:
    """Every local tensor of a rank, in the order of the model's forward pass; without a placement, the whole model's.

    The tables of all stages together are the table of the whole model. One tensor is in two of them: where the output
    head is the embedding (``tie_word_embeddings``) and the first stage is not the last, the last stage has a
    ``head.weight`` that is a copy of the first stage's embedding. The first stage owns it.
    """
    at = place(model) if placement is None else placement
    table = [_vocabulary("embedding.weight", EMBEDDING, model, at)] if at.has_embedding else []
    for index in range(*at.layers):
        table += _layer(index, model, at)
    if at.has_head:
        table.append(_norm("final_norm.weight", FINAL_NORM, model, at))
        if not model.tie_word_embeddings:
            table.append(_vocabulary("head.weight", HEAD, model, at))
        elif not at.has_embedding:
            table.append(_vocabulary("head.weight", EMBEDDING, model, at))
    return tuple(table)


def tables_of_stages(config: Config, pp_rank: int) -> list[list[tuple[Parameter, ...]]]:
    """Of each stage of a pipeline rank, the parameter table of each tensor-parallel rank."""
    ranks = range(config.parallel.tensor_model_parallel_size)
    return [[parameter_table(config.model, config.placement(rank, number)) for rank in ranks]
            for number in config.pipeline(pp_rank).stages]  # fmt: skip


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> true global shape, in the order of the model."""
    return {
        s.tensor: (s.num_rows,) if s.cols is None else (s.num_rows, s.num_cols)
        for parameter in parameter_table(model)
        for s in parameter.slices
    }


def hidden_matrices(model: ModelConfig) -> frozenset[str]:
    """Hugging Face names of the matrices of the layers."""
    return frozenset(s.tensor for parameter in parameter_table(model) if parameter.is_hidden_matrix
                     for s in parameter.slices)  # fmt: skip


@lru_cache(maxsize=8)  # a search for layouts asks for the same many times
def count_parameters(model: ModelConfig) -> int:
    """Number of true parameters, without padding and without copies."""
    return sum(s.num_rows * s.num_cols for parameter in parameter_table(model) for s in parameter.slices)


def _layer(index: int, model: ModelConfig, at: Placement) -> list[Parameter]:
    """One decoder layer."""
    ours, theirs, d = f"layers.{index}.", f"model.layers.{index}.", model.head_size
    heads = (at.heads[0] * d, at.heads[1] * d)
    attention, mlp = (ours + "attention.", theirs + "self_attn."), (ours + "mlp.", theirs + "mlp.")
    qkv, output = (attention[0] + "qkv.", attention[1]), (attention[0] + "output.", attention[1] + "o_proj.")
    gate_up, down = (mlp[0] + "gate_up.", mlp[1]), (mlp[0] + "down.", mlp[1] + "down_proj.")
    table = [_norm(ours + "attention_norm.weight", theirs + "input_layernorm.weight", model, at)]
    table.append(_qkv(*qkv, "weight", model, at))
    if model.qkv_bias:
        table.append(_qkv(*qkv, "bias", model, at))
    if model.qk_norm:
        table += [_head_norm(attention[0] + n, attention[1] + n, d, at) for n in ("q_norm.weight", "k_norm.weight")]
    table.append(_columns(output[0] + "weight", output[1] + "weight", heads, model))
    if model.attention_output_bias:
        table.append(_stream_vector(output[0] + "bias", output[1] + "bias", model, at, "zeros"))
    table.append(_norm(ours + "mlp_norm.weight", theirs + "post_attention_layernorm.weight", model, at))
    table.append(_gate_up(*gate_up, "weight", model, at))
    if model.mlp_bias:
        table.append(_gate_up(*gate_up, "bias", model, at))
    table.append(_columns(down[0] + "weight", down[1] + "weight", at.ffn, model))
    if model.mlp_bias:
        table.append(_stream_vector(down[0] + "bias", down[1] + "bias", model, at, "zeros"))
    return table


def _norm(name: str, tensor: str, model: ModelConfig, at: Placement) -> Parameter:
    return _stream_vector(name, tensor, model, at, "ones")


def _stream_vector(
    name: str, tensor: str, model: ModelConfig, at: Placement, initial: Literal["ones", "zeros"]
) -> Parameter:
    """A vector over the residual stream, which every tensor-parallel rank has."""
    # Under sequence parallelism each rank sees s/t rows only, so its gradient is a part of the sum.
    sum_over: SumOver = "tp" if at.sequence_shards > 1 else "none"
    h = model.hidden_size
    return Parameter(name, (h,), (Slice(tensor, (0, h), None, 0, at.tp_rank == 0, sum_over),), initial)


def _head_norm(name: str, tensor: str, d: int, at: Placement) -> Parameter:
    """The weight of a norm of heads, which every tensor-parallel rank has for its own heads."""
    sum_over: SumOver = "tp" if at.tp_size > 1 else "none"  # copies of a group's keys get a part of its gradient each
    return Parameter(name, (d,), (Slice(tensor, (0, d), None, 0, at.tp_rank == 0, sum_over),), "ones")


def _vocabulary(name: str, tensor: str, model: ModelConfig, at: Placement) -> Parameter:
    """Embedding or head, and the copy of a tied embedding that a last stage has."""
    assert model.vocab_size is not None, "model.vocab_size must be resolved before a model is described"
    copied = model.tie_word_embeddings and not (at.has_embedding and at.has_head)
    sum_over: SumOver = "stages" if copied else "none"
    rows, h = at.vocab_rows(model.vocab_size), model.hidden_size
    slices = (Slice(tensor, rows, (0, h), 0, at.has_embedding or not copied, sum_over),) if rows[0] < rows[1] else ()
    return Parameter(name, (at.vocab_rows_local(model.vocab_size), h), slices, "normal")


def _columns(name: str, tensor: str, columns: Range, model: ModelConfig) -> Parameter:
    """A matrix whose inputs are divided over the ranks."""
    h = model.hidden_size
    return Parameter(name, (h, columns[1] - columns[0]), (Slice(tensor, (0, h), columns),), "normal")


def _rows(name: str, rows: int, slices: tuple[Slice, ...], columns: int, head: int | None = None) -> Parameter:
    """Matrices whose outputs are divided over the ranks, in one; or their biases, as the name says."""
    if name.endswith(".weight"):
        return Parameter(name, (rows, columns), slices, "normal", head)
    return Parameter(name, (rows,), tuple(replace(s, cols=None) for s in slices), "zeros")


def _qkv(ours: str, theirs: str, kind: str, model: ModelConfig, at: Placement) -> Parameter:
    """Queries, keys and values in one: the "weight", or the "bias"."""
    h, d = model.hidden_size, model.head_size
    q_rows, kv_rows = ((first * d, last * d) for first, last in (at.heads, at.groups))
    q_end, k_end = at.heads_local * d, (at.heads_local + at.groups_local) * d
    sum_over: SumOver = "kv" if at.kv_copies > 1 else "none"  # each copy sees its own query heads' part only
    slices = (
        Slice(f"{theirs}q_proj.{kind}", q_rows, (0, h)),
        Slice(f"{theirs}k_proj.{kind}", kv_rows, (0, h), q_end, at.owns_groups, sum_over),
        Slice(f"{theirs}v_proj.{kind}", kv_rows, (0, h), k_end, at.owns_groups, sum_over),
    )
    return _rows(ours + kind, k_end + at.groups_local * d, slices, h, d)


def _gate_up(ours: str, theirs: str, kind: str, model: ModelConfig, at: Placement) -> Parameter:
    """The two matrices of the feed-forward layer that read its input, in one: the "weight", or the "bias"."""
    h, f_local = model.hidden_size, at.ffn_local
    slices = (
        Slice(f"{theirs}gate_proj.{kind}", at.ffn, (0, h)),
        Slice(f"{theirs}up_proj.{kind}", at.ffn, (0, h), f_local),
    )
    return _rows(ours + kind, 2 * f_local, slices, h)
