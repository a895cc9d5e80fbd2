"""Translates Megatron-LM's settings and tensor names: the model's config, and where each logical tensor lies.

::

    linear_qkv   for each query group: its query heads, its key head, its value head; rows of head_dim each
    linear_fc1   gate, then up
    embedding    and output_layer: rows beyond the vocabulary are padding
    norms        linear_qkv.layer_norm_weight and linear_fc1.layer_norm_weight (Transformer Engine), or
                 input_layernorm and pre_mlp_layernorm (the local layers)

Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.config import ModelConfig, RopeScaling
from megatron_hammer.config.settings import MAX_LAYERS
from megatron_hammer.model.parameters import EMBEDDING, FINAL_NORM, HEAD

EMBEDDING_THERE, OUTPUT_THERE = "embedding.word_embeddings.weight", "output_layer.weight"
LAYERS = "decoder.layers."
_LAYER = re.compile(rf"{re.escape(LAYERS)}([0-9]{{1,9}})\.(.+)")
FusedPart = Literal["whole", "vocabulary", "q", "k", "v", "gate", "up"]

# Settings that change the function, and the values at which they do not; absent counts as the first.
_ONLY: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("rope",),
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "num_experts": (None,),
    "multi_latent_attention": (False, None),
    "apply_layernorm_1p": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "window_size": (None,),
    "squared_relu": (False, None),
    "mtp_num_layers": (None, 0),
    "attention_output_gate": (False, None),
    "softmax_type": ("vanilla", None),
    "qk_l2_norm": (False, None),
    "experimental_attention_variant": (None,),
    "no_rope_freq": (None,),
    "heterogeneous_layers_config_path": (None,),
    "linear_attention_freq": (None,),
    "hybrid_layer_pattern": (None,),
    "embedding_init_method_std": (None,),
    "rope_type": (None, "rope"),
    "glu_linear_offset": (0.0, None),
    "activation_func_clamp_value": (None,),
    "softmax_scale": (None,),
    "use_mup": (False, None),
    "enable_mhc_connections": (False, None),
    "hybrid_override_pattern": (None,),
}
_MUST_STAND = ("position_embedding_type", "normalization", "swiglu")  # whose default there is another function
_LEFT_ALONE = {"embedding_init_method_std"}  # of the initial weights alone


@dataclass(frozen=True)
class MegatronTensor:
    """Where a logical tensor lies: one of these names of Megatron-LM's, of a layer or of none, and which part of it."""

    names: tuple[str, ...]
    layer: int | None
    part: FusedPart = "whole"


def model_of(args: Mapping[str, Any], vocab_size: int, where: str) -> ModelConfig:
    """Our config of a model that was trained with these arguments.

    Raises:
        CheckpointError: E432 a feature that ours lacks, by its name; E434 an impossible value.
    """
    for name, allowed in _ONLY.items():
        value = args.get(name, allowed[0])
        if name in _MUST_STAND and name not in args:
            raise CheckpointError(34, f"{where}: args.{name}", "is missing", "name a checkpoint that has its arguments")
        if value not in allowed and name not in _LEFT_ALONE:
            rule = f"is a feature that our model lacks: only {' or '.join(map(str, allowed))} can be converted"
            what = f"{where}: args.{name}={str(value)[:80]}"
            raise CheckpointError(32, what, rule, "convert a Llama-like model without it")
    heads = _count(args, "num_attention_heads", where)
    eps = "norm_epsilon" if "norm_epsilon" in args else "layernorm_epsilon"  # the latter until 2023, and since 2026
    grouped = bool(args.get("group_query_attention"))
    every, qkv = bool(args.get("add_bias_linear")), bool(args.get("add_qkv_bias"))
    scaling = None
    if args.get("use_rope_scaling"):
        factor = _number(args, "rope_scaling_factor", 8.0, where)
        scaling = RopeScaling(factor, 1.0, 4.0, 8192)  # the other three are constants there, too
    model = ModelConfig(
        hidden_size=_count(args, "hidden_size", where),
        ffn_hidden_size=_count(args, "ffn_hidden_size", where),
        num_layers=_count(args, "num_layers", where, MAX_LAYERS),
        num_attention_heads=heads,
        num_query_groups=_count(args, "num_query_groups", where) if grouped else heads,
        head_dim=_count(args, "kv_channels", where) if args.get("kv_channels") else None,
        vocab_size=vocab_size,
        norm_eps=_number(args, eps, None, where),
        rope_theta=_number(args, "rotary_base", 10000, where),
        rope_scaling=scaling,
        qkv_bias=every or qkv,
        attention_output_bias=every,
        mlp_bias=every,
        qk_norm=bool(args.get("qk_layernorm")),
        max_position_embeddings=_count(args, "max_position_embeddings", where),
        tie_word_embeddings=not args.get("untie_embeddings_and_output_weights", False),
        init_std=_number(args, "init_method_std", 0.02, where),
    )
    try:
        model.check()
    except ConfigError as error:
        rule = f"is no model of ours: {error.rule}"
        raise CheckpointError(32, f"{where}: {error.what}", rule, "convert a Llama-like model") from None
    return model


def _count(args: Mapping[str, Any], name: str, where: str, most: int = 2**31 - 1) -> int:
    value = args.get(name)
    if type(value) is not int or not 0 < value <= most:
        remedy = "name a checkpoint that has its arguments"
        rule = "must be a positive whole number" + (f" of at most {most:,}" if most < 2**31 - 1 else "")
        raise CheckpointError(34, f"{where}: args.{name}={str(value)[:80]}", rule, remedy)
    return value


def _number(args: Mapping[str, Any], name: str, default: float | None, where: str) -> float:
    """A setting; without a default it must be there."""
    value: Any = default if args.get(name) is None else args[name]
    if type(value) not in (int, float) or not 0 < value < 1e30:
        remedy = "name a checkpoint that has its arguments"
        raise CheckpointError(34, f"{where}: args.{name}={str(value)[:80]}", "must be a positive number", remedy)
    return float(value)


def full_name(name: str, layer: int | None) -> str:
    """What Megatron-LM's model calls a tensor of a layer, or of none."""
    return name if layer is None else f"{LAYERS}{layer}.{name}"


def split_name(full: str) -> tuple[str, int | None]:
    """The inverse: a tensor's name within its layer, and the layer."""
    match = _LAYER.fullmatch(full)
    return (full, None) if match is None else (match[2], int(match[1]))


def tensor_place(tensor: str) -> MegatronTensor:
    """Where a logical tensor, by its Hugging Face name, lies in Megatron-LM's model."""
    whole = {
        EMBEDDING: MegatronTensor((EMBEDDING_THERE,), None, "vocabulary"),
        HEAD: MegatronTensor((OUTPUT_THERE,), None, "vocabulary"),
        FINAL_NORM: MegatronTensor(("decoder.final_layernorm.weight", "decoder.final_norm.weight"), None),
    }
    if tensor in whole:
        return whole[tensor]
    _, _, number, *rest = tensor.split(".")
    names, part = _OF_A_LAYER[".".join(rest[:-1])]
    kind = rest[-1]
    spelled = tuple(name if name.endswith("layer_norm_weight") else f"{name}.{kind}" for name in names)
    return MegatronTensor(spelled, int(number), part)


_OF_A_LAYER: dict[str, tuple[tuple[str, ...], FusedPart]] = {
    "self_attn.q_proj": (("self_attention.linear_qkv",), "q"),
    "self_attn.k_proj": (("self_attention.linear_qkv",), "k"),
    "self_attn.v_proj": (("self_attention.linear_qkv",), "v"),
    "self_attn.o_proj": (("self_attention.linear_proj",), "whole"),
    "self_attn.q_norm": (("self_attention.q_layernorm",), "whole"),
    "self_attn.k_norm": (("self_attention.k_layernorm",), "whole"),
    "input_layernorm": (("self_attention.linear_qkv.layer_norm_weight", "input_layernorm"), "whole"),
    "post_attention_layernorm": (("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm"), "whole"),
    "mlp.gate_proj": (("mlp.linear_fc1",), "gate"),
    "mlp.up_proj": (("mlp.linear_fc1",), "up"),
    "mlp.down_proj": (("mlp.linear_fc2",), "whole"),
}


def rows_of_part(part: FusedPart, rows: int, model: ModelConfig) -> list[tuple[int, int]]:
    """Which rows of the merged tensor, of so many, a part is, in order."""
    d, groups = model.head_size, model.query_groups
    if part == "vocabulary":
        assert model.vocab_size is not None
        return [(0, model.vocab_size)]
    if part in ("gate", "up"):
        f = model.ffn_hidden_size
        return [(0, f) if part == "gate" else (f, 2 * f)]
    if part == "whole":
        return [(0, rows)]
    heads = model.num_attention_heads // groups
    first, size = {"q": (0, heads), "k": (heads, 1), "v": (heads + 1, 1)}[part]
    block = (heads + 2) * d
    return [(g * block + first * d, g * block + (first + size) * d) for g in range(groups)]


def merged_rows(part: FusedPart, model: ModelConfig) -> int | None:
    """How many rows the merged tensor of a part must have; None where the logical tensor says it, or padding does."""
    if part in ("q", "k", "v"):
        return (model.num_attention_heads + 2 * model.query_groups) * model.head_size
    return 2 * model.ffn_hidden_size if part in ("gate", "up") else None
