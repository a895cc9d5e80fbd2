"""Gradients and weights divided over the ranks (ZeRO 2 and 3): equal to one process, and no more memory than stated."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.costs.rank_buffers import arriving_bytes
from megatron_hammer.costs.rank_costs import state_bytes
from megatron_hammer.model.residence import uses_of
from megatron_hammer.optim.buckets import Bucket
from megatron_hammer.optim.buffers import Buffers
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.step import train_step
from tests.costs.buffers import buffer_bytes
from tests.distributed import run_distributed
from tests.model.tiny import build, make_context, merged, rank_batches, tiny_config, train
from tests.optim.checkpoints import load_two_steps, save_two_steps

STEPS = 5
TP2 = dict(parallel__tensor_model_parallel_size=2)
SP2 = dict(TP2, parallel__sequence_parallel=True)
GRADIENTS, WEIGHTS = dict(parallel__shard="gradients"), dict(parallel__shard="weights")
DOCUMENTS, TIED = dict(data__attention_mask="document"), dict(model__tie_word_embeddings=True)

CASES: list[tuple[int, dict[str, Any]]] = [  # ranks, changes
    (2, GRADIENTS),
    (4, GRADIENTS | SP2 | DOCUMENTS | TIED | dict(train__recompute="selective")),
    (4, GRADIENTS | dict(parallel__shard_size=2, train__recompute="full")),
    (2, WEIGHTS | TIED | dict(parallel__reshard_after_forward=False, train__recompute="full")),
    (4, WEIGHTS | SP2 | DOCUMENTS | dict(train__recompute="selective")),
    (4, WEIGHTS | TP2 | TIED | dict(train__recompute="full", parallel__overlap_param_gather=False)),
    (4, WEIGHTS | dict(parallel__shard_size=2)),
    (4, WEIGHTS | dict(parallel__shard_size=1, parallel__context_parallel_size=2)),
    (8, WEIGHTS | dict(parallel__tensor_model_parallel_size=4, parallel__sequence_parallel=True)),  # KV copies
    (4, dict(parallel__shard_size=2)),
]


@cache
def one_process(mask: str, tied: bool) -> Any:
    return train(0, tiny_config(data__attention_mask=mask, model__tie_word_embeddings=tied), STEPS)


@pytest.mark.parametrize("ranks, changes", CASES)
def test_it_trains_as_one_process(ranks: int, changes: dict[str, Any]) -> None:
    """fp32: sums are taken in another order. Copies of a weight are equal in bits on all ranks (``merged``)."""
    config = tiny_config(**changes)
    config.validate(ranks)
    expected, weights = one_process(config.data.attention_mask, config.model.tie_word_embeddings)
    results = run_distributed(ranks, train, config, STEPS)
    for steps, _ in results:
        for (loss, norm, applied), (loss_1, norm_1, _) in zip(steps, expected, strict=True):
            assert loss == pytest.approx(loss_1, rel=1e-5) and norm == pytest.approx(norm_1, rel=1e-3) and applied
    for name, tensor in merged([parts for _, parts in results]).items():
        assert (tensor - weights[name]).norm() < 1e-4 * weights[name].norm(), name


# ---- memory ----------------------------------------------------------------------------------------------------------


def _memory(rank: int, config: Config) -> tuple[dict[str, int], int, int, int, list[str]]:
    """Bytes that are kept, into which sums of others arrive, the most that was open at once beside them, what is open
    after a step, and after that of a forward alone."""
    ctx, now, most = make_context(config), 0, 0
    change = Buffers.open, Buffers.close

    def note(method: Any, buffers: Buffers, bucket: Bucket) -> None:
        nonlocal now, most
        before = buffers.is_open(bucket)
        method(buffers, bucket)
        if not buffers.whole:
            now += (buffers.is_open(bucket) - before) * buffers.full[bucket].nbytes
            most = max(most, now)

    model, optimizer = build(config, ctx)
    try:
        Buffers.open, Buffers.close = (  # type: ignore[method-assign]
            lambda self, bucket: note(change[0], self, bucket),
            lambda self, bucket: note(change[1], self, bucket),
        )
        train_step(model, optimizer, rank_batches(config, 1, ctx), config, 1, ctx)
        left = now
        assert left == sum(b.open_bytes for b in (optimizer.store.weight_buffers, optimizer.store.sum_buffers))
        with torch.no_grad():
            batch = rank_batches(config, 1, ctx)[0]
            model(batch.tokens, batch.labels)
    finally:
        Buffers.open, Buffers.close = change  # type: ignore[method-assign]
    states = optimizer.rule.states
    own = sum(s.own_bytes for s in states)
    kept = {"weights": optimizer.store.params.nbytes, "gradients": optimizer.store.grads.nbytes, "optimizer": own}
    store = optimizer.store
    there = [store.table[i].name for bucket in store.buckets for i in bucket.parameters
             if store.weight_buffers.is_open(bucket)]  # fmt: skip
    arriving = store._arriving
    assert arriving is not None
    return kept, arriving.nbytes, most, left, there


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (2, GRADIENTS | TIED),
        (2, WEIGHTS | dict(train__precision="bf16")),
        (4, WEIGHTS | SP2 | TIED),
        (2, WEIGHTS | dict(parallel__reshard_after_forward=False)),
        (4, WEIGHTS | dict(parallel__shard_size=2)),
    ],
)
def test_memory_is_what_the_formula_says(ranks: int, changes: dict[str, Any]) -> None:
    config = tiny_config(model__num_layers=4, **changes)
    for rank, (kept, arriving, most, left, there) in enumerate(run_distributed(ranks, _memory, config)):
        assert kept == state_bytes(config, ranks, rank) and arriving == arriving_bytes(config, ranks, rank)
        assert left == 0, "what comes for a step goes with it"
        stated = max(buffer_bytes(config, ranks, rank).values())
        assert 0.5 * stated < most <= stated
        assert config.parallel.shard != "weights" or not there, "nor does evaluation leave anything"


def test_a_last_stage_with_a_copy_of_the_tied_weight_counts_its_head() -> None:
    """It has no embedding, so that it comes and goes as a head of its own would."""
    changes = WEIGHTS | dict(parallel__pipeline_model_parallel_size=2, model__num_layers=2)
    own, copy = (tiny_config(model__tie_word_embeddings=tied, **changes) for tied in (False, True))
    assert buffer_bytes(copy, 4, 3) == buffer_bytes(own, 4, 3) and buffer_bytes(own, 4, 3)["head"] > 0


def test_states_of_an_8b_on_8_ranks() -> None:
    """Issue 16: about 56, 30 and 17 GiB; 7.5, 4 and 2.25 bytes of a parameter."""
    sizes = dict(hidden_size=4096, ffn_hidden_size=14336, num_layers=32, num_attention_heads=32, num_query_groups=8,
                 vocab_size=128_256)  # fmt: skip
    found = {}
    for mode in ("optimizer", "gradients", "weights"):
        changes: dict[str, Any] = {f"model__{name}": size for name, size in sizes.items()}
        changes |= dict(parallel__gradient_bucket_bytes=64 * 2**20, train__precision="bf16", parallel__shard=mode)
        config = tiny_config(**changes)
        found[mode] = sum(state_bytes(config, 8).values()) / 2**30
        assert max(buffer_bytes(config, 8, 0).values()) < 8 * 2**30
    assert found == {mode: pytest.approx(size, rel=0.02) for mode, size in
                     {"optimizer": 56, "gradients": 30, "weights": 17}.items()}  # fmt: skip


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def _save(rank: int, config: Config, folder: str) -> tuple[float, int]:
    """Two steps and a checkpoint; then the loss of the third step, and how many shards another rank saves."""
    ctx, model, optimizer = save_two_steps(config, folder)
    report = train_step(model, optimizer, rank_batches(config, 3, ctx), config, 3, ctx)
    return float(report.loss), sum(shard.is_copy for shard in optimizer.shards())


def _load(rank: int, config: Config, folder: str) -> tuple[float, float]:
    """Loss and norm of the third step, from the checkpoint."""
    ctx, model, optimizer = load_two_steps(config, folder)
    report = train_step(model, optimizer, rank_batches(config, 3, ctx), config, 3, ctx)
    return float(report.loss), float(report.grad_norm)


def test_a_checkpoint_of_one_mode_loads_in_every_other(tmp_path: Any) -> None:
    """bf16, so that there are masters beside the weights; the same next step but for the order of sums."""
    modes = {
        "optimizer": {},
        "gradients": GRADIENTS,
        "weights": WEIGHTS,
        "hybrid": WEIGHTS | {"parallel__shard_size": 2},
    }
    configs = {name: tiny_config(train__precision="bf16", **changes) for name, changes in modes.items()}
    pairs = [("optimizer", "weights"), ("weights", "gradients"), ("gradients", "hybrid"), ("hybrid", "optimizer")]
    for saved, loaded in pairs:
        folder = str(tmp_path / saved)
        ranks = 4 if "hybrid" in (saved, loaded) else 2
        expected = run_distributed(ranks, _save, configs[saved], folder)
        assert {copies > 0 for _, copies in expected} == ({False, True} if saved == "hybrid" else {False})
        for loss, _ in run_distributed(ranks, _load, configs[loaded], folder):
            assert loss == pytest.approx(expected[0][0], rel=1e-3)


# ---- what does not compose -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, named",
    [
        (GRADIENTS | dict(kernels__layers="te", train__device="cuda"), "E221.*gradients is not for kernels.layers=te"),
        (WEIGHTS | dict(kernels__cuda_graph=True, train__device="cuda"), "E221.*weights is not for kernels.cuda_graph"),
        (GRADIENTS | dict(parallel__reshard_after_forward=False), "E205.*reshard_after_forward=false is for .*weights"),
        (dict(parallel__shard_size=3), "E205.*shard_size=3 must divide the 4 ranks .*same weights; use 1, 2 or 4"),
        (dict(parallel__shard_size=0), "E204.*shard_size=0 must be at least 1"),
    ],
)  # fmt: skip
def test_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tiny_config(**changes).validate(4)


def test_what_is_asked_for_ahead() -> None:
    uses = uses_of((0, 3), True, True, is_tied=False)
    assert list(uses) == ["embedding", "layers.0", "layers.1", "layers.2", "final_norm", "head"]
    assert uses["layers.0"].following == ("layers.1",) and uses["layers.0"].preceding == ()
    assert uses["layers.2"].following == ("final_norm", "head") and uses["final_norm"].preceding == ("layers.2",)
    assert uses["head"].preceding == ("final_norm", "layers.2")
    assert [part for part, use in uses.items() if use.stays] == ["layers.2", "final_norm"], "backward begins with them"
    assert uses_of((0, 3), True, True, is_tied=True)["head"].part == "embedding"
    assert list(uses_of((2, 3), False, False, is_tied=False)) == ["layers.2"]


def test_one_process_keeps_what_it_has() -> None:
    config, ctx = tiny_config(**WEIGHTS), ParallelContext.single()
    model, optimizer = build(config, ctx)
    assert optimizer.store.weights_stay and not optimizer.store.sums_are_new
    batch: Batch[Any] = rank_batches(config, 1, ctx)[0]
    assert model(batch.tokens, batch.labels).isfinite().all()
