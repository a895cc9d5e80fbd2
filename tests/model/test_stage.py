"""Stages of the model: run one after the other they are the whole model, bit for bit, and so are their tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.config import Config
from megatron_hammer.kernels.selection import kernel_requirements, select_operations
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import Stage, build_stage
from megatron_hammer.model.parameters import EMBEDDING, Parameter, logical_shapes, parameter_table
from megatron_hammer.model.recompute import plan_recompute
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import Placement, place
from tests.distributed import run_distributed
from tests.model.tiny import make_context, rank_batches, tiny_config


def _built(config: Config, ctx: ParallelContext, at: Placement) -> Stage:
    required = kernel_requirements(config, ctx.device)
    model = build_stage(
        config.model,
        ctx,
        at,
        dtype=required.dtype,
        operations=select_operations(config.kernels, required),
        kernels=config.kernels,
        recompute=plan_recompute(config),
    )
    initialise(model, parameter_table(config.model, at), seed=5)
    return model


def _placements(config: Config, ctx: ParallelContext, num_stages: int) -> list[Placement]:
    parallel = config.parallel.sequence_parallel
    return [
        place(config.model, ctx.tp.rank, ctx.tp.size, sequence_parallel=parallel, stage=i, num_stages=num_stages)
        for i in range(num_stages)
    ]


def _inputs(config: Config, ctx: ParallelContext) -> tuple[Tensor, Tensor, Any]:
    """Tokens, labels and documents of a micro-batch."""
    batch = rank_batches(config, 1, ctx)[0]
    return batch.tokens, batch.labels, batch.documents


def _weight_gradients(stages: list[Stage]) -> dict[str, Tensor]:
    """By name; a tied embedding is two parameters in two stages, whose gradients are summed."""
    found: dict[str, Tensor] = {}
    for stage in stages:
        for name, parameter in stage.named_parameters():
            name = "embedding.weight" if stage.config.tie_word_embeddings and name == "head.weight" else name
            assert parameter.grad is not None, name
            found[name] = parameter.grad if name not in found else found[name] + parameter.grad
    return found


def _one_after_the_other(config: Config, ctx: ParallelContext, num_stages: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients as a pipeline schedule would compute them, in one process."""
    stages = [_built(config, ctx, at) for at in _placements(config, ctx, num_stages)]
    batch = _inputs(config, ctx)
    arrived: list[Tensor | None] = [None]
    for stage in stages:
        received = arrived[-1]
        arrived.append(stage(*batch, received=received).detach().requires_grad_() if stage is not stages[-1] else None)
    losses = stages[-1](*batch, received=arrived[-2])
    losses.mean().backward()
    for i in reversed(range(num_stages - 1)):  # again, as a schedule that keeps only what it has received would
        sent = stages[i](*batch, received=arrived[i])
        after = arrived[i + 1]
        assert after is not None and torch.equal(sent, after)
        sent.backward(after.grad)
    return losses.detach(), _weight_gradients(stages)


def _whole(config: Config, ctx: ParallelContext) -> tuple[Tensor, dict[str, Tensor]]:
    model = _built(config, ctx, _placements(config, ctx, 1)[0])
    losses = model(*_inputs(config, ctx))
    losses.mean().backward()
    return losses.detach(), _weight_gradients([model])


def _differences(rank: int, config: Config, num_stages: int) -> list[str]:
    ctx = make_context(config)
    losses, gradients = _whole(config, ctx)
    others, other_gradients = _one_after_the_other(config, ctx, num_stages)
    assert gradients.keys() == other_gradients.keys()
    wrong = [] if torch.equal(losses, others) else ["losses"]
    return wrong + [name for name, grad in gradients.items() if not torch.equal(grad, other_gradients[name])]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__attention_mask": "document"},
        {"train__recompute": "selective"},
        {"train__recompute": "full", "train__recompute_layers": 2},
    ],
    ids=["plain", "documents", "selective", "full"],
)
@pytest.mark.parametrize("num_stages", [2, 3])
def test_stages_equal_the_whole_model(num_stages: int, changes: dict[str, Any], precision: str) -> None:
    config = tiny_config(model__num_layers=3, train__precision=precision, **changes)
    assert _differences(0, config, num_stages) == []


def test_stages_equal_the_whole_model_where_the_head_is_the_embedding() -> None:
    """In fp32 the sum of two gradients is the one that autograd takes of the two uses of one parameter."""
    config = tiny_config(model__num_layers=3, model__tie_word_embeddings=True)
    assert _differences(0, config, 2) == []


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_stages_equal_the_whole_model_on_two_ranks(sequence_parallel: bool) -> None:
    config = tiny_config(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=sequence_parallel)
    assert run_distributed(2, _differences, config, 2) == [[], []]


def test_a_stage_must_be_given_what_it_reads() -> None:
    config, ctx = tiny_config(), ParallelContext.single()
    first, last = (_built(config, ctx, at) for at in _placements(config, ctx, 2))
    tokens, labels, _ = _inputs(config, ctx)
    with pytest.raises(AssertionError, match="first stage receives nothing"):
        last(tokens, labels)
    with pytest.raises(AssertionError, match="first stage receives nothing"):
        first(tokens, labels, received=torch.zeros(32, 2, 64))


# ---- tables ---------------------------------------------------------------------------------------------------------


def _tables(config: Config, tp: int, num_stages: int) -> list[tuple[Parameter, ...]]:
    return [
        parameter_table(config.model, place(config.model, rank, tp, stage=stage, num_stages=num_stages))
        for stage in range(num_stages)
        for rank in range(tp)
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tables_of_the_stages_are_a_partition(num_stages: int, tp: int) -> None:
    config = tiny_config(model__num_layers=3)
    for rank in range(tp):
        whole = parameter_table(config.model, place(config.model, rank, tp))
        parts = [
            parameter_table(config.model, place(config.model, rank, tp, stage=i, num_stages=num_stages))
            for i in range(num_stages)
        ]
        assert tuple(parameter for part in parts for parameter in part) == whole


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_a_stage_s_parameters_are_those_of_its_table(num_stages: int) -> None:
    for tied in (False, True):
        config, ctx = tiny_config(model__num_layers=3, model__tie_word_embeddings=tied), ParallelContext.single()
        for at in _placements(config, ctx, num_stages):
            shapes = {name: tuple(p.shape) for name, p in _built(config, ctx, at).named_parameters()}
            assert shapes == {p.name: p.shape for p in parameter_table(config.model, at)}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("tp, num_stages", [(1, 1), (1, 2), (2, 2), (4, 3), (8, 2)])
def test_owned_slices_cover_every_tensor_once(tp: int, num_stages: int, groups: int, tied: bool) -> None:
    """So a checkpoint to which every rank writes what it owns is complete, and nothing is in it twice."""
    config = tiny_config(model__num_layers=3, model__num_query_groups=groups, model__tie_word_embeddings=tied)
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in logical_shapes(config.model).items()}
    for table in _tables(config, tp, num_stages):
        for s in (s for parameter in table for s in parameter.slices if s.owned):
            rows = counts[s.tensor][s.rows[0] : s.rows[1]]
            (rows if s.cols is None else rows[:, s.cols[0] : s.cols[1]]).add_(1)
    assert all((count == 1).all() for count in counts.values())


def test_a_tied_embedding_is_on_the_first_and_the_last_stage_and_owned_by_the_first() -> None:
    config = tiny_config(model__num_layers=3, model__tie_word_embeddings=True)
    found = [
        (i, parameter.name, s.owned, s.sum_over)
        for i, table in enumerate(_tables(config, 1, 3))
        for parameter in table
        for s in parameter.slices
        if s.tensor == EMBEDDING
    ]
    assert found == [(0, "embedding.weight", True, "stages"), (2, "head.weight", False, "stages")]
    (whole,) = _tables(config, 1, 1)
    assert [s.sum_over for parameter in whole for s in parameter.slices if s.tensor == EMBEDDING] == ["none"]
