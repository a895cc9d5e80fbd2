"""The numbers of a step on their way to the host, where they are read a step later.

A GPU does what its stream is given in order, and reading a tensor joins the queue: read when the next step has been
launched, a loss would come after that whole step, and the GPU would stand still until Python has launched another one.
So the copies are begun right behind the step. They have a stream of their own, for one of the numbers is summed over
all ranks, and messages of one group of ranks go one after the other (NCCL's rule for a communicator): behind those that
bring the new weights together, where data-parallel ranks are all ranks. The next forward waits for the weights of its
first layer, and not for them all::

    stream   step 1          | step 2                  | step 3
    NCCL            | weights 1, sum |         | weights 2, sum |
    copies                           | of 1 |                   | of 2 |
    Python   launches 1, 2           | waits for "of 1" | launches 3 while 2 runs
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class LateNumbers:
    """Copies of small tensors in host memory, begun when this is made; on a CPU the tensors themselves.

    Args:
        under_way: handle of the collective that fills one of them.
        stream: of the GPU that they are on, on which nothing else is done but this; None on a CPU.
    """

    def __init__(self, tensors: Sequence[Tensor], under_way: Any, stream: torch.cuda.Stream | None) -> None:
        self._copies, self._under_way, self._event = list(tensors), under_way, None
        if stream is None:
            return
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            under_way.wait()  # the stream does
            for tensor in tensors:
                tensor.record_stream(stream)  # its memory is not used again before the copy
            self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # torch takes pinned memory
            self._event = torch.cuda.Event(blocking=True)  # the core is for others meanwhile
            self._event.record(stream)

    def wait(self) -> list[Tensor]:
        """The copies, when they are there: waits for what came before them on the device, and for nothing after."""
        if self._event is None:
            self._under_way.wait()
        else:
            self._event.synchronize()
        return self._copies
