"""The parameter table: for every tensor in memory, which rectangles of which logical tensors it holds.

A *logical* tensor is one of Hugging Face's ``LlamaForCausalLM``: its name and its true global shape. A *local* one is
what a tensor-parallel rank keeps: fused, sharded, padded. This table is the only place that knows how they relate;
initialisation, gradient sums, gradient norm, weight decay, checkpoints and conversion all read it. For example, rank 1
of TP 2 with 8 heads and 2 groups holds (d = head_dim)::

    layers.0.attention.qkv.weight  [6d, h]     q_proj rows [4d, 8d)  ->  local rows [0, 4d)
                                               k_proj rows [ d, 2d)  ->  local rows [4d, 5d)
                                               v_proj rows [ d, 2d)  ->  local rows [5d, 6d)

Local rows that no slice covers are vocabulary padding: zero, masked, without gradient, never saved.
Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_hammer.config import ModelConfig, padded_vocab_size

SumOver = Literal["none", "tp", "kv"]


@dataclass(frozen=True)
class Slice:
    """A rectangle of one logical tensor and where it lies in the local tensor (whose columns it spans in full)."""

    tensor: str
    """Hugging Face name of the logical tensor."""
    rows: tuple[int, int]
    """Row range in the logical tensor."""
    cols: tuple[int, int] | None
    """Column range in the logical tensor; None for a vector."""
    local_row: int = 0
    """First row in the local tensor."""
    owned: bool = True
    """False on tensor-parallel ranks that hold a copy of what a lower rank holds: not saved, not counted in norms."""
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
    decay: bool
    """Whether weight decay applies: matrices yes, norms no."""

    @property
    def numel(self) -> int:
        """Number of local elements, padding included."""
        rows, *cols = self.shape
        return rows * (cols[0] if cols else 1)


EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face name -> true global shape, in the order of the model."""
    assert model.vocab_size is not None, "model.vocab_size must be resolved before a model is described"
    h, f, v, d = model.hidden_size, model.ffn_hidden_size, model.vocab_size, model.head_size
    q, kv = model.num_attention_heads * d, model.query_groups * d
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (v, h)}
    for i in range(model.num_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (h,),
            layer + "self_attn.q_proj.weight": (q, h),
            layer + "self_attn.k_proj.weight": (kv, h),
            layer + "self_attn.v_proj.weight": (kv, h),
            layer + "self_attn.o_proj.weight": (h, q),
            layer + "post_attention_layernorm.weight": (h,),
            layer + "mlp.gate_proj.weight": (f, h),
            layer + "mlp.up_proj.weight": (f, h),
            layer + "mlp.down_proj.weight": (h, f),
        }
    shapes[FINAL_NORM] = (h,)
    if not model.tie_word_embeddings:
        shapes[HEAD] = (v, h)
    return shapes


def count_parameters(model: ModelConfig) -> int:
    """Number of true parameters, without padding and without copies."""
    return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in logical_shapes(model).values())


def parameter_table(
    model: ModelConfig, tp_rank: int = 0, tp_size: int = 1, sequence_parallel: bool = False
) -> tuple[Parameter, ...]:
    """All local tensors of one tensor-parallel rank, in the order in which forward uses them."""
    assert model.vocab_size is not None, "model.vocab_size must be resolved before a model is described"
    h, f, v, d = model.hidden_size, model.ffn_hidden_size, model.vocab_size, model.head_size
    heads_local = model.num_attention_heads // tp_size

    def norm(name: str, tensor: str) -> Parameter:
        # Under sequence parallelism each rank sees s/t rows only, so its gradient is a part of the sum.
        sum_over: SumOver = "tp" if sequence_parallel and tp_size > 1 else "none"
        return Parameter(name, (h,), (Slice(tensor, (0, h), None, 0, tp_rank == 0, sum_over),), decay=False)

    def vocabulary(name: str, tensor: str) -> Parameter:
        rows = padded_vocab_size(v, tp_size) // tp_size
        start, stop = rows * tp_rank, min(rows * (tp_rank + 1), v)
        slices = (Slice(tensor, (start, stop), (0, h)),) if start < stop else ()
        return Parameter(name, (rows, h), slices, decay=True)

    def columns(name: str, tensor: str, width: int) -> Parameter:
        cols = (width // tp_size * tp_rank, width // tp_size * (tp_rank + 1))
        return Parameter(name, (h, width // tp_size), (Slice(tensor, (0, h), cols),), decay=True)

    def qkv(name: str, layer: str) -> Parameter:
        groups = model.query_groups
        groups_local, copies = max(1, groups // tp_size), max(1, tp_size // groups)
        first = tp_rank // copies * groups_local  # of this rank's query groups
        kv_rows, owned = (first * d, (first + groups_local) * d), tp_rank % copies == 0
        sum_over: SumOver = "kv" if copies > 1 else "none"  # each copy sees its own query heads' part only
        q_rows = (heads_local * d * tp_rank, heads_local * d * (tp_rank + 1))
        q_end, k_end = heads_local * d, (heads_local + groups_local) * d
        return Parameter(
            name,
            ((heads_local + 2 * groups_local) * d, h),
            (
                Slice(layer + "self_attn.q_proj.weight", q_rows, (0, h)),
                Slice(layer + "self_attn.k_proj.weight", kv_rows, (0, h), q_end, owned, sum_over),
                Slice(layer + "self_attn.v_proj.weight", kv_rows, (0, h), k_end, owned, sum_over),
            ),
            decay=True,
        )

    def gate_up(name: str, layer: str) -> Parameter:
        f_local = f // tp_size
        rows = (f_local * tp_rank, f_local * (tp_rank + 1))
        return Parameter(
            name,
            (2 * f_local, h),
            (
                Slice(layer + "mlp.gate_proj.weight", rows, (0, h)),
                Slice(layer + "mlp.up_proj.weight", rows, (0, h), f_local),
            ),
            decay=True,
        )

    table = [vocabulary("embedding.weight", EMBEDDING)]
    for i in range(model.num_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        table += [
            norm(ours + "attention_norm.weight", theirs + "input_layernorm.weight"),
            qkv(ours + "attention.qkv.weight", theirs),
            columns(
                ours + "attention.output.weight", theirs + "self_attn.o_proj.weight", model.num_attention_heads * d
            ),
            norm(ours + "mlp_norm.weight", theirs + "post_attention_layernorm.weight"),
            gate_up(ours + "mlp.gate_up.weight", theirs),
            columns(ours + "mlp.down.weight", theirs + "mlp.down_proj.weight", f),
        ]
    table.append(norm("final_norm.weight", FINAL_NORM))
    if not model.tie_word_embeddings:
        table.append(vocabulary("head.weight", HEAD))
    return tuple(table)
