"""The flat store: its layout, what layers are given, and what a rank counts."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_hammer.config import Config
from megatron_hammer.model.llama import build_stage, gradients_of
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.optim import store as store_module
from megatron_hammer.optim.buckets import bucket_elements, lay_out_buckets
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.parallel.collectives import all_gather_into
from megatron_hammer.parallel.context import Group, ParallelContext
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.model.tiny import build, make_context, rank_batches, tiny_config


@pytest.mark.parametrize("dp", [1, 2, 3, 8])
def test_layout_properties(dp: int) -> None:
    """Parameters do not overlap, buckets tile the buffer, shards are equal and aligned."""
    rng = np.random.default_rng(dp)
    for _ in range(50):
        sizes = rng.integers(1, 5000, rng.integers(1, 20)).tolist()
        offsets, buckets = lay_out_buckets(sizes, int(rng.integers(1, 8000)), dp)
        assert sorted(i for b in buckets for i in b.parameters) == list(range(len(sizes)))
        assert buckets[0].start == 0 and all(a.stop == b.start for a, b in pairwise(buckets))
        for b in buckets:
            assert (b.stop - b.start) % (64 * dp) == 0
            at = b.start
            for i in b.parameters:
                assert offsets[i] == at
                at += sizes[i]
            assert at <= b.stop


def _store(config: Config) -> FlatStore:
    table = parameter_table(config.model, config.placement())
    return FlatStore(table, torch.float32, ParallelContext.single(), config.parallel.gradient_bucket_bytes)


def test_weights_are_views_of_one_buffer_in_the_order_of_the_table() -> None:
    config, ctx = tiny_config(), ParallelContext.single()
    store = _store(config)
    model = build_stage(config.model, ctx, store=store)
    store.check(model)
    buffer = store.params.untyped_storage().data_ptr()
    assert all(weight.untyped_storage().data_ptr() == buffer for weight in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [row.name for row in store.table]
    with pytest.raises(AssertionError, match="more weights than"):
        build_stage(config.model, ctx, store=store)
    with pytest.raises(AssertionError, match=r"embedding.weight is \(384, 64\) in the model, \(384, 32\) in the table"):
        build_stage(config.model, ctx, store=_store(tiny_config(model__hidden_size=32)))
    with pytest.raises(AssertionError, match="must name the same tensors"):
        store.check(build_stage(config.model, ctx))


def test_a_gradient_is_written_over_at_first_and_then_added() -> None:
    store = _store(tiny_config())
    gradient, one = store.gradients[0], torch.ones(store.table[0].shape)

    def write(place: torch.Tensor, begun: bool) -> None:
        place.copy_(place + one if begun else one)

    store.grads.fill_(torch.nan)
    store.begin(first=True, last=False)
    assert not gradient.begun
    gradient.add(write, last=False)  # a head, say, and then the embedding that shares its weight
    gradient.add(write)
    assert (gradient.main_grad == 2).all()
    with pytest.raises(AssertionError, match=r"embedding.weight got a gradient after its last one"):
        gradient.add(write)
    store.begin(first=False, last=True)
    assert gradient.begun
    write(gradient.main_grad, True)  # as a graph or a library does
    gradient.ready()
    assert (gradient.main_grad == 4).all()
    with pytest.raises(AssertionError, match="no gradient for"):
        store.reduce()


def test_no_attribute_hangs_on_a_weight() -> None:
    """Nor a hook."""
    config, ctx = tiny_config(), ParallelContext.single()
    model, optimizer = build(config, ctx)
    optimizer.store.begin(first=True, last=True)
    batch = rank_batches(config, 1, ctx)[0]
    model(batch.tokens, batch.labels).sum().backward()
    optimizer.store.reduce()
    for weight in model.parameters():
        assert not vars(weight) and weight.grad is None
        assert not weight._backward_hooks and not weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    assert sum(len(gradients_of(layer)) for layer in model.layers.values()) == 6 * config.model.num_layers


def _gradient_norm(rank: int, config: Config) -> tuple[float, Any]:
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    batches = rank_batches(config, 1, ctx)
    for i, batch in enumerate(batches):
        optimizer.store.begin(first=i == 0, last=i == len(batches) - 1)
        model(batch.tokens, batch.labels).sum().backward()
    return float(optimizer.clip_grad_norm(1.0)), None


class _Lazy:
    """A gather that happens when somebody waits for it, and not before."""

    def __init__(self, waited: list[int], full: torch.Tensor, *rest: Any) -> None:
        self.waited, self.full, self.rest = waited, full, rest

    def wait(self) -> None:
        all_gather_into(self.full, *self.rest).wait()
        self.waited.append(self.full.data_ptr())


def _weights_after(rank: int, config: Config) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Weights after two steps, and which buckets were waited for: in the update, and before each part of a forward."""
    ctx, waited = make_context(config), list[int]()
    with mock.patch.object(store_module, "all_gather_into", partial(_Lazy, waited)):
        model, optimizer = build(config, ctx)
        store, batches = optimizer.store, rank_batches(config, 1, ctx)
        order = [b.start * 4 + store.params.data_ptr() for b in store.buckets]
        seen: list[list[int]] = []
        for step in (1, 2):
            train_step(model, optimizer, batches, config, step, ctx)
            seen.append([order.index(at) for at in waited])
            waited.clear()
        with torch.no_grad():
            for part in ("embedding", "layers.0"):
                store.acquire(part)
                seen.append([order.index(at) for at in waited])
        store.wait()
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}, seen


def test_forward_waits_for_a_bucket_when_it_needs_it() -> None:
    """The gather of updated weights runs beside the next forward; equal bits, whether it is waited for at once."""
    late = run_distributed(2, _weights_after, tiny_config())
    at_once = run_distributed(2, _weights_after, tiny_config(parallel__overlap_param_gather=False))
    for (weights, seen), (expected, seen_at_once) in zip(late, at_once, strict=True):
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
        last = max(seen[1])  # buckets are numbered from the head to the embedding
        assert seen[0] == [] and seen[1] == list(range(last, -1, -1)), "each once, in the order of forward"
        assert seen[2] == [last] and 0 < len(seen[3]) < last, "what the embedding needs, then what the next layer does"
        assert seen_at_once[0] and not seen_at_once[2]


@pytest.mark.parametrize("overlap, device", [(True, "cpu"), (False, "cpu"), (True, "meta"), (False, "meta")])
def test_a_bucket_is_reduced_beside_backward(overlap: bool, device: str) -> None:
    """On a CPU one at a time, since what arrives needs room; elsewhere all that are ready; or each waited for."""
    config, events = tiny_config(), list[tuple[str, int]]()
    ctx = ParallelContext(torch.device(device), dp=Group(0, 2), samples=Group(0, 2))
    table = parameter_table(config.model, config.placement())
    store = FlatStore(table, torch.float32, ctx, 40_000, overlap_reduce=overlap)

    def start(shard: torch.Tensor, full: torch.Tensor, group: Group, room: torch.Tensor | None) -> Any:
        number = sum(kind == "start" for kind, _ in events)
        events.append(("start", number))
        return mock.Mock(wait=lambda: events.append(("wait", number)))

    with mock.patch.object(store_module, "reduce_scatter_into", start):
        for last in (False, True):
            store.begin(first=not last, last=last)
            assert not events, "micro-batches before the last one are summed by the rank itself"
            for gradient in reversed(store.gradients):
                gradient.add(lambda place, begun: None)
    kinds, count = [kind for kind, _ in events], len(store.buckets)
    assert count > 3 and kinds.count("start") == count
    most, under_way = 0, set[int]()
    for kind, number in events:
        under_way = under_way | {number} if kind == "start" else under_way - {number}
        most = max(most, len(under_way))
    assert most == (count if overlap and device == "meta" else 1)
    assert (kinds[-1] == "start") == overlap, "the last one is under way when backward is over"


@pytest.mark.parametrize("tp, sp", [(2, True), (4, True), (8, False), (8, True)])
def test_norm_counts_copies_once(tp: int, sp: bool) -> None:
    """Query groups held by several ranks and norms under sequence parallelism: the norm is that of one process."""
    expected, _ = _gradient_norm(0, tiny_config())
    config = tiny_config(parallel__tensor_model_parallel_size=tp, parallel__sequence_parallel=sp)
    for norm, _ in run_distributed(tp, _gradient_norm, config):
        assert norm == pytest.approx(expected, rel=1e-6)


def test_a_shard_does_not_shrink_with_many_ranks() -> None:
    sizes = [bucket_elements(64 * 2**20, dp) for dp in (1, 8, 64, 128, 512, 4096)]
    assert sizes[:3] == [2**24] * 3 and [n * 4 // dp for n, dp in zip(sizes[3:], (128, 512, 4096))] == [2**20] * 3
