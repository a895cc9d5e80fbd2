"""The gradient of one weight outside of a store: what the tests of operations hand over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OneGradient:
    """Holds garbage until it is written, sums what is added, and counts how often it was complete."""

    version = 0

    def __init__(self, weight: Tensor) -> None:
        self.main_grad = torch.full(weight.shape, torch.nan, dtype=torch.float32, device=weight.device)
        self.begun, self.complete = torch.tensor(False), 0

    def add(self, write: Callable[[Tensor, bool], Any], last: bool = True) -> Any:
        begun, self.begun = bool(self.begun), torch.tensor(True)
        result = write(self.main_grad, begun)
        if last:
            self.ready()
        return result

    def ready(self) -> None:
        self.complete += 1
