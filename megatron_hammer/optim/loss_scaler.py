"""The loss scale of fp16, whose small gradients would be rounded to zero (arXiv 1710.03740).

The loss is multiplied by a scale before backward, and the gradients are divided by it in the update. The scale halves
after a step whose gradients overflow, which is not applied, and doubles after ``loss_scale_window`` good steps in a
row. In other precisions it is 1 and stays so. All of it is device scalars: the host never waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_hammer.config import OptimizerConfig


class LossScaler:
    """The scale, and how many good steps it has lasted.

    Args:
        adapts: for fp16; false: the scale is 1.
    """

    def __init__(self, config: OptimizerConfig, device: torch.device, adapts: bool) -> None:
        self.window, self.adapts = config.loss_scale_window, adapts
        self.scale = torch.full((), config.initial_loss_scale if adapts else 1.0, device=device)
        """What the loss is multiplied by before backward: fp32 device scalar."""
        self.good_steps = torch.zeros((), device=device)

    def adapt(self, applied: Tensor) -> None:
        """After a step; applied: device bool, false where the gradients were not finite."""
        if not self.adapts:
            return
        good = torch.where(applied, self.good_steps + 1, 0)
        full = good >= self.window
        grown = torch.where(full, self.scale * 2, self.scale)
        self.scale = torch.where(applied, grown, (self.scale / 2).clamp(min=1.0))
        self.good_steps = torch.where(full, 0, good)
