"""The optimizer as a training step and a checkpoint use it: store, update rule and loss scale behind one class.

One step, as ``train/step.py`` runs it: the micro-batches' backward fills the store (``store.begin``), and the last one
starts the reduction of the gradients; ``clip_grad_norm`` finishes it and takes the norm; ``step`` updates the shards,
or not, on every rank, where the norm is not finite, and starts to gather the weights, which forward waits for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig
from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.ranges import OPTIMIZER, RangeOf, no_range
from megatron_hammer.optim.adamw import AdamW, AnyStore
from megatron_hammer.optim.loss_scaler import LossScaler
from megatron_hammer.optim.matrices import Tables
from megatron_hammer.optim.muon import Muon
from megatron_hammer.parallel.sharding import Shard


class Optimizer:
    """The optimizer of one rank, made when the model's weights have their first values.

    Args:
        loss_scaling: for fp16: multiply the loss by a scale, and adapt that.
        kernels: what the update computes with.
        range_of: entered around the norm and the update, for a profiler.
        tables: of each stage of this rank, the parameter table of each tensor-parallel rank; None where there is one.
        one_by_one: the same bits for any number of data-parallel ranks, where the rule can give them.
    """

    def __init__(
        self,
        store: AnyStore,
        config: OptimizerConfig,
        loss_scaling: bool = False,
        kernels: OptimizerKernels | None = None,
        range_of: RangeOf = no_range,
        tables: Tables | None = None,
        one_by_one: bool = False,
    ) -> None:
        self.range_of = range_of
        device = store.ctx.device
        self.store = store
        if config.style == "muon":
            tables = tables or [[of_stage.table] for of_stage in store.of_stages]
            self.rule: AdamW = Muon(store, config, kernels, tables, one_by_one)
        else:
            self.rule = AdamW(store, config, kernels)
        self.before_update: Callable[[], None] = lambda: None
        """Called before weights and moments change: whoever copies them has that wait (``train/saver.py``)."""
        self.scaler = LossScaler(config, device, loss_scaling)
        self.divisor, self.applied = torch.ones((), device=device), torch.ones((), dtype=torch.bool, device=device)
        self.finite, self.norm = self.applied, torch.zeros((), device=device)
        self.limits: tuple[float, float] | None = None
        """What loss and norm of the next step may be at most, or nothing is updated; None: whatever they are."""

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Norm of the whole model's gradient before clipping (fp32 device scalar); the update will divide accordingly.

        Finishes the reduction of the gradients. Communicates over dp, tp and the world.
        """
        self.store.ctx.status.mark("reducing gradients, norm")
        with self.range_of(OPTIMIZER):
            self.store.reduce()
            norm = self.rule.grad_norm() / self.scaler.scale
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)
            self.applied = self.finite = norm.isfinite()
            self.norm = norm
            self.divisor = (self.scaler.scale / factor).float()
        return norm

    def hold_back(self, where: Tensor) -> None:
        """Leave out the update of this step where a device bool, equal on all ranks, is true."""
        self.applied = self.applied & ~where

    @torch.no_grad()
    def step(self, lr: float, loss: Tensor | None = None) -> Tensor:
        """Update the weights everywhere; returns a device bool, equal on all ranks: was it applied?

        Args:
            loss: of the step, held against ``limits``; a device scalar, equal on all ranks.
        """
        if self.limits is not None and loss is not None:
            most_loss, most_norm = self.limits
            self.applied = self.applied & (loss <= most_loss) & (self.norm <= most_norm)
        self.store.ctx.status.mark("updating weights")
        self.before_update()
        with self.range_of(OPTIMIZER):
            self.rule.step(lr, self.divisor, self.applied)
            self.scaler.adapt(self.finite)
        return self.applied

    # ---- state for checkpoints -------------------------------------------------------------------------------------

    def shards(self) -> list[Shard]:
        """This rank's part of the logical state: views, so that loading writes straight into the optimizer."""
        return self.rule.shards()

    def copy_params_from_masters(self) -> None:
        """The model's weights from what has been loaded into the shards. Communicates over dp."""
        self.rule.copy_params_from_masters()

    def scalar_state(self) -> dict[str, float]:
        """The few numbers beside the tensors; waits for the device."""
        scalars = {
            "updates": self.rule.updates,
            "loss_scale": self.scaler.scale,
            "good_steps": self.scaler.good_steps,
        }
        return {name: float(value) for name, value in scalars.items()}

    def load_scalar_state(self, state: dict[str, float]) -> None:
        """The inverse of ``scalar_state``."""
        for owner, attribute, name in (
            (self.rule, "updates", "updates"),
            (self.scaler, "scale", "loss_scale"),
            (self.scaler, "good_steps", "good_steps"),
        ):
            setattr(owner, attribute, torch.full_like(getattr(owner, attribute), state[name]))
