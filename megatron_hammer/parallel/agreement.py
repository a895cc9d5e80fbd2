"""How ranks agree on an error: all of them raise it, or none does.

A rank that raises alone would leave the others waiting in their next collective. So work in which a single rank may
fail (reading or writing files) is a block of ``all_or_none`` or ends in ``raise_together``, and start-up goes in rounds
of ``BeforeStart``, which need no process group yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_hammer.base.errors import HammerError, RefusedError, from_fields, from_os_error, to_fields
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.parallel.collectives import MAX, all_gather_rows, all_reduce, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.rendezvous import Store


def raise_together(ctx: ParallelContext, error: HammerError | None) -> None:
    """Raise the lowest failing rank's error on every rank, or return on every rank. Communicates over the world."""
    if ctx.world.size == 1:
        if error is not None:
            raise error
        return
    for text in _gather_texts(ctx, b"" if error is None else json.dumps(to_fields(error)).encode()):
        if text:
            raise from_fields(json.loads(text))


def _gather_texts(ctx: ParallelContext, text: bytes) -> list[bytes]:
    """The text of each rank, on all ranks, in the order of ranks; none where all are empty, which one small message
    finds out. Communicates over the world."""
    size = torch.tensor([len(text)], device=ctx.device)
    all_reduce(size, ctx.world, MAX)
    (longest,) = read_back(size, ctx.world)
    if longest == 0:
        return []
    mine = torch.zeros(1, longest, dtype=torch.uint8, device=ctx.device)
    mine[0, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else 0
    return [bytes(row).rstrip(b"\0") for row in read_back(all_gather_rows(mine, ctx.world), ctx.world)]


@contextmanager
def all_or_none(ctx: ParallelContext, doing: str, place: Path | None = None) -> Iterator[None]:
    """The block is this rank's work; if it failed on any rank, all raise that. Communicates over the world.

    Args:
        doing, place: for an error of the operating system, see ``from_os_error``.
    """
    failure: HammerError | None = None
    try:
        yield
    except HammerError as error:
        failure = error
    except OSError as error:
        failure = from_os_error(error, doing, place=place)
    raise_together(ctx, failure)


def gather_values(ctx: ParallelContext, value: Any) -> list[Any]:
    """A JSON value of each rank, on all ranks, in the order of ranks. Communicates over the world."""
    return [json.loads(text) for text in _gather_texts(ctx, json.dumps(value).encode())]


@dataclass(frozen=True)
class Fact:
    """Something that must be the same on every rank, with what people need to find it where it is not."""

    what: str
    """What is compared: it has this name on all ranks."""
    where: str
    """The file or the setting, as this rank knows it: ``/data/zh.bin has the content``."""
    value: str
    remedy: str
    """What to do where it differs."""


@dataclass
class RoundReport:
    """What one rank brings to a round before the start, and, after it, what rank 0 has sent."""

    facts: list[Fact] = field(default_factory=list)
    """Compared with those of rank 0."""
    sent: Any = None
    """A JSON value that rank 0 lets all ranks know."""
    received: Any = None
    """What rank 0 has sent, on all ranks; there when the round is over."""


class BeforeStart:
    """Rounds of agreement over the rendezvous store: usable before any process group exists.

    In each round every rank does some work of its own. If it fails on one, or ranks find different facts, all ranks
    raise the same error. Rank 0 collects the reports and gives the verdict, so that a round costs each other rank one
    write and one read. A single process has no store and agrees with itself.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int, status: StatusSlot | None = None) -> None:
        self._store, self.rank, self.world_size = store, rank, world_size
        self._status = StatusSlot() if status is None else status

    @contextmanager
    def round(self, name: str) -> Iterator[RoundReport]:
        """The block is this rank's work; afterwards all ranks go on, or all raise.

        Raises:
            HammerError: that of the lowest rank that failed, else a ``RefusedError`` on a fact that differs.
        """
        report, error = RoundReport(), None
        self._status.mark(f"start-up, {name}")
        try:
            yield report
        except HammerError as found:
            error = found
        except OSError as found:
            error = from_os_error(found, "preparing the run")
        if self._store is None:
            if error is not None:
                raise error
            report.received = report.sent
            return
        with self._status.waits(f"agreement on {name}"):
            verdict = self._exchange(self._store, name, report, error)
        if verdict["error"] is not None:
            raise from_fields(verdict["error"])
        report.received = verdict["sent"]

    def _exchange(self, store: Store, name: str, report: RoundReport, error: HammerError | None) -> dict[str, Any]:
        """Hand this rank's report in and return the verdict."""
        place = f"before-start/{name}"
        mine = {
            "error": None if error is None else to_fields(error),
            "facts": [asdict(fact) for fact in report.facts],
            "sent": report.sent,
        }
        store.set(f"{place}/{self.rank}", json.dumps(mine))
        if self.rank == 0:
            reports = [json.loads(store.get(f"{place}/{rank}")) for rank in range(self.world_size)]
            store.set(f"{place}/verdict", json.dumps(_verdict(reports)))
        verdict: dict[str, Any] = json.loads(store.get(f"{place}/verdict"))
        return verdict


def _verdict(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The error that all ranks raise, if there is one, and what rank 0 tells them."""
    error = next((report["error"] for report in reports if report["error"] is not None), None)
    if error is None:
        first, *others = ({fact["what"]: Fact(**fact) for fact in report["facts"]} for report in reports)
        found = (_difference(first, facts, rank) for rank, facts in enumerate(others, start=1))
        different = next((refusal for refusal in found if refusal is not None), None)
        error = None if different is None else to_fields(different)
    return {"error": error, "sent": reports[0]["sent"]}


def _difference(ours: Mapping[str, Fact], theirs: Mapping[str, Fact], rank: int) -> RefusedError | None:
    """The first fact of rank 0 (``ours``) that this other rank finds otherwise, does not have, or has alone."""
    for what in [*ours, *(what for what in theirs if what not in ours)]:
        mine, other = ours.get(what), theirs.get(what)
        if mine is None or other is None:
            there = mine or other
            assert there is not None
            lacks, has = (rank, 0) if other is None else (0, rank)
            return RefusedError(
                85,
                f"rank {lacks}: {what}",
                f"is not there, where rank {has}'s {there.where} {there.value}",
                there.remedy,
            )
        if mine.value != other.value:
            return RefusedError(
                85,
                f"rank {rank}: {other.where} {other.value}",
                f"where rank 0's {mine.where} {mine.value}",
                mine.remedy,
            )
    return None
