"""The drift check: whether the copies of weights and optimizer states on several ranks are still equal to the bit.

If copies differ, ranks train different models and report one normal-looking loss. The cause may be a bit flip in
memory, a kernel that computes differently on one device, a truncated message, or a mistake in this code. The parameter
table says which copies there are, whatever the layout: each rectangle of a logical tensor that more than one rank
has, as a norm under tensor parallelism, key and value rows beyond the number of query groups, everything under data
parallelism::

    weight         as the model computes with it                         on every rank that has the rectangle
    master, exp_avg, exp_avg_sq    the optimizer's, each group of ranks  on every group that has the rectangle
                   that shares one copy adding up its parts
    optimizer      updates, loss scale, good steps                       on every rank
    rounded        whether 16-bit weights are what the rank's masters    on the rank itself
                   round to

A check hashes the bits (``kernels/bit_hash.py``) and compares with one small all-reduce, and one more before it where
several groups hold the same optimizer state in parts. It launches only; the verdict is read with the numbers of the
step. When something differs, the ranks to blame are those in the minority; in a tie, those that differ from the ranks
that update the weight, each its part.

The check runs before an update, since a gather overwrites what had changed in the copies of others, and before a
checkpoint, which is not written where ranks differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from megatron_hammer.base.errors import DriftError
from megatron_hammer.checkpoint.kinds import shapes_of
from megatron_hammer.config import Config
from megatron_hammer.kernels.bit_hash import INTEGERS, BitHash
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.collectives import MAX, all_gather_rows, all_reduce, read_back
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.parallel.placement import Range, place
from megatron_hammer.parallel.sharding import ParameterLike, SliceLike

WEIGHT, MASTER, OPTIMIZER, ROUNDED = "weight", "master", "optimizer", "rounded"
STATES = {MASTER: "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}  # ours -> the kind of a ``Shard``
ABSENT = -(2**63)  # below every hash but one in 2^64; what a rank says of what it does not hold
SHOWN_RANKS = 8


@dataclass(frozen=True)
class HeldTensor:
    """A part of a logical tensor, or a scalar, that ranks hold, alike where more than one does (a replica)."""

    kind: str
    tensor: str
    """Logical tensor, or a scalar of the optimizer."""
    rows: Range | None = None
    cols: Range | None = None

    @classmethod
    def of(cls, kind: str, s: SliceLike) -> HeldTensor:
        """The rectangle of a slice of the table."""
        return cls(kind, s.tensor, s.rows, s.cols)

    def __str__(self) -> str:
        where = ""
        if self.rows is not None and self.cols is not None:
            where = f"[{self.rows[0]}:{self.rows[1]}, {self.cols[0]}:{self.cols[1]}]"
        name = {WEIGHT: "", ROUNDED: "", OPTIMIZER: "the optimizer's "}.get(self.kind, f"{self.kind} of ")
        return f"{name}{self.tensor}{where}"


@dataclass(frozen=True)
class DriftReport:
    """What a check has found; the tensors stay on the device until the loop reads them."""

    step: int
    found: Tensor
    """Bool, the same on all ranks: something differs."""
    hashes: Tensor
    """[2, items] int64: of what this rank has of each item, and of the part of each weight that it updates."""


@dataclass(frozen=True)
class _ItemPart:
    """A part of an item that this rank has: [start, stop) of tensor ``source``, from element ``first`` of the item."""

    item: int
    source: int
    start: int
    stop: int
    first: int


OwnedRange = tuple[ParameterLike, int, int]
"""[start, stop) of a flattened parameter."""


class DriftCheck:
    """The check of one run. Made on all ranks at once: communicates over the world."""

    def __init__(self, config: Config, optimizer: Optimizer, ctx: ParallelContext) -> None:
        self.optimizer, self.ctx = optimizer, ctx
        self.groups = config.grid(ctx.world.size).groups("shard")
        """Of ranks that hold one copy of the optimizer's state in parts, as ``ctx.sharing`` is one."""
        table, states = optimizer.store.table, optimizer.rule.states
        in_16_bits = any(state.param is not None for state in states)
        kinds = [WEIGHT, *STATES, ROUNDED] if in_16_bits else [WEIGHT, *(kind for kind in STATES if kind != MASTER)]
        names = {kind: shapes_of(config.model, STATES.get(kind, kind), config.optimizer.style) for kind in kinds}
        held = {
            HeldTensor.of(kind, s) for kind in kinds for row in table for s in row.slices if s.tensor in names[kind]
        }
        held |= {HeldTensor(OPTIMIZER, name) for name in self._scalars()}
        self.items = self._in_common(config, kinds, held)
        self.index = {item: i for i, item in enumerate(self.items)}
        self.absent = self._mask(item not in held for item in self.items)
        self.is_state = self._mask(item.kind in STATES and item in held for item in self.items)
        self.is_rounded = self._mask(item.kind == ROUNDED for item in self.items)
        self.has_states = any(item.kind in STATES for item in self.items)
        self.weights = list(self._pieces(WEIGHT, [(row, 0, row.numel) for row in table]))
        shards: list[OwnedRange] = [(shard.parameter, shard.start, shard.stop) for shard in optimizer.shards()]
        self.states = {kind: list(self._pieces(kind, shards)) for kind in STATES}
        self.updated = list(self._updated(WEIGHT)) if self.ctx.sharing.size > 1 else []
        self.rounded = list(self._updated(ROUNDED))
        self.hash = BitHash(ctx.device, max(row.numel for row in table))

    def _scalars(self) -> dict[str, Tensor]:
        """What the optimizer has beside its tensors."""
        rule, scaler = self.optimizer.rule, self.optimizer.scaler
        return {"updates": rule.updates, "loss scale": scaler.scale, "good steps": scaler.good_steps}

    def _mask(self, values: Iterable[bool]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.bool, device=self.ctx.device)

    def _in_common(self, config: Config, kinds: Sequence[str], held: set[HeldTensor]) -> list[HeldTensor]:
        """The items of the whole model of which there are copies, and what a rank can check by itself."""
        tp = self.ctx.tp.size
        placed = [place(config.model, rank, tp) for rank in range(tp)]  # each with all stages
        slices = [s for at in placed for row in parameter_table(config.model, at) for s in row.slices]
        items = list(dict.fromkeys(HeldTensor.of(kind, s) for kind in kinds for s in slices))
        items += [HeldTensor(OPTIMIZER, name) for name in self._scalars()]
        holders = torch.tensor([item in held for item in items], dtype=torch.int64, device=self.ctx.device)
        all_reduce(holders, self.ctx.world)
        enough = dict.fromkeys(STATES, 2 * self.ctx.sharing.size) | {ROUNDED: 1}
        counts = read_back(holders, self.ctx.world)
        return [item for item, n in zip(items, counts, strict=True) if n >= enough.get(item.kind, 2)]

    def _pieces(self, kind: str, parts: Sequence[OwnedRange]) -> Iterator[_ItemPart]:
        """What each part has of each item of this kind."""
        for source, (row, start, stop) in enumerate(parts):
            for s in row.slices:
                item, origin = self.index.get(HeldTensor.of(kind, s)), s.local_row * s.num_cols
                first, last = max(start, origin), min(stop, origin + s.num_rows * s.num_cols)
                if item is not None and first < last:
                    yield _ItemPart(item, source, first - start, last - start, first - origin)

    def _updated(self, kind: str) -> Iterator[_ItemPart]:
        """What each of the tensors that this rank updates has of each item of this kind."""
        for source, stretch in enumerate(self.optimizer.rule.stretches):
            at = 0
            for part in stretch.parts:
                for piece in self._pieces(kind, [(part.parameter, part.start, part.stop)]):
                    yield replace(piece, source=source, start=at + piece.start, stop=at + piece.stop)
                at += part.stop - part.start

    # ---- a check -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(self, step: int) -> DriftReport:
        """Compare. Never waits for the device; communicates over the world, and over dp where that shares state."""
        shards, states = self.optimizer.shards(), self.optimizer.rule.states  # which waits for weights on their way
        updated = [state.weight if state.param is None else state.param for state in states]
        hashes = torch.zeros((2, len(self.items)), dtype=torch.int64, device=self.ctx.device)
        self._add_hashes_of_weights(hashes[0])
        self._add_hashes(hashes[1], self.updated, dict(enumerate(updated)))
        for kind, pieces in self.states.items():
            of_kind = {i: s.tensors[STATES[kind]] for i, s in enumerate(shards) if STATES[kind] in s.tensors}
            self._add_hashes(hashes[0], pieces, of_kind)
        for piece in self.rounded:
            has, master = (t[piece.start : piece.stop] for t in (updated[piece.source], states[piece.source].weight))
            bits = INTEGERS[has.element_size()]
            hashes[0, piece.item] += (has.view(bits) != master.to(has.dtype).view(bits)).sum()
        for name, scalar in self._scalars().items():
            if (item := self.index.get(HeldTensor(OPTIMIZER, name))) is not None:
                hashes[0, item] = self.hash(scalar)
        hashes[0].masked_fill_(self.absent, ABSENT)
        return DriftReport(step, self._compare(hashes[0].clone()), hashes)

    def _add_hashes_of_weights(self, hashes: Tensor) -> None:
        """As the model has them; a part of it at a time, where they are there only while they are used."""
        rows = [
            (store, row.part, weight)
            for store in self.optimizer.store.of_stages
            for row, weight in zip(store.table, store.weights, strict=True)
        ]
        for (store, part), pieces in groupby(self.weights, key=lambda piece: rows[piece.source][:2]):
            store.acquire(part)
            for piece in pieces:
                flat = rows[piece.source][2].view(-1)
                hashes[piece.item] += self.hash(flat[piece.start : piece.stop], piece.first)
            store.release(part)

    def _add_hashes(self, hashes: Tensor, pieces: Sequence[_ItemPart], tensors: Mapping[int, Tensor]) -> None:
        for piece in pieces:
            hashes[piece.item] += self.hash(tensors[piece.source][piece.start : piece.stop], piece.first)

    def _compare(self, values: Tensor) -> Tensor:
        """Bool scalar: whether two ranks hold something else, or a rank's weights are not its masters rounded."""
        if self.has_states:
            sums = torch.where(self.is_state, values, 0)
            all_reduce(sums, self.ctx.sharing)
            values = torch.where(self.is_state, sums, values)
        # The largest of all, and the largest of all complements: the complement of the smallest.
        extremes = torch.stack([values, torch.where(self.absent, ABSENT, ~values)])
        all_reduce(extremes, self.ctx.world, MAX)
        return torch.where(self.is_rounded, extremes[0] > 0, extremes[0] != ~extremes[1]).any()

    # ---- who differs -------------------------------------------------------------------------------------------------

    def raise_on(self, report: DriftReport, saving: bool = False) -> None:
        """Read a report, on all ranks; waits for the device. Communicates over the world where something differs.

        Args:
            saving: it was the check before a checkpoint, which is then not written.

        Raises:
            DriftError: on all ranks, with the first item that differs and its ranks.
        """
        if not read_back(report.found, self.ctx.world):
            return
        gathered = all_gather_rows(report.hashes.unsqueeze(0), self.ctx.world)
        with (
            self.ctx.status.waits()
        ):  # of which a collective leaves nothing: it says that it is over, on a GPU too soon
            hashes = gathered.cpu().numpy()  # [world, 2, items]
        # What a rank finds wrong by itself leaves no doubt whose it is.
        order = sorted(range(len(self.items)), key=lambda i: self.items[i].kind != ROUNDED)
        found = [(self.items[i], blame) for i in order if (blame := self._blame(self.items[i], *hashes[:, :, i].T))]
        item, (odd, others) = found[0]
        if item.kind == ROUNDED:
            rule = f"is not what its fp32 master rounds to, on {_ranks(odd)}"
        elif others:
            rule = f"on {_ranks(odd)} is not what {_ranks(others)} {'holds' if len(others) == 1 else 'hold'}"
        else:
            rule = f"is not the same on {_ranks(odd)}"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise DriftError(
            1,
            f"step {report.step}{', not saved' if saving else ''}: {item}",
            rule + more,
            "run the same command again, which goes on from the newest checkpoint; where the same rank is named again, "
            "take its device out of use (docs/errors.md)",
        )

    def _blame(self, item: HeldTensor, values: np.ndarray, updated: np.ndarray) -> tuple[list[int], list[int]] | None:
        """The ranks that are wrong, and those they were held against; None where all is well.

        Args:
            values, updated: [world] int64 each: the item's hash on each rank, and that of the part that it updates.
        """
        holders = [int(rank) for rank in np.flatnonzero(values != ABSENT)]
        if item.kind == ROUNDED:
            odd = [rank for rank in holders if values[rank] > 0]
            return (odd, []) if odd else None
        groups = [group for group in self.groups if group[0] in holders]
        if item.kind in STATES:
            return _blame_parts({tuple(group): tuple(values[group].tolist()) for group in groups})
        counts = Counter(values[holders].tolist()).most_common()
        if len(counts) == 1:
            return None
        right = dict.fromkeys(holders, counts[0][0])
        if counts[0][1] == counts[1][1]:  # undecided: the ranks that update it have the last word
            right = {rank: int(updated[group].sum()) for group in groups for rank in group}
        odd = [rank for rank in holders if values[rank] != right[rank]]
        others = [rank for rank in holders if rank not in odd]
        return (odd, others) if odd and others else (holders, [])


def _blame_parts(copies: dict[tuple[int, ...], tuple[int, ...]]) -> tuple[list[int], list[int]] | None:
    """The same of optimizer state, of which each group of ranks has a copy in parts: the hash of each part."""
    odd: set[int] = set()
    others: set[int] = set()
    for i in range(len(next(iter(copies)))):
        here = {group[i]: parts[i] for group, parts in copies.items()}
        counts = Counter(here.values()).most_common()
        if len(counts) > 1:
            decided = counts[0][1] > counts[1][1]
            wrong = {rank for rank, part in here.items() if not decided or part != counts[0][0]}
            odd |= wrong
            others |= here.keys() - wrong
    return (sorted(odd), sorted(others)) if odd else None


def _ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, or ``ranks 1, 2 and 3``."""
    shown = [str(rank) for rank in ranks[:SHOWN_RANKS]]
    if len(ranks) == 1:
        return f"rank {shown[0]}"
    if len(ranks) > SHOWN_RANKS:
        return f"ranks {', '.join(shown)} and {len(ranks) - SHOWN_RANKS} others"
    return f"ranks {', '.join(shown[:-1])} and {shown[-1]}"
