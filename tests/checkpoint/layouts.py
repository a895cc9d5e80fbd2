"""Simulated ranks: what each rank of a layout would hold, without starting any process.

The expected local tensors are filled by hand from the parameter table, with poison where it names no slice, so that
vocabulary padding that reached a file or was read from one would be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.files import staging_path
from megatron_hammer.checkpoint.commit import commit, write_rank
from megatron_hammer.checkpoint.dtypes import PRECISION_DTYPES
from megatron_hammer.checkpoint.folder import step_name
from megatron_hammer.checkpoint.manifest import Manifest, SavedLayout, TokenizerFiles, read_manifest
from megatron_hammer.checkpoint.read import load_shards
from megatron_hammer.checkpoint.write import slices_to_write, stage_tokenizer
from megatron_hammer.config import ModelConfig, RopeScaling, config_from_tree, config_to_tree
from megatron_hammer.model.parameters import Parameter, logical_shapes, parameter_table
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import place
from megatron_hammer.parallel.sharding import Shard

KINDS = ("weight", "exp_avg", "exp_avg_sq")
Logical = dict[tuple[str, str], Tensor]


def tiny_model(**changes: Any) -> ModelConfig:
    """8 heads on 2 groups (copies of keys and values from TP 4 on), an odd vocabulary, one layer."""
    fields: dict[str, Any] = {
        "hidden_size": 16, "ffn_hidden_size": 24, "num_layers": 1, "num_attention_heads": 8, "num_query_groups": 2,
        "head_dim": 4,
        "vocab_size": 131, "max_position_embeddings": 64,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


LLAMA3_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def config_tree(model: ModelConfig, **train: Any) -> dict[str, Any]:
    """A resolved config tree around a model."""
    tree = {"model": vars(model) | {"rope_scaling": None}, "train": {"precision": "bf16", **train}}
    if model.rope_scaling is not None:
        tree["model"]["rope_scaling"] = vars(model.rope_scaling)
    return config_to_tree(config_from_tree(tree))


def random_logical(model: ModelConfig, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Logical:
    """Every logical tensor, fp32."""
    generator = torch.Generator().manual_seed(seed)
    shapes = logical_shapes(model)
    return {(n, k): torch.randn(s, generator=generator) for k in kinds for n, s in shapes.items()}


def fill_local(parameter: Parameter, kind: str, tensors: Logical, poison: float) -> Tensor:
    """One local tensor, flat; ``poison`` where it is padding."""
    local = torch.full(parameter.shape, poison)
    for s in parameter.slices:
        logical = tensors[s.tensor, kind]
        part = logical[s.rows[0] : s.rows[1]]
        local[s.local_row : s.local_row + s.num_rows] = part if s.cols is None else part[:, s.cols[0] : s.cols[1]]
    return local.view(-1)


def rank_shards(
    model: ModelConfig,
    rank: int,
    tp: int,
    dp: int,
    tensors: Logical,
    kinds: tuple[str, ...] = KINDS,
    poison: float = 1e9,
) -> list[Shard]:
    """What rank ``rank`` of [dp, tp] holds: its equal part of the concatenated local parameters, cut anywhere."""
    table = parameter_table(model, place(model, rank % tp, tp))
    total = sum(p.numel for p in table)
    size = -(-total // dp)
    first, last = size * (rank // tp), min(size * (rank // tp + 1), total)
    shards, at = [], 0
    for parameter in table:
        start, stop = max(first - at, 0), min(last - at, parameter.numel)
        if start < stop:
            local = {k: fill_local(parameter, k, tensors, poison)[start:stop].clone() for k in kinds}
            shards.append(Shard(parameter, start, stop, local))
        at += parameter.numel
    return shards


def write_layout(
    folder: Path,
    model: ModelConfig,
    tensors: Logical,
    tp: int = 1,
    dp: int = 1,
    step: int = 7,
    tokenizer: Any = None,
    precision: str = "bf16",
) -> Manifest:
    """A checkpoint as the ranks of a layout write it, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = tuple(dict.fromkeys(kind for _, kind in tensors))
    target = folder / step_name(step)
    staging = staging_path(target)
    staging.mkdir()
    for rank in range(tp * dp):
        write_rank(staging, rank, slices_to_write(rank_shards(model, rank, tp, dp, tensors, kinds)))
    files: TokenizerFiles | None = None if tokenizer is None else stage_tokenizer(tokenizer, staging)
    commit(staging, target, step=step, model=model, config_tree=config_tree(model, precision=precision),
           state={"consumed_samples": 3}, weights_dtype=PRECISION_DTYPES[precision],
           layout=SavedLayout(tp * dp, tp, dp), tokenizer=files)  # fmt: skip
    return read_manifest(target)


def load_layout(
    manifest: Manifest, model: ModelConfig, tp: int, dp: int, kinds: tuple[str, ...] = KINDS
) -> list[list[Shard]]:
    """What each rank of a layout loads into NaN-filled shards."""
    nothing = {(n, k): torch.full(s, torch.nan) for k in kinds for n, s in logical_shapes(model).items()}
    ranks = []
    for rank in range(tp * dp):
        shards = rank_shards(model, rank, tp, dp, nothing, kinds, poison=-5.0)
        load_shards(manifest, shards, model=model, kinds=kinds, ctx=ParallelContext.single())
        ranks.append(shards)
    return ranks


class FakeTokenizer:
    """Files and a fingerprint: all that saving needs."""

    fingerprint, always_converts = "0123456789abcdef" * 2, True

    def save_files(self, directory: Path) -> None:
        (directory / "tokenizer.model").write_bytes(bytes(range(256)))
        (directory / "tokenizer_config.json").write_text('{"a": 1}')
