"""One rank of a run, from its inputs to its exit code."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from megatron_hammer.base.environment import offers_gpu
from megatron_hammer.config import Config, to_yaml
from megatron_hammer.costs.forecast import forecast
from megatron_hammer.costs.shortage import explained
from megatron_hammer.kernels.report import kernels_table, missing_kernels
from megatron_hammer.kernels.selection import TABLES, kernel_requirements, select_backends
from megatron_hammer.metrics.trackers import check_trackers
from megatron_hammer.model.parameters import count_parameters
from megatron_hammer.parallel.agreement import BeforeStart
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.context import ParallelContext, build_parallel_context
from megatron_hammer.parallel.rendezvous import Store, collective_timeout, end_process_group, start_process_group
from megatron_hammer.sampling.plan import format_run_plan
from megatron_hammer.train.begin import Beginning, begin
from megatron_hammer.train.loop import TrainLoop
from megatron_hammer.train.prepare import Prepared, prepare
from megatron_hammer.train.training import train


def run_rank(
    config: Config,
    rank: int,
    local_rank: int,
    world_size: int,
    store: Store | None,
    check_data: bool = True,
    accepted: Collection[str] = (),
    status: StatusSlot | None = None,
) -> int:
    """Run this rank to the end.

    Args:
        store: where the ranks meet; None for a single process.
        check_data: False when the launcher has looked through the datasets already.
        accepted: names of what may differ from the checkpoint that the run resumes from.
        status: where this rank notes what it does, if it is watched.

    Returns:
        0 when the run is complete, 75 when a signal stopped it after a save.

    Raises:
        HammerError: the same on all ranks, and for faulty inputs before the first collective.
    """
    timeout = config.parallel.timeout_seconds if status is None else collective_timeout(config.parallel.timeout_seconds)
    status = StatusSlot() if status is None else status
    ranks = BeforeStart(store, rank, world_size, status)
    if config.train.dry_run:
        with ranks.round("inputs"):
            prepared = prepare(config, world_size, check_data, accepted)
            if rank == 0:
                check_trackers(config.log.trackers)
        if rank == 0:
            print(describe_dry_run(prepared, world_size), flush=True)
        return 0
    with ExitStack() as held:
        mine = RankRun(Beginning(ranks, held, config, local_rank, check_data, accepted))
        if mine.prepared.is_finished:
            return 0
        if store is not None and world_size > 1:
            start_process_group(store, rank, world_size, mine.device, timeout, status)
        ctx = build_parallel_context(mine.prepared.config.grid(world_size), mine.device, timeout, status)
        with mine.explained():
            code = train(mine.prepared, ctx, mine.begin)
        with status.waits("the end of all ranks"):  # as NCCL does; at a clean end only: else for ranks that never come
            end_process_group()
        return code


class RankRun:
    """This rank's run, its inputs looked at and its beginning agreed on; on rank 0 it has said what it is.

    Raises:
        HammerError: the same on all ranks.
    """

    def __init__(self, beginning: Beginning) -> None:
        self._beginning, self._ranks = beginning, beginning.ranks
        self.prepared = beginning.agree()
        self.device = beginning.device
        if self._ranks.rank == 0:
            said = announcement(self.prepared, self._ranks.world_size, self.device, beginning.predicted)
            print(said, flush=True)

    def begin(self, prepared: Prepared, ctx: ParallelContext, when_finished: bool = False) -> TrainLoop | None:
        """Build the run and load its state; None where its end is reached already, unless that is to be looked at."""
        announce = _announce_other if self._ranks.rank == 0 else _say_nothing
        return begin(self._beginning, prepared, ctx, announce, when_finished)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """The block computes; where it finds no memory, the error says what would fit."""
        try:
            yield
        except Exception as error:
            ranks = self._ranks
            if known := explained(error, self.prepared.config, ranks.world_size, ranks.rank, self.device):
                raise known from error
            raise


def dry_run(config: Config, world_size: int = 1, check_data: bool = True, accepted: Collection[str] = ()) -> str:
    """What ``train.dry_run=true`` prints of a config: settings, parameters, layout, memory, the plan of the data.

    Raises:
        HammerError: the config cannot be run on so many ranks.
    """
    dry = dataclasses.replace(config, train=dataclasses.replace(config.train, dry_run=True))
    return describe_dry_run(prepare(dry, world_size, check_data, accepted), world_size)


def _say_nothing(prepared: Prepared) -> None:
    """Rank 0 has."""


def _announce_other(prepared: Prepared) -> None:
    """Say from what the run goes on instead of a checkpoint that turned out damaged when it was loaded."""
    print("\n".join([*(f"note: {note}" for note in prepared.notes), *_start_lines(prepared)]), flush=True)


def layout_line(config: Config, world_size: int) -> str:
    """The parallel layout and the size of a step, in one line."""
    parallel, run = config.parallel, config.train
    pp = parallel.pipeline_model_parallel_size
    pipeline = "" if pp == 1 else f"PP {pp} x "
    sequence_parallel = " with sequence parallelism" if parallel.sequence_parallel else ""
    sharded = "" if parallel.shard_size is None else f" ({parallel.shard} sharded over {parallel.shard_size})"
    if parallel.divides_gradients and not sharded:
        sharded = f" ({parallel.shard} sharded)"
    context_parallel = f"CP {parallel.context_parallel_size} x " if parallel.context_parallel_size > 1 else ""
    return (
        f"{world_size} rank{'s' if world_size > 1 else ''} = "
        f"TP {parallel.tensor_model_parallel_size}{sequence_parallel} x {context_parallel}{pipeline}"
        f"DP {config.data_parallel_size(world_size)}{sharded}; "
        f"{_ramp(config)}step = {run.global_batch_size} samples x {config.data.seq_length} tokens = "
        f"{config.tokens_per_step:,} tokens "
        f"(micro-batch {run.micro_batch_size}, {config.grad_accum(world_size)} accumulated)"
    )


def _ramp(config: Config) -> str:
    """What to say before the size of a step where it is reached in the course of the run."""
    ramp = config.train.batch_size_ramp
    if ramp is None:
        return ""
    return f"steps of {ramp.start} samples at first, {ramp.increment} more at a time; after {ramp.samples:,} samples "


def pipeline_lines(config: Config, world_size: int) -> list[str]:
    """What each stage of a pipeline has, how alike they are, and how long ranks wait for each other; or nothing."""
    pipeline, split = config.pipeline(), config.layer_split()
    if pipeline.ranks == 1:
        return []
    imbalance, accumulated = config.token_flops().imbalance(split, pipeline.ranks), config.grad_accum(world_size)
    whose = "by work" if config.parallel.pipeline_split is None else "parallel.pipeline_split"
    several = "" if pipeline.stages_per_rank == 1 else f", {pipeline.stages_per_rank} on each rank"
    return [
        f"pipeline: {pipeline.num_stages} stages{several}, layers {' '.join(map(str, split))} ({whose}), embedding "
        f"with the first and head with the last; the busiest rank has {imbalance:.2f} times the mean work; with "
        f"{accumulated} micro-batches a rank waits {pipeline.idle_share(accumulated):.0%} of a step for others"
    ]


def describe_dry_run(prepared: Prepared, world_size: int) -> str:
    """What ``train.dry_run=true`` prints."""
    config = prepared.config
    required = kernel_requirements(config, torch.device("cpu"))
    automatic: dict[str, Any] = dict.fromkeys(TABLES, "auto")  # this machine need not be the one
    plain = dataclasses.replace(config.kernels, **automatic)
    course = None if prepared.plan is None else prepared.plan.course
    lines = [
        to_yaml(config),
        f"parameters: {count_parameters(config.model):,}",
        f"layout: {layout_line(config, world_size)}",
        *pipeline_lines(config, world_size),
        *forecast(config, world_size, select_backends(plain, required), course),
    ]
    if prepared.plan is not None:
        lines.append(format_run_plan(prepared.plan))
    return "\n".join(lines + [f"note: {note}" for note in prepared.notes + prepared.data_notes])


def announcement(prepared: Prepared, world_size: int, device: torch.device, predicted: str) -> str:
    """The first lines of a run; ``predicted`` says what it will need."""
    config = prepared.config
    lines = [f"note: {note}" for note in prepared.notes + prepared.data_notes]
    if prepared.plan is not None and not prepared.is_finished:
        lines.append(format_run_plan(prepared.plan))
    lines.append(
        f"{count_parameters(config.model):,} parameters in {config.train.precision} on {device.type}; "
        f"{layout_line(config, world_size)}"
    )
    lines += pipeline_lines(config, world_size)
    if config.train.device == "auto" and device.type == "cpu" and offers_gpu():
        why = "mostly the driver is older than the CUDA that torch is built for; tools/doctor.py looks"
        if torch.version.cuda is None:
            why = "it is built for CPUs; without TORCH_INDEX_URL tools/make_venv.sh installs one for GPUs"
        lines.append(
            f"WARNING: a GPU is here, but torch {torch.__version__} cannot use it: this run is on the CPU.\n"
            f"WARNING: {why}.\n"
            "WARNING: train.device=cuda refuses to go on without a GPU, train.device=cpu says that this is meant"
        )
    required = kernel_requirements(config, device)
    lines.append(kernels_table(config.kernels, required))
    if warning := missing_kernels(config.kernels, required):
        lines.append(warning)
    return "\n".join([*lines, predicted, *_start_lines(prepared)])


def _start_lines(prepared: Prepared) -> list[str]:
    """What the run begins from."""
    resume = prepared.resume
    if resume is not None and prepared.is_finished:
        steps = prepared.config.train.num_steps
        return [f"finished: {resume.folder} is at step {resume.step} of {steps}; nothing left to do"]
    if resume is not None:
        return [f"resuming from {resume.folder}", *_ledger_lines(prepared), *prepared.changes]
    if prepared.init_from is not None:
        return [f"starting from the weights of {prepared.init_from.folder}", *_ledger_lines(prepared)]
    return _ledger_lines(prepared)


def _ledger_lines(prepared: Prepared) -> list[str]:
    """What the run leaves out."""
    rewinds, samples = prepared.rewinds, sum(rewind.samples for rewind in prepared.rewinds)
    if not rewinds:
        return []
    return [f"ledger of {len(rewinds)} rewind{'s' * (len(rewinds) > 1)}: {samples:,} samples of the order are left out"]
