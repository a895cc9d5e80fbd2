"""Begins a run on all ranks: they agree on inputs, folder and checkpoint, build the model, and load the checkpoint.

::

    Beginning.agree     round "inputs"       every rank looks at config, tokenizer, datasets
                        round "output"       rank 0 takes the lock of train.output and removes what killed runs left
                        round "search"       rank 0 looks for the checkpoint, passing over what is damaged
                        round "checkpoint"   all open that very one; what has changed; devices and kernels, the same
                        round "folder"       all see rank 0's folder
    begin               builds the run and loads, each rank its own part. Every byte is verified on the way; where one
                        is wrong, all ranks learn of it, and repeat the rounds from "search" on without this checkpoint
                        round "order"        rank 0 puts aside what the run does not go on from

The tensors of a checkpoint are read once, when they are loaded: to verify them before would double the time of a start.
What was loaded from a damaged one is thrown away with the objects that it was loaded into.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from megatron_hammer.base.errors import CheckpointError, ConfigError
from megatron_hammer.base.progress import say
from megatron_hammer.checkpoint.folder import is_damage
from megatron_hammer.config import Config
from megatron_hammer.costs.comparison import Prediction, device_name
from megatron_hammer.costs.shortage import memory_of, refuse_far_too_large
from megatron_hammer.kernels import fp8
from megatron_hammer.kernels.backend import Backend
from megatron_hammer.kernels.libraries.te import check_here
from megatron_hammer.kernels.selection import kernel_requirements, select_backends
from megatron_hammer.metrics.trackers import check_trackers
from megatron_hammer.parallel.agreement import BeforeStart, Fact
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train import corruption, cuda_graph
from megatron_hammer.train.build import check_compiler
from megatron_hammer.train.loop import TrainLoop
from megatron_hammer.train.output import LockedOutput, clear_output, is_read_only, only_writer, put_in_order
from megatron_hammer.train.prepare import (
    Prepared,
    StartingPoint,
    build_large_indices,
    find_starting_point,
    look_at_inputs,
    settle,
)
from megatron_hammer.train.start import facts_of, look_for_probe, name_starting_point, open_starting_point, probe_file


class Beginning:
    """One rank's part in finding out what the run starts with.

    Args:
        held: takes rank 0's lock of the output folder, which then lasts as long as the run.
        check_data: False where the launcher has looked through the datasets already.
        accepted: names of what may differ from the checkpoint that the run resumes from.
    """

    def __init__(
        self,
        ranks: BeforeStart,
        held: ExitStack,
        config: Config,
        local_rank: int,
        check_data: bool = True,
        accepted: Collection[str] = (),
    ) -> None:
        self.ranks, self._held, self._config, self._local_rank = ranks, held, config, local_rank
        self._check_data, self._accepted = check_data, accepted
        self._folder = Path(config.train.output)
        self._read_only: OSError | None = None
        self._cleaned: list[str] = []
        self._damage: dict[str, str] = {}
        self._turns = 0
        self.output: LockedOutput | None = None
        """On rank 0, the folder that it holds the lock of."""
        self.device = torch.device("cpu")
        """This rank's; there once the ranks have agreed."""
        self.prediction: Prediction | None = None
        """On rank 0, of memory and speed, where no formula failed."""
        self.predicted = ""
        """The line for it."""

    def agree(self) -> Prepared:
        """Hold all rounds.

        Raises:
            HammerError: the same on all ranks.
        """
        with self.ranks.round("inputs") as mine:
            self._inputs = look_at_inputs(self._config, self.ranks.world_size, self._check_data, self._accepted)
            mine.facts = facts_of(self._inputs)
        with self.ranks.round("output"):
            if self.ranks.rank == 0:
                self._take_output()
        return self._agree_on_checkpoint()

    def agree_without(self, damaged: str, reason: str) -> Prepared:
        """Hold the rounds about the checkpoint again; this one turned out damaged when it was loaded."""
        self._damage[damaged] = reason
        return self._agree_on_checkpoint()

    def _turn(self) -> str:
        """What tells the names of rounds apart that are held more than once."""
        self._turns += 1
        return f"-{self._turns}" if self._turns > 1 else ""

    def _take_output(self, is_new: bool = False) -> None:
        if not (is_new or os.path.lexists(self._folder)):
            return  # nothing to look at yet: a start that is refused makes no folder
        try:
            self.output = self._held.enter_context(only_writer(self._folder, is_new))
            self._cleaned = clear_output(self._folder)
        except OSError as error:  # a finished run says so from a folder that nobody may write to
            if not is_read_only(error):
                raise
            self._read_only = error

    def _agree_on_checkpoint(self) -> Prepared:
        rank, ranks, again = self.ranks.rank, self.ranks, self._turn()
        with ranks.round(f"search{again}") as mine:
            start = (
                find_starting_point(self._inputs.config, self._accepted, self._damage) if rank == 0 else StartingPoint()
            )
            mine.sent = name_starting_point(start, self._inputs.config)
        names = mine.received
        with ExitStack() as probing:
            with ranks.round(f"checkpoint{again}") as mine:
                start = start if rank == 0 else open_starting_point(names, self._inputs.config, rank)
                prepared = settle(self._inputs, start, self._accepted)
                backends = self._look_here(prepared)
                if not prepared.is_finished:
                    mine.facts = facts_of_machine(self.device, backends)
                if rank == 0 and not prepared.is_finished:
                    if self.output is None and self._read_only is None:
                        self._take_output(is_new=True)
                    if self._read_only is not None:
                        raise self._read_only
                    mine.sent = probing.enter_context(probe_file(self._folder))
            if not prepared.is_finished:
                with ranks.round(f"folder{again}"):
                    if rank:
                        look_for_probe(self._folder, mine.received, rank)
        notes, self._cleaned = prepared.notes + self._cleaned + _damage_lines(prepared), []
        return dataclasses.replace(prepared, notes=notes)

    def put_in_order(self, prepared: Prepared) -> None:
        """Put aside what the run does not go on from, now that the state it goes on from is there."""
        with self.ranks.round(f"order{self._turn()}"):
            if self.output is not None:
                resumed = None if prepared.resume is None else prepared.resume.step
                passed = prepared.taken_back, prepared.rewinds
                for line in put_in_order(self._folder, prepared.damaged, prepared.is_fresh, resumed, *passed):
                    say(line)
        self._damage = {}  # what was damaged has another name now

    def _look_here(self, prepared: Prepared) -> dict[str, Backend]:
        """What is found out on each rank by itself; returns the backend of every operation."""
        if self._check_data:
            build_large_indices(prepared)
        self.device = device_of_rank(prepared.config, self._local_rank)
        backends = check_machine(prepared.config, self.device)
        if self.ranks.rank == 0:  # the one that reports
            check_trackers(self._config.log.trackers)
            self._predict(prepared)
        return backends

    def _predict(self, prepared: Prepared) -> None:
        """Say what the run will need, and refuse what is far beyond this machine."""
        config, world_size = prepared.config, self.ranks.world_size
        self.prediction, self.predicted = Prediction.of(config, world_size, self.device)
        if self.prediction is not None and not prepared.is_finished:
            needed = sum(self.prediction.parts.values())
            refuse_far_too_large(needed, config, world_size, device_name(self.device), memory_of(self.device))


def _damage_lines(prepared: Prepared) -> list[str]:
    """Which checkpoints are passed over, why, and what that costs."""
    lines = [f"checkpoint {damaged.path} is damaged: {damaged.reason}" for damaged in prepared.damaged]
    if prepared.damaged and prepared.resume is not None:
        step, lost = prepared.resume.step, prepared.damaged[0].step
        lines.append(
            f"going on from step {step} costs {lost - step} of the steps that were done, from {step + 1} to {lost}"
        )
    return lines


def begin(
    beginning: Beginning,
    prepared: Prepared,
    ctx: ParallelContext,
    announce: Callable[[Prepared], None],
    when_finished: bool = False,
) -> TrainLoop | None:
    """Build the run and load its state; from an older checkpoint where the newest turns out to be damaged.

    Args:
        announce: called with a line on what the run goes on from instead.
        when_finished: build one that has reached its end, too, for who looks at it.

    Returns:
        the run; None where what it goes on from instead is its end.

    Raises:
        HammerError: on all ranks.
    """
    while when_finished or not prepared.is_finished:
        try:
            run = TrainLoop(prepared, ctx, output=beginning.output, prediction=beginning.prediction)
            beginning.put_in_order(prepared)
            return run
        except CheckpointError as error:
            if prepared.resume is None or not is_damage(error):
                raise
            damaged, reason = prepared.resume.folder.name, str(error)
        prepared = beginning.agree_without(damaged, reason)  # outside, where the error no longer holds the objects
        announce(prepared)
    beginning.put_in_order(prepared)
    return None


def facts_of_machine(device: torch.device, backends: Mapping[str, Backend]) -> list[Fact]:
    """What a rank computes with, which must be the same on all.

    A node whose driver does not work would train on its CPU and wait for the others in another library than they for
    it; one that lacks our compiled kernels would have all others wait for it in every step, without a word.
    """
    facts = [
        Fact("the device", "device is", device.type, "look at GPUs and driver of the node without (nvidia-smi)"),
        Fact("torch", "torch is", torch.__version__, "install the same on every node"),
    ]
    for operation, backend in backends.items():
        what, remedy = f"kernels.{operation}", f"install the same on every node, or set kernels.{operation}"
        facts.append(Fact(what, f"{what} takes", backend.name, remedy))
    return facts


def check_machine(config: Config, device: torch.device) -> dict[str, Backend]:
    """Refuse what this rank's device or libraries cannot do; returns the backend that runs each operation."""
    check_here(config)
    backends = select_backends(config.kernels, kernel_requirements(config, device))
    corruption.check_here(config, backends, device)
    fp8.check_here(config.kernels, device)
    cuda_graph.check_here(config.kernels, device)
    check_compiler(config)
    return backends


def device_of_rank(config: Config, local_rank: int) -> torch.device:
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
