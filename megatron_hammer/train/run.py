"""One rank of a run, from its inputs to its exit code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.base.errors import ConfigError, RefusedError
from megatron_hammer.base.locks import take_lock
from megatron_hammer.config import Config, to_yaml
from megatron_hammer.kernels import fp8
from megatron_hammer.kernels.libraries.te import check_here
from megatron_hammer.kernels.report import kernels_table, missing_kernels
from megatron_hammer.kernels.selection import TABLES, select_backends
from megatron_hammer.model.parameters import count_parameters
from megatron_hammer.model.recompute import activation_bytes
from megatron_hammer.parallel.agreement import BeforeStart
from megatron_hammer.parallel.board import Journal
from megatron_hammer.parallel.context import build_parallel_context
from megatron_hammer.parallel.rendezvous import Store, collective_timeout, end_process_group, start_process_group
from megatron_hammer.sampling.plan import format_plan
from megatron_hammer.train import cuda_graph
from megatron_hammer.train.build import check_compiler, kernel_requirements
from megatron_hammer.train.forecast import forecast
from megatron_hammer.train.loop import train
from megatron_hammer.train.prepare import (
    Prepared,
    Start,
    build_indices,
    find_start,
    look_at_inputs,
    prepare,
    settle,
)
from megatron_hammer.train.start import facts_of, look_for_probe, name_start, open_start, probe_file
from megatron_hammer.train.trackers import check_trackers


def run_rank(
    config: Config,
    rank: int,
    local_rank: int,
    world_size: int,
    store: Store | None,
    check_data: bool = True,
    accepted: Collection[str] = (),
    journal: Journal | None = None,
) -> int:
    """Run this rank to the end.

    Args:
        store: where the ranks meet; None for a single process.
        check_data: False when the launcher has looked through the datasets already.
        accepted: names of what may differ from the checkpoint that the run resumes from.
        journal: where this rank notes what it does, if it is watched.

    Returns:
        0 when the run is complete, 75 when a signal stopped it after a save.

    Raises:
        HammerError: the same on all ranks, and for faulty inputs before the first collective.
    """
    timeout = (
        config.parallel.timeout_seconds if journal is None else collective_timeout(config.parallel.timeout_seconds)
    )
    journal = Journal() if journal is None else journal
    ranks = BeforeStart(store, rank, world_size, journal)
    if config.train.dry_run:
        with ranks.round("inputs"):
            prepared = prepare(config, world_size, check_data, accepted)
            if rank == 0:
                check_trackers(config.log.trackers)
        if rank == 0:
            print(describe(prepared, world_size), flush=True)
        return 0
    with ExitStack() as held:
        prepared, device = agree_on_start(ranks, held, config, local_rank, check_data, accepted)
        config = prepared.config
        if rank == 0:
            print(announcement(prepared, world_size, device), flush=True)
        if prepared.is_finished:
            return 0
        if store is not None and world_size > 1:
            with journal.waits("the process group"):
                start_process_group(store, rank, world_size, device, timeout)
        code = train(prepared, build_parallel_context(config.grid(world_size), device, timeout, journal))
        end_process_group()  # at a clean end only: after a failure NCCL would wait here for ranks that never come
        return code


def agree_on_start(
    ranks: BeforeStart, held: ExitStack, config: Config, local_rank: int, check_data: bool, accepted: Collection[str]
) -> tuple[Prepared, torch.device]:
    """Find out together what the run starts with (``start.py`` draws the rounds); rank 0's lock goes into ``held``."""
    rank, output = ranks.rank, Path(config.train.output)
    with ranks.round("inputs") as mine:
        inputs = look_at_inputs(config, ranks.world_size, check_data, accepted)
        mine.facts = facts_of(inputs)
        start = find_start(inputs.config, inputs.notes.append) if rank == 0 else Start()
        mine.told = name_start(start, inputs.config)
    names = mine.heard
    with ExitStack() as probing:
        with ranks.round("checkpoint") as mine:
            start = start if rank == 0 else open_start(names, inputs.config, rank)
            prepared = settle(inputs, start, accepted)
            if check_data:
                build_indices(prepared.config, prepared.resume, prepared.data_notes)
            device = choose_device(prepared.config, local_rank)
            check_machine(prepared.config, device)
            if rank == 0:  # the one that reports
                check_trackers(config.log.trackers)
            if rank == 0 and not prepared.is_finished:
                held.enter_context(only_writer(output))
                mine.told = probing.enter_context(probe_file(output))
        if not prepared.is_finished:
            with ranks.round("folder"):
                if rank:
                    look_for_probe(output, mine.heard, rank)
    return prepared, device


def check_machine(config: Config, device: torch.device) -> None:
    """Refuse what this rank's device or libraries cannot do."""
    check_here(config)
    select_backends(config.kernels, kernel_requirements(config, device))
    fp8.check_here(config.kernels, device)
    cuda_graph.check_here(config.kernels, device)
    check_compiler(config)


def choose_device(config: Config, local_rank: int) -> torch.device:
    """The GPU of this local rank, or the CPU."""
    wanted = config.train.device
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(4, "train.device=cuda", "needs a GPU that torch can see", "use train.device=auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            5,
            f"local rank {local_rank}",
            f"has no GPU: this node has {torch.cuda.device_count()}",
            "start as many ranks a node as it has GPUs",
        )
    return torch.device("cuda", local_rank)


def layout_line(config: Config, world_size: int) -> str:
    """The parallel layout and the size of a step, in one line."""
    parallel, run = config.parallel, config.train
    pp = parallel.pipeline_model_parallel_size
    pipeline = "" if pp == 1 else f"PP {pp} x "
    sequence_parallel = " with sequence parallelism" if parallel.sequence_parallel else ""
    sharded = "" if parallel.shard_size is None else f" ({parallel.shard} sharded over {parallel.shard_size})"
    if parallel.shard != "optimizer" and not sharded:
        sharded = f" ({parallel.shard} sharded)"
    context_parallel = f"CP {parallel.context_parallel_size} x " if parallel.context_parallel_size > 1 else ""
    return (
        f"{world_size} ranks = TP {parallel.tensor_model_parallel_size}{sequence_parallel} x "
        f"{context_parallel}{pipeline}"
        f"DP {config.data_parallel_size(world_size)}{sharded}; "
        f"step = {run.global_batch_size} samples x {config.data.seq_length} tokens = {config.tokens_per_step:,} tokens "
        f"(micro-batch {run.micro_batch_size}, {config.grad_accum(world_size)} accumulated)"
    )


def pipeline_lines(config: Config, world_size: int) -> list[str]:
    """What each stage of a pipeline has, how alike they are, and how long ranks wait for each other; or nothing."""
    pipeline, split = config.pipeline(), config.layer_split()
    if pipeline.ranks == 1:
        return []
    imbalance, accumulated = config.stage_costs().imbalance(split, pipeline.ranks), config.grad_accum(world_size)
    whose = "by work" if config.parallel.pipeline_split is None else "parallel.pipeline_split"
    several = "" if pipeline.stages_per_rank == 1 else f", {pipeline.stages_per_rank} on each rank"
    return [
        f"pipeline: {pipeline.num_stages} stages{several}, layers {' '.join(map(str, split))} ({whose}), embedding "
        f"with the first and head with the last; the busiest rank has {imbalance:.2f} times the mean work; with "
        f"{accumulated} micro-batches a rank waits {pipeline.idle_share(accumulated):.0%} of a step for others"
    ]


def describe(prepared: Prepared, world_size: int) -> str:
    """What ``train.dry_run=true`` prints."""
    config = prepared.config
    required = kernel_requirements(config, torch.device("cpu"))
    automatic: dict[str, Any] = dict.fromkeys(TABLES, "auto")  # this machine need not be the one
    plain = dataclasses.replace(config.kernels, **automatic)
    lines = [
        to_yaml(config),
        f"parameters: {count_parameters(config.model):,}",
        f"layout: {layout_line(config, world_size)}",
        *pipeline_lines(config, world_size),
        *forecast(config, world_size, select_backends(plain, required)),
    ]
    if prepared.plan is not None:
        lines.append(format_plan(prepared.plan))
    return "\n".join(lines + [f"note: {note}" for note in prepared.notes + prepared.data_notes])


def announcement(prepared: Prepared, world_size: int, device: torch.device) -> str:
    """The first lines of a run."""
    config, resume = prepared.config, prepared.resume
    lines = [f"note: {note}" for note in prepared.notes + prepared.data_notes]
    if prepared.plan is not None and not prepared.is_finished:
        lines.append(format_plan(prepared.plan))
    lines.append(
        f"{count_parameters(config.model):,} parameters in {config.train.precision} on {device.type}; "
        f"{layout_line(config, world_size)}"
    )
    lines += pipeline_lines(config, world_size)
    required = kernel_requirements(config, device)
    lines.append(kernels_table(config.kernels, required))
    if warning := missing_kernels(config.kernels, required):
        lines.append(warning)
    rows, micro_batches = select_backends(config.kernels, required), config.grad_accum(world_size)
    pp = config.parallel.pipeline_model_parallel_size
    kept = max(activation_bytes(config, rows, pp_rank=rank, micro_batches=micro_batches) for rank in range(pp)) / 2**30
    of = "each micro-batch" if pp == 1 else "the micro-batches in flight, on the rank with most"
    lines.append(f"activations: about {kept:.2f} GiB kept of {of} (train.recompute={config.train.recompute})")
    if resume is not None and prepared.is_finished:
        lines.append(
            f"finished: {resume.folder} is at step {resume.step} of {config.train.num_steps}; nothing left to do"
        )
    elif resume is not None:
        lines.append(f"resuming from {resume.folder}")
        lines += prepared.changes
    elif prepared.init_from is not None:
        lines.append(f"starting from the weights of {prepared.init_from.folder}")
    return "\n".join(lines)


@contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Hold the run's lock, which ends with the process, however it ends.

    Raises:
        RefusedError: another process is writing to the same folder.
    """
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("a") as lock:
        if not take_lock(lock.fileno(), output / ".lock"):
            raise RefusedError(
                81,
                f"train.output={output}",
                "is in use by another run",
                "wait for that run to end or choose another folder",
            )
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield
