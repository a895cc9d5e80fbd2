"""The check for silent data corruption: whether a rank computes the same bits twice.

A processor that is failing gives wrong numbers and no error (arXiv 2102.11245). Where only one rank has a number, as
the gradient of its own micro-batch, no comparison with other ranks finds that (``drift.py``). So every K steps
(``train.sdc_check_interval_steps``) the first micro-batch is run once more, with the backends that the run has, all of
which give the same bits each time::

    micro-batch 1, alone     forward, backward    hashes of what each bucket of gradients holds    nothing is reduced
    micro-batch 1            forward, backward    the same hashes, before the bucket is reduced    the step as always
    micro-batch 2 ...        forward, backward
    before the update        the hashes are compared, and one number is reduced over all ranks     differs: no update

It costs one micro-batch and two passes over its gradients, every K steps: at 100 0.3 % of the time with four
micro-batches a step, about 1 % with one. The run without it has the same bits, because the first micro-batch of a step
writes over whatever is there.

What a rank has computed wrongly it sends on, so others differ too. The first is found by the place in the order of the
work: forward through the stages of a pipeline, then backward, each from the last parameter to the first. Ranks that
share each micro-batch (tensor and context parallelism) and differ from the same place on are named together.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError, DriftError
from megatron_hammer.config import Config
from megatron_hammer.kernels.backend import Backend
from megatron_hammer.kernels.bit_hash import whole_hash
from megatron_hammer.model.llama import Model, stages_of
from megatron_hammer.optim.buckets import Bucket
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.parallel.agreement import gather_values
from megatron_hammer.parallel.collectives import MAX, all_reduce, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.train.incident_file import write_down

SHOWN = 8  # parameters of a rank, in the incident

LOSSES, HIDDEN, SENT_BACK = "the losses", "the hidden states", "the gradient of the hidden states"


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that a rank computes from a micro-batch, by its name and when it is there."""

    name: str
    """``LOSSES``, ``HIDDEN``, ``SENT_BACK``, or that of the parameter, in the table, whose gradient it is."""
    turn: int
    """Of the pipeline's work: forward of stage i is i, backward of the last stage comes behind forward of that."""
    place: int
    """Within the turn."""

    @property
    def order(self) -> tuple[int, int]:
        """Of the work: what has the lower one is computed first."""
        return self.turn, self.place

    @property
    def is_gradient(self) -> bool:
        """Of a parameter."""
        return self.name not in (LOSSES, HIDDEN, SENT_BACK)


@dataclass(frozen=True)
class CorruptionReport:
    """What a check has found; the tensors stay on the device until the loop reads them."""

    step: int
    found: Tensor
    """Bool, the same on all ranks: something differs on one of them."""
    differs: Tensor
    """[items] bool: of this rank."""


class Pass:
    """One of the two runs of the first micro-batch (``GradientWatch`` in ``optim/store.py``)."""

    def __init__(self, check: CorruptionCheck, alone: bool) -> None:
        self._check, self.alone = check, alone
        """Whether it is the one that leaves nothing behind."""

    def gradients(self, store: FlatStore, bucket: Bucket) -> None:
        """Those of this micro-batch in a bucket, as this rank alone has computed them."""
        for i in bucket.parameters:
            self._take((self._check.number_of[store], i), store.gradients[i].main_grad)

    def output(self, n: int, computed: Tensor) -> None:
        """What the forward of this rank's n-th stage has returned."""
        self._take((n, "output"), computed)

    def sent_back(self, n: int, gradient: Tensor) -> None:
        """What its backward sends to the stage before."""
        self._take((n, SENT_BACK), gradient)

    def _take(self, key: tuple[int, int | str], tensor: Tensor) -> None:
        check = self._check
        check.hashes[0 if self.alone else 1, check.index[key]] = check.hash(tensor)


class CorruptionCheck:
    """The check of one run."""

    def __init__(self, config: Config, model: Model, optimizer: Optimizer, ctx: ParallelContext) -> None:
        self.config, self.ctx = config, ctx
        stores, numbers = optimizer.store.of_stages, config.pipeline(ctx.pp.rank).stages
        self.number_of = {store: n for n, store in enumerate(stores)}
        last = config.pipeline().num_stages - 1
        self.items: list[ComputedTensor] = []
        self.index: dict[tuple[int, int | str], int] = {}
        for n, (stage, store, number) in enumerate(zip(stages_of(model), stores, numbers, strict=True)):
            back = 2 * last + 1 - number
            self._add((n, "output"), ComputedTensor(LOSSES if stage.placement.has_head else HIDDEN, number, 0))
            for i, row in enumerate(store.table):
                self._add((n, i), ComputedTensor(row.name, back, len(store.table) - i))
            if number > 0:
                self._add((n, SENT_BACK), ComputedTensor(SENT_BACK, back, len(store.table) + 1))
        hidden = config.train.micro_batch_size * config.largest.data.seq_length * config.model.hidden_size
        self.hash = whole_hash(ctx.device, max(hidden, *(row.numel for store in stores for row in store.table)))
        self.hashes = torch.zeros((2, len(self.items)), dtype=torch.int64, device=ctx.device)
        self.alone, self.again = Pass(self, alone=True), Pass(self, alone=False)
        self._forget()

    def _add(self, key: tuple[int, int | str], item: ComputedTensor) -> None:
        self.index[key] = len(self.items)
        self.items.append(item)

    def _forget(self) -> None:
        """So that what neither pass has shown differs, too."""
        self.hashes[0], self.hashes[1] = 0, 1

    def is_due(self, step: int) -> bool:
        """Whether this step's first micro-batch is to be run twice."""
        return step % self.config.train.sdc_check_interval_steps == 0

    def check(self, step: int) -> CorruptionReport:
        """Compare the two passes. Never waits for the device; communicates over the world."""
        differs = self.hashes[0] != self.hashes[1]
        found = differs.any().to(torch.int64)
        all_reduce(found, self.ctx.world, MAX)
        self._forget()
        return CorruptionReport(step, found > 0, differs)

    def raise_on(self, report: CorruptionReport, incident: Path) -> None:
        """Read a report, on all ranks; waits for the device. Communicates over the world where something differs.

        Args:
            incident: file to write down all that differs in, on rank 0.

        Raises:
            DriftError: E1102, on all ranks, with the ranks where it began and the first parameter that differs.
        """
        if not read_back(report.found, self.ctx.world):
            return
        places = sorted(report.differs.nonzero().flatten().tolist(), key=lambda i: self.items[i].order)
        mine = [self.items[i] for i in places]
        gradients = [item.name for item in mine if item.is_gradient]
        tree = {
            "rank": self.ctx.world.rank,
            "host": socket.gethostname(),
            "order": mine[0].order if mine else None,
            "differs": [item.name for item in mine][: SHOWN + 1],
            "parameters": len(gradients),
            "first_parameter": gradients[0] if gradients else None,
        }
        ranks = [rank for rank in gather_values(self.ctx, tree) if rank["order"] is not None]
        earliest = min(rank["order"] for rank in ranks)
        first = [rank for rank in ranks if rank["order"] == earliest]
        written = write_down(incident, _record(report.step, first, ranks), self.ctx)
        who = " and ".join(f"rank {rank['rank']} (host {rank['host']})" for rank in first[:SHOWN])
        after = len(ranks) - len(first)
        more = f" (then on {after} more rank{'s' if after > 1 else ''}, which computed with it)" if after else ""
        raise DriftError(
            2,
            f"step {report.step}: {_differing(first[0])} on {who}",
            f"had other bits when the first micro-batch was run again{more}",
            "nothing was updated: run the same command again, which goes on from the newest checkpoint; where the same "
            f"rank is named again, take its device out of use ({written}; docs/errors.md)",
        )


def _record(step: int, first: Sequence[dict[str, Any]], ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is written down of it."""
    shown = [{key: rank[key] for key in rank if key != "order"} for rank in ranks]
    record = {"step": step, "finding": "silent data corruption", "action": "stop"}
    return record | {"first_ranks": [rank["rank"] for rank in first], "ranks": shown}


def _differing(rank: dict[str, Any]) -> str:
    """What differs on a rank, in words: the first thing, and the first parameter."""
    name, parameter = rank["differs"][0], rank["first_parameter"]
    if parameter is None:
        return str(name)
    others = f" (and {rank['parameters'] - 1} more)" if rank["parameters"] > 1 else ""
    gradient = f"the gradient of {parameter}{others}"
    return gradient if name == parameter else f"{name} and {gradient}"


def check_here(config: Config, backends: dict[str, Backend], device: torch.device) -> None:
    """Raises ``ConfigError`` where this rank would not compute the same bits twice: before its first collective."""
    interval = config.train.sdc_check_interval_steps
    if not interval:
        return
    what, remedy = f"train.sdc_check_interval_steps={interval}", "set kernels.deterministic=true, or leave it out"
    for operation, backend in backends.items():
        if not backend.deterministic:
            rule = f"is not for kernels.{operation}={backend.name}, whose bits are not the same from run to run"
            raise ConfigError(24, what, rule, remedy)
    if device.type == "cuda" and not config.kernels.deterministic:
        raise ConfigError(24, what, "needs kernels.deterministic=true on a GPU", remedy)
