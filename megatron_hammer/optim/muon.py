"""Muon for the matrices of the layers, AdamW for everything else, on the same shards.

    m = beta m + (1 - beta) g;   u = beta m + (1 - beta) g;   w = w (1 - lr decay) - lr 0.2 sqrt(max(rows, cols)) O(u)

with O from ``kernels/newton_schulz.py``. Momentum and its Nesterov form are Keller Jordan's; as O does not see the
length of u, a running mean is the same as his sum. The factor is Moonlight's (arXiv 2502.16982, section 2.2, equation
4; ``adjust_lr_for_muon`` of MoonshotAI/Moonlight; torch.optim.Muon's ``match_rms_adamw``): it gives the update the root
mean square of one of AdamW, so that lr and decay of AdamW are kept. Embedding, head, norms and biases are not maps
between hidden states and stay with AdamW, as in both.

Each rank has momentum for its shards only (``buckets.py``); O alone needs whole matrices, logical ones, so that a
layout changes no number (``matrices.py``)::

    on the shards   m, u                                     element by element
    all-to-all      u to the owners of matrices              N / n of the N elements of matrices to and from each of n
                    meanwhile: AdamW on the other shards     ranks, in the type of the products: 2 bytes in bf16
    on the owner    O, matrices of one shape at a time       batched products
    all-to-all      the pieces of O back                     as much again; under tensor parallelism beyond the query
                                                             groups a little more, for the copies of keys and values
    on the shards   w

in rounds, so that messages and products need the same memory for a model of any size (``matrices.py``), and a
round's directions are on their way while the matrices of the one before are computed.

Where states are divided among neighbours only (``parallel.shard_size``), messages stay among these, and each copy of
the states computes the same. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels import newton_schulz
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.argument_types import MuonState, ShardState
from megatron_hammer.kernels.newton_schulz import orthogonalise
from megatron_hammer.optim.adamw import AdamW, AnyStore, master_of
from megatron_hammer.optim.buckets import Stretch
from megatron_hammer.optim.matrices import ELEMENTS_OF_A_ROUND, Exchange, Matrix, MatrixPiece, Tables, plan_exchange
from megatron_hammer.parallel.collectives import start_exchange

RMS = 0.2
"""Root mean square of an update: AdamW's "is usually around 0.2 to 0.4" (arXiv 2502.16982), of which they take 0.2."""


@dataclass(frozen=True)
class _Underway:
    """The directions of a round, on their way to the owners of its matrices."""

    directions: Tensor
    """Left as it is until all have been sent."""
    received: Tensor
    handle: Any


def update_scale(rows: int, cols: int) -> float:
    """What an orthogonalised matrix is multiplied by: its elements have a root mean square of 1 / sqrt(longer side)
    (lemma 1 there)."""
    return RMS * math.sqrt(max(rows, cols))


_Place = tuple[MatrixPiece, MuonState, int]
"""A piece, the state that it lies in, and where it begins there."""


class Muon(AdamW):
    """States of one rank's shards, begun from the weights that are in the store.

    Args:
        tables: of each stage, the parameter table of each tensor-parallel rank.
        one_by_one: never two matrices in a product: its bits then do not depend on how many a rank has.
    """

    def __init__(
        self,
        store: AnyStore,
        config: OptimizerConfig,
        kernels: OptimizerKernels | None,
        tables: Tables,
        one_by_one: bool = False,
    ) -> None:
        super().__init__(store, config, kernels)
        self.group, device = store.ctx.whole, store.ctx.device
        self.dtype = newton_schulz.type_of_products(config.newton_schulz, store.sum_dtype, device)
        layouts = [of_stage.layout for of_stage in store.of_stages]
        exchange = plan_exchange(layouts, tables, self.group.rank, newton_schulz.flops, config.muon_per_head)
        self.rounds = [(part, self._places(part)) for part in exchange.rounds(ELEMENTS_OF_A_ROUND)]
        """The matrices of each, and where the pieces of this rank lie in its states, rank by rank as they are sent."""
        self.at_once = 1 if one_by_one else ELEMENTS_OF_A_ROUND

    def _begin(self, stretch: Stretch) -> ShardState:
        if not stretch.parts[0].parameter.is_hidden_matrix:
            return super()._begin(stretch)
        weight, param = master_of(stretch)
        return MuonState(weight, stretch.grad, torch.zeros_like(stretch.grad), stretch.decay, param)

    def _places(self, exchange: Exchange) -> list[_Place]:
        origins: dict[str, tuple[MuonState, int]] = {}  # where a parameter, of which a rank has one part, would begin
        for stretch, state in zip(self.stretches, self.states, strict=True):
            at = 0
            for part in stretch.parts:
                if isinstance(state, MuonState):
                    origins[part.parameter.name] = state, at - part.start
                at += part.stop - part.start
        pieces = [piece for of_rank in exchange.sent for piece in of_rank]
        found = [(piece, *origins[piece.row.name]) for piece in pieces]
        return [(piece, state, origin + piece.start) for piece, state, origin in found]

    # ---- a step ----------------------------------------------------------------------------------------------------

    def _update(self, lr: float, divisor: Tensor, applied: Tensor) -> None:
        following = (self._start(exchange, places, divisor, applied) for exchange, places in self.rounds)
        underway = next(following)
        super()._update(lr, divisor, applied)
        kept = 1 - lr * self.config.weight_decay * applied.to(self.store.sum_dtype)
        matrices = [state for state in self.states if isinstance(state, MuonState)]
        for state in matrices:
            state.weight.mul_(kept)
        for exchange, places in self.rounds:
            underway.handle.wait()
            received = underway.received
            underway = next(following, underway)
            updates = self._come_back(self._orthogonalised(exchange, received), exchange)
            self._apply(places, updates, lr, applied)
        for state in matrices:
            if state.param is not None:
                state.param.copy_(state.weight)

    def _start(self, exchange: Exchange, places: Sequence[_Place], divisor: Tensor, applied: Tensor) -> _Underway:
        """Start to send a round's directions to the owners of its matrices."""
        out, back = (exchange.sizes(pieces, copies=False) for pieces in (exchange.sent, exchange.received))
        directions, received = self._directions(places, divisor, applied), self._new(sum(back))
        return _Underway(directions, received, start_exchange(received, directions, self.group, back, out))

    def _come_back(self, results: Tensor, exchange: Exchange) -> Tensor:
        """The updates of this rank's pieces, from those of the matrices that it owns."""
        out, back = (exchange.sizes(pieces, copies=True) for pieces in (exchange.received, exchange.sent))
        updates = self._new(sum(back))
        start_exchange(updates, results, self.group, back, out).wait()
        return updates

    def _directions(self, places: Sequence[_Place], divisor: Tensor, applied: Tensor) -> Tensor:
        """The new momentum of a round's pieces, and the message of u: one piece after the other, without copies."""
        if not places:
            return self._new(0)
        beta = self.config.muon_momentum
        gradient = torch.cat([state.grad[start : start + piece.numel] for piece, state, start in places])
        momentum = torch.cat([state.exp_avg[start : start + piece.numel] for piece, state, start in places])
        # Where nothing is applied the momentum takes the place of the gradient, so that it stays as it is.
        torch.where(applied, gradient.div_(divisor), momentum, out=gradient)
        momentum.lerp_(gradient, 1 - beta)
        at = 0
        for piece, state, start in places:
            state.exp_avg[start : start + piece.numel].copy_(momentum[at : at + piece.numel])
            at += piece.numel
        message = gradient.lerp_(momentum, beta).to(self.dtype)
        if all(piece.owned for piece, _, _ in places):
            return message
        parts = message.split([piece.numel for piece, _, _ in places])
        return torch.cat([part for part, (piece, _, _) in zip(parts, places, strict=True) if piece.owned])

    def _orthogonalised(self, exchange: Exchange, received: Tensor) -> Tensor:
        """The message of the updates, from that of the directions: one piece after the other, with copies."""
        into: dict[Matrix, list[tuple[MatrixPiece, int]]] = {matrix: [] for matrix in exchange.mine}
        back: dict[Matrix, list[tuple[MatrixPiece, int]]] = {matrix: [] for matrix in exchange.mine}
        for places, copies in ((into, False), (back, True)):
            at = 0
            for piece in (piece for pieces in exchange.received for piece in pieces if piece.owned or copies):
                places[piece.matrix].append((piece, at))
                at += piece.numel
        results = self._new(at)
        for batch in self._batches(exchange.mine):
            rows, cols = sorted(batch[0].shape)
            stack = self._new(len(batch) * rows * cols).view(len(batch), rows, cols)
            for matrix, wide in zip(batch, stack, strict=True):
                _copy(received, matrix, wide, into[matrix], to_matrix=True)
            stack = orthogonalise(stack).mul_(update_scale(rows, cols))
            for matrix, wide in zip(batch, stack, strict=True):
                _copy(results, matrix, wide, back[matrix], to_matrix=False)
        return results

    def _batches(self, matrices: Sequence[Matrix]) -> Iterator[Sequence[Matrix]]:
        """Matrices of one shape, lying or standing, as many as are computed at once."""
        order = sorted(matrices, key=lambda matrix: sorted(matrix.shape))
        for shape, found in groupby(order, key=lambda matrix: sorted(matrix.shape)):
            equal, most = list(found), max(1, self.at_once // math.prod(shape))
            for start in range(0, len(equal), most):
                yield equal[start : start + most]

    def _apply(self, places: Sequence[_Place], updates: Tensor, lr: float, applied: Tensor) -> None:
        """Move the masters of a round's pieces."""
        updates.mul_(applied)
        at = 0
        for piece, state, start in places:
            state.weight[start : start + piece.numel].add_(updates[at : at + piece.numel], alpha=-lr)
            at += piece.numel

    def _new(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.store.ctx.device)


def _copy(
    message: Tensor, matrix: Matrix, wide: Tensor, places: Sequence[tuple[MatrixPiece, int]], to_matrix: bool
) -> None:
    """Between the pieces of a matrix in a message and the matrix, which lies with its shorter side in rows."""
    whole = wide if wide.shape == matrix.shape else wide.mT
    for piece, at in places:
        for box in piece.boxes:
            assert box.cols is not None
            view = whole[slice(*box.rows), slice(*box.cols)]
            flat = message[at + box.position : at + box.position + box.numel].view(box.shape)
            view.copy_(flat) if to_matrix else flat.copy_(view)
