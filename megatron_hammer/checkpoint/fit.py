"""Checks that a checkpoint belongs to a model: before a run starts, and before a load reads any tensor.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_hammer.base.errors import CheckpointError
from megatron_hammer.checkpoint.kinds import shapes_of, style_of
from megatron_hammer.checkpoint.manifest import Manifest, saved_model
from megatron_hammer.config import ModelConfig
from megatron_hammer.model.parameters import logical_shapes


def check_fits(manifest: Manifest, model: ModelConfig, kinds: Collection[str]) -> None:
    """Raise ``CheckpointError`` unless the checkpoint is one of this very model and holds all ``kinds``."""
    where = str(manifest.folder)
    for kind in sorted(set(kinds) - manifest.kinds):
        raise CheckpointError(
            12,
            where,
            f"holds no {kind}, only {', '.join(sorted(manifest.kinds))}",
            f"take its weights into a new run with checkpoint.init_from={where}",
        )
    ours, theirs = architecture(model), architecture(saved_model(manifest))
    for name, value in ours.items():
        if value != theirs[name]:
            raise CheckpointError(
                14,
                f"model.{name}={value}",
                f"must be {theirs[name]} as in the checkpoint {where}",
                f"set model.{name} accordingly or use another checkpoint",
            )
    shapes = logical_shapes(model)
    for tensor in manifest.tensors:
        if tensor.name not in shapes:
            raise CheckpointError(13, f"{where}: {tensor}", "is not a tensor of this model", "use another checkpoint")
    style = style_of(manifest.config)
    for kind in kinds:
        for name, shape in shapes_of(model, kind, style).items():
            at = manifest.index.get((name, kind))
            found = None if at is None else manifest.tensors[at].shape
            if found != shape:
                rule = "is missing" if found is None else f"has shape {list(found)} where the model has {list(shape)}"
                raise CheckpointError(13, f"{where}: {kind} {name}", rule, "use another checkpoint")


def check_style(manifest: Manifest, style: str) -> None:
    """Refuse to go on from a checkpoint with another optimizer: its moments are not there."""
    saved = style_of(manifest.config)
    if saved != style:
        raise CheckpointError(
            12,
            f"optimizer.style={style}",
            f"has other moments than {saved}, which wrote the checkpoint {manifest.folder}",
            f"set optimizer.style={saved}; or begin a new run with its weights and without its moments: "
            f"checkpoint.init_from={manifest.folder} and another train.output",
        )


def architecture(model: ModelConfig) -> dict[str, Any]:
    """What two configs must share for the same weights to mean the same function; most of it shows in no shape."""
    return {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.query_groups,
        "head_dim": model.head_size,
        "vocab_size": model.vocab_size,
        "norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": model.rope_scaling,
        "tie_word_embeddings": model.tie_word_embeddings,
        "qkv_bias": model.qkv_bias,
        "attention_output_bias": model.attention_output_bias,
        "mlp_bias": model.mlp_bias,
        "qk_norm": model.qk_norm,
    }
