"""AdamW on this rank's shards: fp32 masters and moments, the norm of the whole model's gradient, and the update.

The store says what this rank updates (``stretches``) and what it counts (``counted``); the arithmetic, with clipping,
unscaling and the decision to skip inside, is ``kernels/adamw.py``. In fp32 the masters are the weights themselves.
Norm, divisor and the decision are device scalars, so nothing here waits for the device.

Another optimizer is another class over the same stretches. One that works on elements (Lion, SGD) has the shape of
this one. One that needs whole matrices (Muon, ``muon.py``) puts them together from the pieces of all ranks, and leaves
norms, embedding and head to this class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.argument_types import AdamWState, ShardState
from megatron_hammer.optim.buckets import Stretch
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
        self.states = [self._begin(stretch) for stretch in self.stretches]
        self.by_element = [state for state in self.states if isinstance(state, AdamWState)]
        """Those that are updated element by element: here all."""
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
        self._update(lr, divisor, applied)
        self.store.gather()

    def _update(self, lr: float, divisor: Tensor, applied: Tensor) -> None:
        """Change this rank's masters, moments and weights."""
        self.kernels.update(self.by_element, self.updates, lr, self.config, divisor, (~applied).float())

    def _begin(self, stretch: Stretch) -> ShardState:
        """Moments of zero; in 16 bits a master, in fp32 the weights themselves."""
        weight, param = master_of(stretch)
        exp_avg, exp_avg_sq = (torch.zeros_like(stretch.grad) for _ in range(2))
        return AdamWState(weight, stretch.grad, exp_avg, exp_avg_sq, stretch.decay, param)

    @torch.no_grad()
    def copy_params_from_masters(self) -> None:
        """Round this rank's masters to the model's dtype and gather everybody's. Communicates over dp."""
        self.store.wait()
        for state in self.states:
            if state.param is not None:
                state.param.copy_(state.weight)
        self.store.gather()

    def shards(self) -> list[Shard]:
        """This rank's part of the logical state: views, so that loading writes straight into the optimizer."""
        self.store.wait()
        return list(self.own_shards())

    def own_shards(self) -> Iterator[Shard]:
        """The same without waiting for weights that are on their way to other ranks."""
        is_copy = self.store.ctx.copies.rank > 0
        for stretch, state in zip(self.stretches, self.states, strict=True):
            kinds, at = state.kinds, 0
            for part in stretch.parts:
                n = part.stop - part.start
                tensors = {kind: tensor[at : at + n] for kind, tensor in kinds.items()}
                yield Shard(part.parameter, part.start, part.stop, tensors, is_copy)
                at += n


def master_of(stretch: Stretch) -> tuple[Tensor, Tensor | None]:
    """The fp32 weights that are updated, and the model's 16-bit copy of them where these are two."""
    if stretch.param.dtype == stretch.grad.dtype:
        return stretch.param, None
    return stretch.param.float(), stretch.param
