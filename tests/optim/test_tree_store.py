"""Bits that do not depend on the number of data-parallel ranks: losses, norms, weights and moments of whole runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.costs.rank_costs import state_bytes
from megatron_hammer.optim.tree_store import TreeStore
from tests.distributed import run_distributed
from tests.model.tiny import build, make_context, merged, tiny_config, train


def tree_config(**changes: Any) -> Config:
    return tiny_config(**{"train__deterministic_reduction": "tree", "train__micro_batch_size": 1} | changes)


def same(one: Any, other: Any) -> None:
    """Reports and logical weights of two layouts, bit for bit."""
    assert one[0][0] == other[0][0], "losses and gradient norms"
    ours, theirs = merged([weights for _, weights in one]), merged([weights for _, weights in other])
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "tp, changes",
    [
        (1, {}),
        (1, {"train__precision": "bf16", "kernels__adamw": "torch"}),
        (1, {"train__global_batch_size": 12, "model__tie_word_embeddings": True}),  # 12 leaves: no power of two
        (2, {"parallel__sequence_parallel": True, "data__attention_mask": "document"}),
    ],
)
def test_data_parallel_ranks_change_no_bit(tp: int, changes: dict[str, Any]) -> None:
    config, steps = tree_config(parallel__tensor_model_parallel_size=tp, **changes), 3
    one, *others = (run_distributed(tp * dp, train, config, steps) for dp in (1, 2, 4))
    if changes == {}:
        others.append(run_distributed(8, train, config, steps))
    for other in others:
        same(one, other)


def test_copies_of_keys_and_values_are_summed_alike() -> None:
    """TP 4 on 2 query groups, DP 1 and 2: what is summed over tensor-parallel ranks is cut into other shards."""
    config = tree_config(parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True)
    same(*(run_distributed(4 * dp, train, config, 2) for dp in (1, 2)))


def test_the_plain_store_does_change_bits() -> None:
    """So that the tests above test something."""
    config = tiny_config(train__micro_batch_size=1)
    one, four = (run_distributed(dp, train, config, 3) for dp in (1, 4))
    assert one[0][0] != four[0][0]


def test_what_the_tree_costs_in_memory() -> None:
    """Beside the plain store: log2 of the accumulated micro-batches in buffers of gradients, and none without."""
    for accumulated, buffers in ((1, 0), (2, 1), (8, 3)):  # and so does the forecast
        config = tree_config(train__global_batch_size=accumulated)
        _, optimizer = build(config, make_context(config))
        store = optimizer.store
        assert isinstance(store, TreeStore)
        most = 0
        for i in range(accumulated):
            store.begin(i == 0, i == accumulated - 1)
            most = max(most, len(store.waiting) + len(store._free))
        assert most == buffers, accumulated
        assert state_bytes(config, 1)["gradients"] == (1 + buffers) * store.grads.nbytes


@pytest.mark.parametrize(
    "change, ranks, named",
    [
        ({"train__global_batch_size": 12}, 3, "data_parallel_size=3"),
        ({"parallel__pipeline_model_parallel_size": 2}, 2, "pipeline_model_parallel_size=2"),
        ({"parallel__context_parallel_size": 2}, 2, "context_parallel_size=2"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(change: dict[str, Any], ranks: int, named: str) -> None:
    assert any("kernels.deterministic=true" in note for note in tree_config().notes())
    with pytest.raises(ConfigError, match=rf"E205.*deterministic_reduction=tree.*{named}"):
        tree_config(**change).validate(ranks)
