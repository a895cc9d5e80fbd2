"""The numbers of a step on their way to the host, where they are read a step later.

A GPU does what its stream is given in order, and reading a tensor joins the queue: read when the next step has been
launched, a loss would come after that whole step, and the GPU would stand still until Python has launched another one.
So the copies are begun right behind the step::

    stream   step 1 | copies of 1 | step 2             | copies of 2 | step 3
    Python   launches 1, 2        | waits for "copies of 1" | launches 3 while 2 runs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class LateNumbers:
    """Copies of small tensors in host memory, begun when this is made; on a CPU the tensors themselves."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # torch takes pinned memory
        places = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
        self._there = [torch.cuda.Event(blocking=True) for _ in places]  # the core is for others meanwhile
        for event in self._there:
            event.record()

    def wait(self) -> list[Tensor]:
        """The copies, when they are there: waits for what came before them on the device, and for nothing after."""
        for event in self._there:
            event.synchronize()
        return self._copies
