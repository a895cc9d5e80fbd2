"""Muon against an update written out, on layouts against one process, through checkpoints, and what it leaves alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.checkpoint.fit import check_style
from megatron_hammer.checkpoint.kinds import STATE_KINDS
from megatron_hammer.checkpoint.manifest import read_manifest
from megatron_hammer.config import Config
from megatron_hammer.costs.rank_costs import state_bytes
from megatron_hammer.huggingface.certificate import prove
from megatron_hammer.huggingface.export import export_hf
from megatron_hammer.kernels.newton_schulz import flops, orthogonalise
from megatron_hammer.model.parameters import hidden_matrices, logical_shapes, parameter_table
from megatron_hammer.optim import muon
from megatron_hammer.optim.buckets import BufferLayout
from megatron_hammer.optim.matrices import Exchange, plan_exchange
from megatron_hammer.optim.muon import Muon, update_scale
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.build import build_stages
from megatron_hammer.train.step import train_step
from megatron_hammer.verify.compare import LayoutSizes, compare_pieces, whole_tensors
from megatron_hammer.verify.outcome import Outcome
from megatron_hammer.verify.reference import StepRule, _muon
from megatron_hammer.verify.shrink import alone
from megatron_hammer.verify.steps import gradient_pieces, state_pieces
from tests.distributed import run_distributed
from tests.model.tiny import build, make_context, rank_batches, tiny_config
from tests.optim.checkpoints import load_two_steps, save_two_steps

MUON = dict(optimizer__style="muon", optimizer__newton_schulz="fp32")
HEADS = dict(optimizer__muon_per_head=True)
TP2 = dict(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=True)
TP4 = dict(parallel__tensor_model_parallel_size=4)  # beyond the 2 query groups
WEIGHTS = dict(parallel__shard="weights")
ONE_GROUP = dict(model__num_query_groups=1)
FULL = os.environ.get("HAMMER_FULL_GRID") == "1"


def muon_config(**changes: Any) -> Config:
    return tiny_config(**(MUON | changes))


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_head", [False, True])
def test_steps_are_those_of_an_update_written_out(per_head: bool) -> None:
    """Two steps with clipping and decay in fp64, each matrix by its singular values (``verify/reference.py``)."""
    config, ctx = muon_config(optimizer__muon_per_head=per_head, optimizer__clip_grad=0.1), ParallelContext.single()
    (model,), optimizer = build_stages(config, ctx, dtype=torch.float64)
    names = hidden_matrices(config.model)
    assert {name.split(".")[-2] for name in names} == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")}
    weights, moments = logical(optimizer, "weight"), {name: torch.zeros(1, dtype=torch.float64) for name in names}
    for step in (1, 2):
        lr = train_step(model, optimizer, rank_batches(config, step, ctx), config, step, ctx).lr
        gradients, found = logical(optimizer, "gradient"), logical(optimizer, "weight")
        for name in names:
            g = gradients[name] / optimizer.divisor
            moments[name] = 0.95 * moments[name] + 0.05 * g
            heads = (
                config.model.head_size if per_head and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") else None
            )
            update = _muon(0.95 * moments[name] + 0.05 * g, heads, StepRule())
            weights[name] = weights[name] * (1 - lr * 0.1) - lr * update
            torch.testing.assert_close(found[name], weights[name], rtol=0, atol=1e-9)
            assert 0.1 < update.square().mean().sqrt() < 0.25, "AdamW's size; less where singular values are small"


def logical(optimizer: Any, kind: str) -> dict[str, Tensor]:
    """Logical tensors of one process."""
    pieces = list(gradient_pieces(optimizer) if kind == "gradient" else state_pieces(optimizer))
    return {name: torch.from_numpy(values) for (k, name), values in whole_tensors(pieces).items() if k == kind}


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (48, 48)])
def test_an_update_has_the_size_of_moonlight_s(shape: tuple[int, int]) -> None:
    """As torch.optim.Muon has it under their name; its products are in bf16, which comes to 1.8 %."""
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    wide = weight.grad if shape[0] <= shape[1] else weight.grad.T
    ours = orthogonalise(wide[None].clone())[0] * update_scale(*shape)
    theirs = -weight.detach() if shape[0] <= shape[1] else -weight.detach().T
    assert (ours - theirs).norm() < 0.05 * ours.norm()


def test_everything_else_is_adamw_s_to_the_bit() -> None:
    """One step; the gradients of a first step are the same."""
    found = []
    for config in (tiny_config(), muon_config()):
        ctx = ParallelContext.single()
        model, optimizer = build(config, ctx)
        train_step(model, optimizer, rank_batches(config, 1, ctx), config, 1, ctx)
        found.append({name: t for kind in STATE_KINDS for name, t in (
            ((kind, n), t) for n, t in logical(optimizer, kind).items()) })  # fmt: skip
    adamw, muon = found
    matrices = hidden_matrices(tiny_config().model)
    for (kind, name), tensor in muon.items():
        if name not in matrices:
            assert torch.equal(tensor, adamw[kind, name]), name
    assert {name for kind, name in adamw.keys() - muon.keys() if kind == "exp_avg_sq"} == matrices


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_applied_changes_nothing(precision: str) -> None:
    config, ctx = muon_config(train__precision=precision), ParallelContext.single()
    model, optimizer = build(config, ctx)
    for bad in (True, False, True):  # also the very first one, with a momentum of zero
        before = [tensor.clone() for shard in optimizer.shards() for tensor in shard.tensors.values()]
        weights, updates = [w.clone() for w in optimizer.store.weights], float(optimizer.rule.updates)
        if bad:
            with torch.no_grad():
                optimizer.limits = None
                batches = rank_batches(config, 1, ctx)
                embedding = optimizer.store.weights[0]
                kept = embedding.clone()
                embedding.fill_(float("nan"))
            report = train_step(model, optimizer, batches, config, 1, ctx)
            with torch.no_grad():
                if precision == "fp32":  # there the weights are the masters, and were changed by the test itself
                    embedding.copy_(kept)
                else:
                    optimizer.copy_params_from_masters()
        else:
            report = train_step(model, optimizer, rank_batches(config, 2, ctx), config, 2, ctx)
        after = [tensor for shard in optimizer.shards() for tensor in shard.tensors.values()]
        same = all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        same = same and all(torch.equal(a, b) for a, b in zip(optimizer.store.weights, weights, strict=True))
        assert bool(report.applied) is not bad and same is bad
        assert float(optimizer.rule.updates) == updates + (not bad)
    assert optimizer.scaler.scale == (65536 / 4 if precision == "fp16" else 1)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def many_steps(rank: int, config: Config) -> Outcome:
    """20 steps in fp64, and the state that they leave. Several ranks exchange one or two matrices at a time."""
    ctx = make_context(config)
    with mock.patch.object(muon, "ELEMENTS_OF_A_ROUND", 2048 if ctx.world.size > 1 else 2**25):
        stages, optimizer = build_stages(config, ctx, dtype=torch.float64)
    assert len(optimizer.rule.rounds) > 1 or ctx.world.size == 1
    for step in range(1, 21):
        train_step(stages, optimizer, rank_batches(config, step, ctx), config, step, ctx)
    return Outcome([], [], list(state_pieces(optimizer)))


@cache
def one_process(config: Config) -> Outcome:
    return many_steps(0, config)


@pytest.mark.parametrize(
    "ranks, changes",
    [
        (2, dict(parallel__shard="gradients")),
        (4, TP2 | WEIGHTS | HEADS | ONE_GROUP),  # copies of keys and values
        *(
            pytest.param(*layout, marks=[pytest.mark.slow, pytest.mark.skipif(not FULL, reason="HAMMER_FULL_GRID=1")])
            for layout in (
                (2, {}),
                (4, TP2 | dict(parallel__shard="gradients") | HEADS),
                (8, TP4 | WEIGHTS | HEADS),
                (4, WEIGHTS | TP2 | dict(parallel__shard_size=1)),
                (4, dict(parallel__pipeline_model_parallel_size=2, parallel__context_parallel_size=2)),
                (8, TP2 | dict(parallel__pipeline_model_parallel_size=2)),
            )
        ),
    ],
)
def test_twenty_steps_as_one_process(ranks: int, changes: dict[str, Any]) -> None:
    config = muon_config(model__hidden_size=32, model__ffn_hidden_size=48, data__seq_length=16, **changes)
    config.validate(ranks)
    reference = whole_tensors(one_process(alone(config)).pieces)
    worst, findings = compare_pieces(run_distributed(ranks, many_steps, config), reference, 1e-6, LayoutSizes(1, 1, 1))
    assert findings == [] and worst.keys() == set(STATE_KINDS) and max(worst.values()) < 1e-6


SMALL = dict(model__hidden_size=32, model__ffn_hidden_size=48, data__seq_length=16)
TREE = dict(train__deterministic_reduction="tree")


def in_fp32(rank: int, config: Config, steps: int, noise: float = 0.0) -> Outcome:
    """So many steps, and the state that they leave.

    Args:
        noise: each gradient is multiplied by 1 plus at most this, at random, before an update reads it.
    """
    ctx, generator = make_context(config), torch.Generator().manual_seed(5)
    stages, optimizer = build_stages(config, ctx)
    clip = optimizer.clip_grad_norm

    def clip_and_disturb(most: float) -> Tensor:
        norm = clip(most)
        for state in optimizer.rule.states:
            state.grad.mul_(1 + noise * (2 * torch.rand(state.grad.shape, generator=generator) - 1))
        return norm

    if noise:
        optimizer.clip_grad_norm = clip_and_disturb  # type: ignore[method-assign]
    for step in range(1, steps + 1):
        train_step(stages, optimizer, rank_batches(config, step, ctx), config, step, ctx)
    return Outcome([], [], list(state_pieces(optimizer)))


def differences(config: Config, steps: int, ranks: int, noise: float = 0.0) -> tuple[float, float]:
    """The largest in weights and moments between one process and these ranks, and one with noise."""
    whole = whole_tensors(in_fp32(0, config, steps).pieces)
    others = run_distributed(ranks, in_fp32, config, steps), [in_fp32(0, config, steps, noise)] if noise else []
    found = [compare_pieces(outcomes, whole, 1.0, LayoutSizes(1, 1, 1))[0] for outcomes in others]
    return max(found[0].values()), max(found[1].values()) if noise else 0.0


def test_in_fp32_layouts_differ_by_the_rounding_of_gradients() -> None:
    """Orthogonalising divides small singular values by themselves, and with them what was rounded in a gradient: half
    a unit in its last place, 6e-8, becomes 9e-6 in 20 steps at lr=1e-2. Two ranks, which sum in another order, differ
    from one by no more; at lr=1e-3 by less than 1e-6. In a fixed tree they do not differ."""
    found, rounding = differences(muon_config(**SMALL), 6, 2, 2.0**-24)
    assert 0 < found < 3 * rounding < 1e-4
    slow = muon_config(**SMALL, optimizer__lr=1e-3, optimizer__min_lr=1e-4)
    assert differences(slow, 20, 2)[0] < 1e-6
    assert differences(muon_config(**SMALL, **TREE), 6, 4)[0] == 0


def plans(tp: int, shards: int, per_head: bool) -> tuple[Config, list[Exchange]]:
    config = muon_config(parallel__tensor_model_parallel_size=tp, optimizer__muon_per_head=per_head)
    tables = [[parameter_table(config.model, config.placement(rank)) for rank in range(tp)]]
    found = []
    for rank in range(shards * tp):
        layout = BufferLayout(tables[0][rank % tp], 40_000, shards, rank // tp)
        found.append(plan_exchange([layout], tables, rank, flops, per_head))
    return config, found


@pytest.mark.parametrize(
    "tp, shards, per_head", [(1, 1, False), (1, 3, True), (2, 2, False), (4, 2, True), (8, 5, False)]
)
def test_who_sends_what_to_whom(tp: int, shards: int, per_head: bool) -> None:
    """Ranks agree on every message, every element comes to its owner once, and owners have equal work."""
    config, found = plans(tp, shards, per_head)
    ranks, shapes = range(len(found)), logical_shapes(config.model)
    assert len({tuple(sorted((m.tensor, m.rows, r) for m, r in plan.owner.items())) for plan in found}) == 1
    for copies in (False, True):
        sent = [plan.sizes(plan.sent, copies) for plan in found]
        received = [plan.sizes(plan.received, copies) for plan in found]
        assert [[sent[a][b] for b in ranks] for a in ranks] == [[received[b][a] for b in ranks] for a in ranks]
    seen = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    for plan in found:
        for piece in (piece for pieces in plan.received for piece in pieces if piece.owned):
            matrix = seen[piece.matrix.tensor][piece.matrix.rows[0] : piece.matrix.rows[1]]
            for box in piece.boxes:
                matrix[slice(*box.rows), slice(*(box.cols or ()))] += 1
    names = hidden_matrices(config.model)
    assert all(bool((seen[name] == (name in names)).all()) for name in shapes)
    if per_head:
        heights = {m.tensor: m.shape[0] for m in found[0].matrices}
        assert {heights[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"} == {config.model.head_size}
    turns = [plan.rounds(5000) for plan in found]
    assert len({len(of_rank) for of_rank in turns}) == 1 and (len(turns[0]) > 1 or len(found) > len(found[0].matrices))
    for plan, of_rank in zip(found, turns, strict=True):
        assert Counter(m for part in of_rank for m in part.mine) == Counter(plan.mine)
        assert all(len(part.mine) < 2 or sum(math.prod(m.shape) for m in part.mine) <= 5000 for part in of_rank)
    for parts in zip(*turns, strict=True):
        sent, received = ([getattr(part, side) for part in parts] for side in ("sent", "received"))
        assert all(sent[a][b] == received[b][a] for a in ranks for b in ranks)
    loads = [sum(flops(*m.shape) for m in plan.mine) for plan in found]
    assert max(loads) - min(loads) <= max(flops(*m.shape) for m in found[0].matrices)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def save(rank: int, config: Config, folder: str) -> list[Any]:
    """Two steps and a checkpoint; then loss and norm of two more, and this rank's state after them."""
    return go_on(config, *save_two_steps(config, folder))


def load(rank: int, config: Config, folder: str) -> list[Any]:
    """The same two steps from the checkpoint."""
    return go_on(config, *load_two_steps(config, folder))


def go_on(config: Config, ctx: ParallelContext, model: Any, optimizer: Any) -> list[Any]:
    reports = [train_step(model, optimizer, rank_batches(config, n, ctx), config, n, ctx) for n in (3, 4)]
    state = [tensor.clone() for shard in optimizer.shards() for tensor in shard.tensors.values()]
    return [[(float(r.loss), float(r.grad_norm)) for r in reports], state]


def test_a_checkpoint_loads_in_bits_and_in_another_layout(tmp_path: Path) -> None:
    config = muon_config(**TP2, **ONE_GROUP, train__precision="bf16", optimizer__newton_schulz="bf16")
    expected = run_distributed(4, save, config, str(tmp_path))
    for (numbers, state), (numbers_2, state_2) in zip(
        expected, run_distributed(4, load, config, str(tmp_path)), strict=True
    ):
        assert numbers == numbers_2 and all(torch.equal(a, b) for a, b in zip(state, state_2, strict=True))
    manifest = read_manifest(tmp_path / "step-00000002")
    certificate = export_hf(tmp_path / "step-00000002", tmp_path / "hf", prove=prove, note=lambda text: None)
    assert certificate["texts"] and (tmp_path / "hf" / "model.safetensors").exists()
    matrices = hidden_matrices(config.model)
    assert {t.name for t in manifest.tensors if t.kind == "exp_avg"} == set(logical_shapes(config.model))
    assert {t.name for t in manifest.tensors if t.kind == "exp_avg_sq"} == set(logical_shapes(config.model)) - matrices
    for changes in (WEIGHTS, {}):
        other = muon_config(**changes, **ONE_GROUP, train__precision="bf16", optimizer__newton_schulz="bf16")
        for numbers, _ in run_distributed(2, load, other, str(tmp_path)):
            assert numbers[0] == pytest.approx(expected[0][0][0], rel=1e-2)
            assert numbers[0][0] == pytest.approx(expected[0][0][0][0], rel=1e-3)
    adamw = tiny_config(**ONE_GROUP, train__precision="bf16")
    with pytest.raises(CheckpointError, match=r"E413.*exp_avg_sq model.layers.\d+.*is missing"):
        load(0, adamw, str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"E412.*optimizer.style=adamw .*set optimizer.style=muon; or .*init_from="
    ):
        check_style(manifest, adamw.optimizer.style)
    old = dataclasses.replace(manifest, config={"optimizer": {"lr": 1.0}})  # of before there was a style
    with pytest.raises(CheckpointError, match=r"E412.*optimizer.style=muon has other moments than adamw"):
        check_style(old, config.optimizer.style)
    check_style(old, adamw.optimizer.style)


# ---- memory and settings ---------------------------------------------------------------------------------------------


def test_a_matrix_keeps_one_state_less() -> None:
    config = muon_config(train__precision="bf16")
    _, optimizer = build(config, ParallelContext.single())
    assert isinstance(optimizer.rule, Muon)
    own = sum(state.own_bytes for state in optimizer.rule.states)
    elements = sum(row.numel for row in optimizer.store.table)
    matrices = sum(row.numel for row in optimizer.store.table if row.is_hidden_matrix)
    assert own == state_bytes(config, 1)["optimizer"] == 12 * elements - 4 * matrices


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(optimizer__muon_momentum=0.9), "E204.*muon_momentum=0.9 belongs to optimizer.style=muon only"),
        (dict(optimizer__newton_schulz="fp32"), "E204.*newton_schulz=fp32 belongs to optimizer.style=muon only"),
        (MUON | dict(optimizer__muon_momentum=1.0), r"E204.*muon_momentum=1.0 must lie in \[0, 1\)"),
    ],
)
def test_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tiny_config(**changes).validate(1)
