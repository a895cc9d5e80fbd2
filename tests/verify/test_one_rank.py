"""One rank of a large layout: what the program keeps and sends is what the formulas say, to the byte and the call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_hammer.config import config_from_tree
from megatron_hammer.costs import rank_costs
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.parallel.collectives import all_reduce
from megatron_hammer.train.build import build_stages
from megatron_hammer.verify import one_rank
from megatron_hammer.verify.one_rank import compare_rank
from tests.model.tiny import tiny_config

LAYOUTS = [  # changes, data-parallel ranks; together every pair of values that two settings can have
    ({}, 1),
    (dict(train__precision="bf16", data__attention_mask="document", model__tie_word_embeddings=True), 3),
    (dict(parallel__tensor_model_parallel_size=2, train__recompute="full", train__recompute_layers=1), 2),
    (dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True, train__precision="bf16",
          train__recompute="selective"), 4),
    (dict(parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True, train__recompute="full",
          data__attention_mask="document"), 1),
    (dict(parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True, train__precision="bf16",
          train__recompute="full", train__recompute_layers=1, parallel__tp_comm_overlap="chunks"), 2),
    (dict(parallel__context_parallel_size=2), 2),
    (dict(parallel__context_parallel_size=4, parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True,
          train__precision="bf16", train__recompute="selective", data__attention_mask="document"), 2),
    (dict(parallel__context_parallel_size=2, parallel__tensor_model_parallel_size=4, train__recompute="full",
          train__recompute_layers=1, train__precision="bf16", data__attention_mask="document"), 1),
    (dict(parallel__tensor_model_parallel_size=8, train__precision="fp16", model__tie_word_embeddings=True), 2),
    (dict(parallel__tensor_model_parallel_size=8, parallel__sequence_parallel=True, kernels__loss_chunk_tokens=24), 64),
    (dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True, model__tie_word_embeddings=True,
          parallel__pipeline_model_parallel_size=2, data__attention_mask="document", model__num_layers=3), 2),
    (dict(parallel__pipeline_model_parallel_size=3, parallel__virtual_pipeline_stages=2, model__num_layers=7,
          train__recompute="full", train__recompute_layers=2, model__tie_word_embeddings=True), 1),
    (dict(train__deterministic_reduction="tree", parallel__tensor_model_parallel_size=4,
          parallel__sequence_parallel=True), 2),
    (dict(parallel__shard="gradients", parallel__shard_size=2, train__precision="bf16"), 4),
    (dict(parallel__shard="weights", parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True,
          train__recompute="full", model__tie_word_embeddings=True), 3),
    (dict(parallel__shard="weights", parallel__reshard_after_forward=False, parallel__shard_size=4,
          parallel__tensor_model_parallel_size=2, optimizer__style="muon", optimizer__newton_schulz="fp32"), 8),
    (dict(parallel__tensor_model_parallel_size=4, parallel__pipeline_model_parallel_size=2, optimizer__style="muon",
          optimizer__muon_per_head=True, train__precision="bf16"), 3),
    (dict(optimizer__style="muon"), 2),
]  # fmt: skip


@pytest.mark.parametrize("changes, dp", LAYOUTS)
def test_the_formulas_are_exact(changes: dict[str, Any], dp: int) -> None:
    config = tiny_config(train__micro_batch_size=2, train__global_batch_size=6 * dp, **changes)
    parallel = config.parallel
    world = dp * parallel.tensor_model_parallel_size * parallel.context_parallel_size
    world *= parallel.pipeline_model_parallel_size
    config.validate(world)
    for rank in {0, world // 2, world - 1}:
        compared = compare_rank(config, world, rank)
        assert not compared.differs, compared.table()
    assert not dist.is_initialized()


def test_a_model_of_70b_on_4096_ranks() -> None:
    """Four of its 80 layers: its layers are equal, and the test is short."""
    model = dict(hidden_size=8192, ffn_hidden_size=28672, num_layers=4, num_attention_heads=64, num_query_groups=8,
                 vocab_size=128_256, max_position_embeddings=8192)  # fmt: skip
    config = config_from_tree({
        "model": model, "data": dict(seq_length=8192),
        "train": dict(precision="bf16", micro_batch_size=1, global_batch_size=2048, num_steps=1),
        "parallel": dict(tensor_model_parallel_size=8, sequence_parallel=True),
    })  # fmt: skip
    compared = compare_rank(config, 4096, 77)
    assert not compared.differs, compared.table()
    sent = {(c.axis, c.kind): n for c, n in compared.counted.collectives.items() if c.bytes == 8192 * 8192 * 2}
    assert sent == {("tp", "all-gather"): 4 * (6 * 4 + 2), ("tp", "reduce-scatter"): 4 * (4 * 4 + 2)}  # 4 micro-batches


def _one_more(store: FlatStore, real: Callable[[FlatStore], None]) -> None:
    all_reduce(torch.zeros(8, device="meta"), store.ctx.dp)
    real(store)


@pytest.mark.parametrize(
    "fault, named",
    [
        (mock.patch.object(FlatStore, "reduce", lambda s, real=FlatStore.reduce: _one_more(s, real)),
         "dp: all-reduce of 32"),
        (mock.patch.object(FlatStore, "gather", lambda s: None), "dp: all-gather"),
        (mock.patch.object(rank_costs, "ROW_STATISTICS", 8), "tp: all-gather"),
        (mock.patch.object(one_rank, "build_stages", lambda c, *a, **k: build_stages(with_full_recompute(c), *a, **k)),
         "bytes of activations"),
    ],
)  # fmt: skip
def test_a_difference_is_named(fault: Any, named: str) -> None:
    config = tiny_config(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
    with fault:
        compared = compare_rank(config, 4, 3)
    assert compared.differs
    assert any(row[0].startswith(named) for row in compared.rows if row[3]), compared.table()


def with_full_recompute(config: Any) -> Any:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, recompute="full"))
