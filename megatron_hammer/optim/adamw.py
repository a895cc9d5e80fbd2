"""AdamW on this rank's shards: fp32 masters and moments, the norm of the whole model's gradient, and the update.

The store says what this rank updates (``stretches``) and what it counts (``counted``); the arithmetic, with clipping,
unscaling and the decision to skip inside, is ``kernels/adamw.py``. In fp32 the masters are the weights themselves.
Norm, divisor and the decision are device scalars, so nothing here waits for the device.

Another optimizer is another class over the same stretches. One that works on elements (Lion, SGD) has the shape of this
one. One that needs whole matrices (Muon) would take them from the ``parts`` of stretches where a store shards by whole
parameters, and leave norms, embedding and head to this class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.arguments import AdamWState
from megatron_hammer.optim.layout import Stretch
from megatron_hammer.optim.stage_stores import StageStores
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.parallel.sharding import Shard

AnyStore = FlatStore | StageStores


class AdamW:
    """Masters and moments of one rank's shards, begun from the weights that are in the store.

    Args:
        kernels: what to compute with.
    """

    def __init__(self, store: AnyStore, config: OptimizerConfig, kernels: OptimizerKernels | None = None) -> None:
        self.store, self.config, self.kernels = store, config, kernels or OptimizerKernels()
        self.stretches = store.stretches()
        self.states = [_state(stretch) for stretch in self.stretches]
        self.updates = torch.zeros((), device=store.ctx.device)
        """Updates applied so far, fp32 scalar."""

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Norm of the whole model's gradient as it is summed, scaled by the loss scale: a device scalar in fp32.

        Each logical element counts once: copies on other tensor-parallel ranks do not. Communicates over the world.
        """
        return self.store.square_sum(self.kernels.add_square_sum).sqrt()

    @torch.no_grad()
    def step(self, lr: float, divisor: Tensor, applied: Tensor) -> None:
        """Update the shards and start to gather the new weights. Communicates over dp.

        Args:
            divisor: fp32 device scalar by which gradients are divided.
            applied: device bool, equal on all ranks; where false nothing changes.
        """
        self.store.wait()  # for an update that no forward has read: it may still be on its way to the others
        self.kernels.update(self.states, self.updates, lr, self.config, divisor, (~applied).float())
        self.store.gather()

    @torch.no_grad()
    def copy_params_from_masters(self) -> None:
        """Round this rank's masters to the model's dtype and gather everybody's. Communicates over dp."""
        self.store.wait()
        for state in self.states:
            if state.param is not None:
                state.param.copy_(state.weight)
        self.store.gather()

    @torch.no_grad()
    def copy_masters_from_params(self) -> None:
        """Start from the weights that the model has now."""
        self.store.wait()
        for state in self.states:
            if state.param is not None:
                state.weight.copy_(state.param)

    def shards(self) -> list[Shard]:
        """This rank's part of the logical state: views, so that loading writes straight into the optimizer."""
        self.store.wait()
        return list(self._shards())

    def _shards(self) -> Iterator[Shard]:
        is_copy = self.store.ctx.copies.rank > 0
        for stretch, state in zip(self.stretches, self.states, strict=True):
            kinds, at = {"weight": state.weight, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}, 0
            for part in stretch.parts:
                n = part.stop - part.start
                tensors = {kind: tensor[at : at + n] for kind, tensor in kinds.items()}
                yield Shard(part.parameter, part.start, part.stop, tensors, is_copy)
                at += n


def _state(stretch: Stretch) -> AdamWState:
    """Moments of zero; in 16 bits a master, in fp32 the weights themselves."""
    param, grad, exp_avg, exp_avg_sq = stretch.param, stretch.grad, *(torch.zeros_like(stretch.grad) for _ in range(2))
    if param.dtype == grad.dtype:
        return AdamWState(param, grad, exp_avg, exp_avg_sq, stretch.decay)
    return AdamWState(param.float(), grad, exp_avg, exp_avg_sq, stretch.decay, param)
