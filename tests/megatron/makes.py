"""Checkpoints as Megatron-LM writes them, made from logical tensors by its documented layouts, without its code.

The names, shapes and orders are those of NVIDIA/Megatron-LM of 2026-08-22: ``GPTModel.state_dict`` under the layer
specs of Transformer Engine and the local ones, ``training/checkpointing.py`` for the files, ``core/dist_checkpointing``
and torch's own metadata classes for ``torch_dist``.
"""

from __future__ import annotations

import enum
import pickle
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.config import ModelConfig
from megatron_hammer.model.parameters import logical_shapes
from tests.checkpoint.layouts import tiny_model

POISON = float("nan")


def model_for_tests(**changes: Any) -> ModelConfig:
    """Two layers, 8 heads on 2 groups, a vocabulary of 131."""
    return tiny_model(num_layers=2, **changes)


def logical_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Logical tensors in bf16, of a size that makes every part matter."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in logical_shapes(model).items():
        noise = torch.randn(shape, generator=generator)
        weight = noise * shape[1] ** -0.5 if len(shape) == 2 else noise * 0.1 + (0 if name.endswith("bias") else 1)
        found[name] = weight.to(torch.bfloat16)
    return found


def args_of(model: ModelConfig, tp: int = 1, pp: int = 1, recent: bool = False, **changes: Any) -> Namespace:
    """The arguments of the run that trained it, among others that say nothing of the model.

    Args:
        recent: by their names of 2026, which are those of its TransformerConfig.
    """
    every = model.attention_output_bias
    values = {
        "num_layers": model.num_layers, "hidden_size": model.hidden_size, "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads, "group_query_attention": True,
        "num_query_groups": model.query_groups, "kv_channels": model.head_size, "norm_epsilon": model.norm_eps,
        "rotary_base": 10000, "rotary_percent": 1.0, "rotary_interleaved": False, "position_embedding_type": "rope",
        "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": every, "add_qkv_bias": model.qkv_bias,
        "qk_layernorm": model.qk_norm, "max_position_embeddings": 64, "num_experts": None, "init_method_std": 0.02,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings, "window_size": None,
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "vocab_size": None,
        "padded_vocab_size": 256, "optimizer": "adam", "lr": 5e-4, "save": Path("/somewhere"),
    }  # fmt: skip
    values |= changes
    if recent:
        values["layernorm_epsilon"] = values.pop("norm_epsilon")
    return Namespace(**values)


def padded_rows(model: ModelConfig, tp: int) -> int:
    """Rows of the vocabulary with Megatron-LM's padding (here to a multiple of 256 x TP, so that there is some)."""
    assert model.vocab_size is not None
    return -(-model.vocab_size // (256 * tp)) * 256 * tp


def merged(model: ModelConfig, logical: dict[str, Tensor], local_spec: bool, padded: int) -> dict[str, Tensor]:
    """Megatron-LM's tensors before they are cut over ranks; layers by their number over the whole model."""
    d, groups = model.head_size, model.query_groups
    queries = model.num_attention_heads // groups

    def pad(weight: Tensor) -> Tensor:
        return torch.cat([weight, torch.full((padded - len(weight), weight.shape[1]), POISON, dtype=weight.dtype)])

    def fuse(layer: str, kind: str) -> Tensor:
        q, k, v = (logical[f"{layer}self_attn.{x}_proj.{kind}"] for x in "qkv")
        rows = []
        for g in range(groups):
            rows += [q[g * queries * d : (g + 1) * queries * d], k[g * d : (g + 1) * d], v[g * d : (g + 1) * d]]
        return torch.cat(rows)

    out = {"embedding.word_embeddings.weight": pad(logical["model.embed_tokens.weight"])}
    for i in range(model.num_layers):
        theirs, layer = f"decoder.layers.{i}.", f"model.layers.{i}."
        norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
        if not local_spec:
            norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
        out[theirs + norms[0]] = logical[layer + "input_layernorm.weight"]
        out[theirs + norms[1]] = logical[layer + "post_attention_layernorm.weight"]
        out[theirs + "self_attention.linear_qkv.weight"] = fuse(layer, "weight")
        out[theirs + "self_attention.linear_proj.weight"] = logical[layer + "self_attn.o_proj.weight"]
        gate_up = [logical[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")]
        out[theirs + "mlp.linear_fc1.weight"] = torch.cat(gate_up)
        out[theirs + "mlp.linear_fc2.weight"] = logical[layer + "mlp.down_proj.weight"]
        if model.qkv_bias:
            out[theirs + "self_attention.linear_qkv.bias"] = fuse(layer, "bias")
        if model.attention_output_bias:
            out[theirs + "self_attention.linear_proj.bias"] = logical[layer + "self_attn.o_proj.bias"]
            biases = [logical[f"{layer}mlp.{x}_proj.bias"] for x in ("gate", "up")]
            out[theirs + "mlp.linear_fc1.bias"] = torch.cat(biases)
            out[theirs + "mlp.linear_fc2.bias"] = logical[layer + "mlp.down_proj.bias"]
        if model.qk_norm:
            for x in "qk":
                out[theirs + f"self_attention.{x}_layernorm.weight"] = logical[layer + f"self_attn.{x}_norm.weight"]
    out["decoder.final_layernorm.weight"] = logical["model.norm.weight"]
    if not model.tie_word_embeddings:
        out["output_layer.weight"] = pad(logical["lm_head.weight"])
    return out


def shard(name: str, whole: Tensor, rank: int, tp: int) -> Tensor:
    """A tensor-parallel rank's part."""
    if "norm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return whole.clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(tp, dim=1)[rank].clone()
    if "linear_fc1" in name:
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
    return whole.chunk(tp)[rank].clone()


@contextmanager
def megatron_enum() -> Iterator[Any]:
    """A class of Megatron-LM's own, so that pickles name it as they do there."""
    names = ["megatron", "megatron.core", "megatron.core.transformer", "megatron.core.transformer.enums"]
    modules = {name: types.ModuleType(name) for name in names}
    backend = enum.Enum("AttnBackend", {"flash": 1, "auto": 5}, module=names[-1])
    modules[names[-1]].AttnBackend = backend  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield backend
    finally:
        for name in names:
            del sys.modules[name]


Change = Callable[[dict[str, Any], int, int], None]


def write_legacy(
    folder: Path, model: ModelConfig, logical: dict[str, Tensor], tp: int = 1, pp: int = 1, vpp: int = 1,
    local_spec: bool = False, change: Change = lambda state, t, p: None, **args: Any,
) -> Path:  # fmt: skip
    """``iter_0000100/mp_rank_*`` and the tracker above; returns the run's folder."""
    whole = merged(model, logical, local_spec, padded_rows(model, tp))
    per_chunk = model.num_layers // (pp * vpp)
    for t in range(tp):
        for p in range(pp):
            state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": 100}
            for v in range(vpp):
                first = (v * pp + p) * per_chunk
                part: dict[str, Any] = {}
                for name, tensor in whole.items():
                    piece, rest = shard(name, tensor, t, tp), name
                    if name.startswith("decoder.layers."):
                        number = int(name.split(".")[2])
                        if not first <= number < first + per_chunk:
                            continue
                        rest = ".".join(["decoder.layers", str(number - first), *name.split(".")[3:]])
                    elif (p or v) if name.startswith("embedding") else (p < pp - 1 or v < vpp - 1):
                        continue
                    part[rest] = piece
                    if rest.endswith("linear_qkv.weight"):
                        part[rest.replace("weight", "_extra_state")] = None
                if model.tie_word_embeddings and pp > 1 and p == pp - 1 and v == vpp - 1:
                    part["output_layer.weight"] = shard("x", whole["embedding.word_embeddings.weight"], t, tp)
                state["model" if vpp == 1 else f"model{v}"] = part
            rng = {"np_rng_state": np.random.RandomState(0).get_state(), "random_rng_state": (3, (1, 2), None)}
            state["rng_state"] = [rng]
            state["optimizer"] = {"optimizer": {"state": {}}}
            name = f"mp_rank_{t:02d}" if pp == 1 else f"mp_rank_{t:02d}_{p:03d}"
            (folder / "iter_0000100" / name).mkdir(parents=True)
            with megatron_enum() as backend:
                state["args"] = args_of(model, tp, pp, attention_backend=backend.auto, **args)
                change(state, t, p)
                torch.save(state, folder / "iter_0000100" / name / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("100")
    return folder


def write_distributed(
    folder: Path, model: ModelConfig, logical: dict[str, Tensor], tp: int = 1, stacked: bool = True,
    halves: bool = False, optimizer: str = "", states: dict[str, dict[str, Tensor]] | None = None,
    change: Change = lambda state, t, p: None, recent: bool = False, **args: Any,
) -> Path:  # fmt: skip
    """A ``torch_dist`` checkpoint: a file a TP rank, chunks of global tensors, metadata of torch's own classes.

    Args:
        recent: as since 2026-07: what all ranks share is an object among the chunks.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    iteration = int(folder.name[5:]) if folder.name.startswith("iter_") else 100
    folder.mkdir(parents=True)
    files = [(folder / f"__{t}_0.distcp").open("wb") for t in range(tp)]
    entries: dict[str, Any] = {"rng_state/shard_0_1": BytesStorageMetadata()}
    places: dict[Any, Any] = {}

    def store(key: str, chunks: list[tuple[tuple[int, ...], Tensor]], size: tuple[int, ...]) -> None:
        described = []
        for number, (offsets, part) in enumerate(chunks):
            file = files[number % tp]
            start = file.tell()
            torch.save(part.clone(), file)
            index = MetadataIndex(key, torch.Size(offsets), number)
            places[index] = _StorageInfo(Path(file.name).name, start, file.tell() - start)
            described.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(part.shape)))
        properties = TensorProperties(dtype=chunks[0][1].dtype)
        entries[key] = TensorStorageMetadata(properties, torch.Size(size), described)

    kinds = {"": logical} | {f"optimizer.state.{kind}.": tensors for kind, tensors in (states or {}).items()}
    for kind, tensors_of_kind in kinds.items():
        layers: dict[str, list[Tensor]] = {}
        for name, tensor in merged(model, tensors_of_kind, False, padded_rows(model, tp)).items():
            if stacked and name.startswith("decoder.layers."):
                layers.setdefault("decoder.layers." + ".".join(name.split(".")[3:]), []).append(tensor)
                continue
            parts = {"": tensor}
            if halves and "linear_fc1.weight" in name:
                parts = dict(zip(("_w", "_v"), tensor.chunk(2), strict=True))
            for suffix, part in parts.items():
                store(kind + name + suffix, _cut(name, part, tp), tuple(part.shape))
        for name, tensors in layers.items():
            chunks = [((i, *o), part[None]) for i, tensor in enumerate(tensors) for o, part in _cut(name, tensor, tp)]
            store(kind + name, chunks, (len(tensors), *tensors[0].shape))
    if optimizer:
        store(optimizer, [((0,), torch.zeros(4))], (4,))
    with megatron_enum() as backend:
        state: dict[str, Any] = {"iteration": iteration, "checkpoint_version": 3.0}
        state["args"] = args_of(model, tp, attention_backend=backend.flash, recent=recent, **args)
        change(state, 0, 0)
        if recent:
            key, start = "common_state/shard_0_1", files[0].tell()
            torch.save([state], files[0])
            entries[key] = BytesStorageMetadata()
            places[MetadataIndex(key)] = _StorageInfo(Path(files[0].name).name, start, files[0].tell() - start)
        else:
            torch.save(state, folder / "common.pt")
    for file in files:
        file.close()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(entries, None, places)))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def _cut(name: str, tensor: Tensor, tp: int) -> list[tuple[tuple[int, ...], Tensor]]:
    """Chunks with their offsets: halves of gate and up apart, as ``apply_swiglu_sharded_factory`` has them."""
    if tp == 1 or "norm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return [((0,) * tensor.ndim, tensor)]
    axis = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    parts = tensor.chunk(tp * (2 if "linear_fc1" in name else 1), dim=axis)
    offsets, found = 0, []
    for part in parts:
        found.append((tuple(offsets if i == axis else 0 for i in range(tensor.ndim)), part))
        offsets += part.shape[axis]
    return found
