"""Muon for the matrices of the layers, AdamW for everything else, on the same shards.

    m = beta m + (1 - beta) g;   u = beta m + (1 - beta) g;   w = w (1 - lr decay) - lr 0.2 sqrt(max(rows, cols)) O(u)

with O from ``kernels/newton_schulz.py``. Momentum and its Nesterov form are Keller Jordan's; as O does not see the
length of u, a running mean is the same as his sum. The factor gives the update the root mean square of one of AdamW,
0.2, so that lr and decay of AdamW are kept (Moonlight, arXiv 2502.16982, section 2.2). Embedding, head, norms and
biases are not maps between hidden states and stay with AdamW, as in both.

Each rank has momentum for its shards only (``layout.py``); O alone needs whole matrices, logical ones, so that a layout
changes no number (``matrices.py``)::

    on the shards   m, u                                     element by element
    all-to-all      u to the owners of matrices              N / n of the N elements of matrices to and from each of n
                    meanwhile: AdamW on the other shards     ranks, in the type of the products: 2 bytes in bf16
    on the owner    O, matrices of one shape at a time       batched products
    all-to-all      the pieces of O back                     as much again; under tensor parallelism beyond the query
                                                             groups a little more, for the copies of keys and values
    on the shards   w

Where states are divided among neighbours only (``parallel.shard_size``), messages stay among these, and each copy of
the states computes the same. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels import newton_schulz
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.arguments import MuonState, ShardState
from megatron_hammer.kernels.newton_schulz import orthogonalise
from megatron_hammer.optim.adamw import AdamW, AnyStore, master_of
from megatron_hammer.optim.layout import Stretch
from megatron_hammer.optim.matrices import Matrix, MatrixPiece, Tables, plan_exchange
from megatron_hammer.parallel.collectives import start_exchange

RMS = 0.2
"""Root mean square of an update: what AdamW's mostly has (arXiv 2502.16982, section 2.2)."""
ELEMENTS_AT_ONCE = 2**26
"""Of matrices in one product: 128 MiB in bf16, and twice that beside it."""


def update_scale(rows: int, cols: int) -> float:
    """What an orthogonalised matrix is multiplied by: its elements have a root mean square of 1 / sqrt(longer side)."""
    return RMS * math.sqrt(max(rows, cols))


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
        self.exchange = plan_exchange(layouts, tables, self.group.rank, newton_schulz.flops, config.muon_per_head)
        self.elements_at_once = 1 if one_by_one else ELEMENTS_AT_ONCE
        self.shards_of = list(self._shards_of_pieces())
        """Where each piece of this rank lies in a state, rank by rank as they are sent."""

    def _begin(self, stretch: Stretch) -> ShardState:
        if not stretch.parts[0].parameter.is_hidden_matrix:
            return super()._begin(stretch)
        weight, param = master_of(stretch)
        return MuonState(weight, stretch.grad, torch.zeros_like(stretch.grad), stretch.decay, param)

    def _shards_of_pieces(self) -> Iterator[list[tuple[MatrixPiece, MuonState, int]]]:
        """(piece, state, its place in this) of what each rank is sent."""
        origins: dict[str, tuple[MuonState, int]] = {}  # where a parameter, of which a rank has one part, would begin
        for stretch, state in zip(self.stretches, self.states, strict=True):
            at = 0
            for part in stretch.parts:
                if isinstance(state, MuonState):
                    origins[part.parameter.name] = state, at - part.start
                at += part.stop - part.start
        for pieces in self.exchange.sent:
            found = [(piece, *origins[piece.row.name]) for piece in pieces]
            yield [(piece, state, origin + piece.start) for piece, state, origin in found]

    # ---- a step ----------------------------------------------------------------------------------------------------

    def _update(self, lr: float, divisor: Tensor, applied: Tensor) -> None:
        out, back = ([self.exchange.sizes(pieces, copies) for pieces in (self.exchange.sent, self.exchange.received)]
                     for copies in (False, True))  # fmt: skip
        directions, received = self._directions(sum(out[0]), divisor, applied), self._new(sum(out[1]))
        handle = start_exchange(received, directions, self.group, out[1], out[0])
        super()._update(lr, divisor, applied)
        handle.wait()
        results, updates = self._orthogonalised(received, sum(back[1])), self._new(sum(back[0]))
        start_exchange(updates, results, self.group, back[0], back[1]).wait()
        self._apply(updates, lr, applied)

    def _directions(self, size: int, divisor: Tensor, applied: Tensor) -> Tensor:
        """The new momentum, and the message of u: one piece after the other, without copies."""
        beta, found = self.config.muon_momentum, {}
        for state in self.states:
            if isinstance(state, MuonState):
                # Where nothing is applied the momentum takes the place of the gradient, so that it stays as it is.
                gradient = torch.where(applied, state.grad / divisor, state.exp_avg)
                state.exp_avg.lerp_(gradient, 1 - beta)
                found[id(state)] = gradient.lerp_(state.exp_avg, beta).to(self.dtype)
        message, at = self._new(size), 0
        for piece, state, start in (entry for pieces in self.shards_of for entry in pieces):
            if piece.owned:
                message[at : at + piece.numel].copy_(found[id(state)][start : start + piece.numel])
                at += piece.numel
        return message

    def _orthogonalised(self, received: Tensor, size: int) -> Tensor:
        """The message of the updates, from that of the directions: one piece after the other, with copies."""
        into: dict[Matrix, list[tuple[MatrixPiece, int]]] = {matrix: [] for matrix in self.exchange.mine}
        back: dict[Matrix, list[tuple[MatrixPiece, int]]] = {matrix: [] for matrix in self.exchange.mine}
        for places, copies in ((into, False), (back, True)):
            at = 0
            for piece in (piece for pieces in self.exchange.received for piece in pieces if piece.owned or copies):
                places[piece.matrix].append((piece, at))
                at += piece.numel
        results = self._new(size)
        for batch in self._batches():
            rows, cols = sorted(batch[0].shape)
            stack = self._new(len(batch) * rows * cols).view(len(batch), rows, cols)
            for matrix, wide in zip(batch, stack, strict=True):
                _copy(received, matrix, wide, into[matrix], to_matrix=True)
            stack = orthogonalise(stack).mul_(update_scale(rows, cols))
            for matrix, wide in zip(batch, stack, strict=True):
                _copy(results, matrix, wide, back[matrix], to_matrix=False)
        return results

    def _batches(self) -> Iterator[Sequence[Matrix]]:
        """This rank's matrices of one shape, lying or standing, as many as are computed at once."""
        order = sorted(self.exchange.mine, key=lambda matrix: sorted(matrix.shape))
        for shape, found in groupby(order, key=lambda matrix: sorted(matrix.shape)):
            matrices, most = list(found), max(1, self.elements_at_once // math.prod(shape))
            for start in range(0, len(matrices), most):
                yield matrices[start : start + most]

    def _apply(self, updates: Tensor, lr: float, applied: Tensor) -> None:
        """Decay and move the masters, and round them to the model's weights."""
        updates.mul_(applied)
        kept = 1 - lr * self.config.weight_decay * applied.to(self.store.sum_dtype)
        for state in self.states:
            if isinstance(state, MuonState):
                state.weight.mul_(kept)
        at = 0
        for piece, state, start in (entry for pieces in self.shards_of for entry in pieces):
            state.weight[start : start + piece.numel].add_(updates[at : at + piece.numel], alpha=-lr)
            at += piece.numel
        for state in self.states:
            if isinstance(state, MuonState) and state.param is not None:
                state.param.copy_(state.weight)

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
