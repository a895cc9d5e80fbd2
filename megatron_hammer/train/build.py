"""Makes model and optimizer of one rank from a config, with the kernels that it asks for and the initial weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.ranges import RangeOf, no_range
from megatron_hammer.kernels.selection import (
    COMPUTE_DTYPES,
    kernel_requirements,
    select_operations,
    select_optimizer_kernels,
)
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.llama import Stage, build_stage
from megatron_hammer.model.parameters import Parameter, parameter_table, tables_of_stages
from megatron_hammer.model.recompute import plan_recompute
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.stage_stores import StageStores
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.optim.tree_store import TreeStore
from megatron_hammer.parallel.context import ParallelContext


@dataclass(frozen=True)
class StepKernels:
    """What a step computes with."""

    operations: Operations
    optimizer: OptimizerKernels


def check_compiler(config: Config, version: str = torch.__version__) -> None:
    """Refuse what a version of torch compiles wrongly: a sum over ranks inside a graph, before torch 2.13.

    Seen with 2.11.0: the gradients of compiled layers were wrong on TP 2 without sequence parallelism, right with it.

    Raises:
        ConfigError: E215.
    """
    parallel, (major, minor) = config.parallel, (int(part) for part in version.split(".")[:2])
    sums = parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel
    if config.kernels.compile == "layers" and sums and (major, minor) < (2, 13):
        rule = f"gives wrong gradients with torch {version} under tensor parallelism without sequence parallelism"
        raise ConfigError(
            15, "kernels.compile=layers", rule, "set parallel.sequence_parallel=true, or use torch 2.13 or newer"
        )


def build(
    config: Config,
    ctx: ParallelContext,
    range_of: RangeOf = no_range,
    dtype: torch.dtype | None = None,
    initial: bool = True,
    kernels: StepKernels | None = None,
) -> tuple[Stage, Optimizer]:
    """``build_stages`` where a rank has one stage: all layouts but interleaved pipelines."""
    (stage,), optimizer = build_stages(config, ctx, range_of, dtype, initial, kernels)
    return stage, optimizer


def build_stages(
    config: Config,
    ctx: ParallelContext,
    range_of: RangeOf = no_range,
    dtype: torch.dtype | None = None,
    initial: bool = True,
    kernels: StepKernels | None = None,
) -> tuple[list[Stage], Optimizer]:
    """The stages of this rank, first to last, and their optimizer, with the initial weights that the seed defines.

    Args:
        range_of: entered around the parts of a step, for a profiler.
        dtype: of the weights, in place of ``train.precision``: fp64 for proofs, with sums and moments in fp64 too.
        initial: False where a checkpoint is loaded next (``state.load_state``), which fills every weight or fails: no
            number is drawn (of a 1.4B model that would take 10 to 20 s), all weights are zero until then.
        kernels: in place of those that the config and the device choose.
    """
    dtype = dtype or COMPUTE_DTYPES[config.train.precision]
    kernels = kernels or choose_kernels(config, ctx.device, dtype)
    stages, stores = [], []
    for number in config.pipeline(ctx.pp.rank).stages:
        placement = config.placement(ctx.tp.rank, number)
        table = parameter_table(config.model, placement)
        store = _store(config, table, dtype, ctx, range_of)
        stage = build_stage(
            config.model,
            ctx,
            placement,
            dtype=dtype,
            operations=kernels.operations,
            kernels=config.kernels,
            recompute=plan_recompute(config),
            store=store,
            range_of=range_of,
            tp_comm_overlap=config.parallel.tp_comm_overlap,
        )
        store.check(stage)
        stage.rope(config.data.seq_length)  # made here, not in the first step
        if initial:
            initialise(stage, table, config.train.seed)
        stages.append(stage)
        stores.append(store)
    loss_scaling, together = config.train.precision == "fp16", stores[0] if len(stores) == 1 else StageStores(stores)
    tree = config.train.deterministic_reduction == "tree"
    tables = tables_of_stages(config, ctx.pp.rank)
    return stages, Optimizer(together, config.optimizer, loss_scaling, kernels.optimizer, range_of, tables, tree)


def _store(
    config: Config, table: Sequence[Parameter], dtype: torch.dtype, ctx: ParallelContext, range_of: RangeOf
) -> FlatStore:
    """The weights of a stage and the sums of their gradients."""
    parallel = config.parallel
    bucket_bytes, overlap = parallel.gradient_bucket_bytes, parallel.overlap_param_gather
    if config.train.deterministic_reduction == "tree":
        accumulated = config.grad_accum(ctx.world.size)
        return TreeStore(table, dtype, ctx, bucket_bytes, accumulated, range_of, overlap, parallel.overlap_grad_reduce)
    reshard, reduce = parallel.reshard_after_forward, parallel.overlap_grad_reduce
    return FlatStore(table, dtype, ctx, bucket_bytes, range_of, overlap, parallel.shard, reshard, reduce)


def choose_kernels(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> StepKernels:
    """Those that the config asks for, or that this device does best; ``dtype`` as in ``build``."""
    required = kernel_requirements(config, device)
    required = required if dtype is None else dataclasses.replace(required, dtype=dtype)
    return StepKernels(select_operations(config.kernels, required), select_optimizer_kernels(config.kernels, required))
