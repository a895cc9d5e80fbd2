"""A micro-batch's forward and backward as one CUDA graph (``kernels.cuda_graph``).

A step launches some thousand kernels from Python, one after the other. Where a GPU finishes them faster than Python can
launch them (small micro-batches, much tensor parallelism) it waits for Python. A CUDA graph holds the launches of one
micro-batch with all their addresses; the next micro-batch is copied to where the first one lay, and one call launches
everything again. What is recorded must therefore depend on no value (nothing is read back), keep its shapes, and find
its tensors where they were: weights and sums of gradients lie in the store's buffers, everything between in memory that
the graphs own.

The first micro-batch of a step writes over the sums of gradients and the others add to them, so there are two graphs.
Neither holds the reduction over data-parallel ranks: it starts after the last replay, and backward hides none of it.

Under tensor parallelism the graphs hold collectives. NCCL ends a group of ranks when no graph is left that it is part
of, and waits for that for ever (``commDestroySync`` of NCCL 2.30), so the run gives its graphs up before its groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import KernelsConfig
from megatron_hammer.model.llama import Stage
from megatron_hammer.optim.store import FlatStore
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.schedules import MicroBatch, micro_batch

# Runs before the recording, as often as a first micro-batch of a step and as one that adds to it: what is made at a
# first call (handles, workspaces, compiled kernels, those of the other sum among them) must exist by then.
WARM_UP_RUNS = 3


class Replay(Protocol):
    """A recorded piece of work."""

    def replay(self) -> None:
        """Do all of it once more, on the same memory."""
        ...

    def reset(self) -> None:
        """Forget it; it is not replayed again."""
        ...


class Recorder(Protocol):
    """Records what a function launches."""

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        """Run it once, without recording."""
        ...

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """The work and the tensor that it returned, which every replay fills anew; it need not have run yet."""
        ...

    def wait(self) -> None:
        """Until nothing of it runs any more."""
        ...


class CudaGraphs:
    """Records CUDA graphs that share their memory: no two of them run at once."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # what runs before a recording must not run on the default stream

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        """On a stream of its own, as the recording."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def record(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Nothing runs. Of other threads (the one that reads ahead, NCCL's watchdog) nothing is asked."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            output = work()
        return graph, output

    def wait(self) -> None:
        """Until no stream of the device runs anything any more."""
        torch.cuda.synchronize()


class GraphedMicroBatch:
    """``schedules.micro_batch`` by replay; the first call records it.

    Args:
        store: that of the model; ``begin`` is called before each micro-batch, as without graphs.
    """

    def __init__(self, store: FlatStore, recorder: Recorder) -> None:
        self.store, self.recorder = store, recorder
        self.inputs: tuple[Tensor, ...] = ()
        self.replays: dict[bool, tuple[Replay, Tensor]] = {}

    def __call__(self, model: Stage, batch: Batch[Tensor], share: Tensor, z_loss: float) -> Tensor:
        """A copy of what the graph left, which the next replay overwrites."""
        store = self.store
        first, last, watch = store.first, store.last, store.watch
        inputs = [t for t in (share, batch.tokens, batch.labels, batch.loss_weights) if t is not None]
        if not self.replays:
            self._record(model, batch, inputs, z_loss, firsts=[True] if last else [True, False])
        store.begin(first, last, watch)
        store.wait()  # what is recorded waits for nothing that was started outside
        assert len(inputs) == len(self.inputs), "some micro-batches have loss weights and others have none"
        for place, value in zip(self.inputs, inputs, strict=True):
            assert place.shape == value.shape, f"recorded for {tuple(place.shape)}, given {tuple(value.shape)}"
            place.copy_(value, non_blocking=True)
        replay, losses = self.replays[first]
        replay.replay()
        for gradient in store.gradients:  # the last of a bucket starts its reduction
            gradient.ready()
        return losses.clone()

    def close(self) -> None:
        """Give the graphs up; the next call would record again."""
        self.recorder.wait()
        for replay, _ in self.replays.values():
            replay.reset()
        self.replays.clear()

    def _record(
        self, model: Stage, batch: Batch[Tensor], inputs: list[Tensor], z_loss: float, firsts: list[bool]
    ) -> None:
        """For the first micro-batch of a step and for the others; what this leaves in the sums is written over."""
        assert batch.documents is None, "under document masks the shapes differ from one micro-batch to the next"
        self.store.wait()
        self.inputs = tuple(t.clone(memory_format=torch.contiguous_format) for t in inputs)
        share, tokens, labels = self.inputs[:3]
        placed = Batch(tokens, labels, None if batch.loss_weights is None else self.inputs[3])

        def work() -> Tensor:
            return micro_batch(model, placed, share, z_loss)

        for first in firsts * WARM_UP_RUNS:
            self.store.begin(first, last=False)
            self.recorder.warm_up(work)
        for first in firsts:
            self.store.begin(first, last=False)  # nothing is reduced inside of a graph
            self.replays[first] = self.recorder.record(work)


def check_here(kernels: KernelsConfig, device: torch.device) -> None:
    """Raises ``ConfigError`` where graphs are asked for and this rank has no GPU: before its first collective."""
    if kernels.cuda_graph and device.type != "cuda":
        raise ConfigError(16, "kernels.cuda_graph=true", f"needs a GPU, not {device.type}", "leave it out")


def micro_batch_runner(kernels: KernelsConfig, store: FlatStore) -> MicroBatch:
    """What runs each micro-batch of a run: ``micro_batch`` itself, or its graphs where the config asks for them."""
    return GraphedMicroBatch(store, CudaGraphs()) if kernels.cuda_graph else micro_batch


def give_up(run: MicroBatch) -> None:
    """What a runner of micro-batches holds of the GPU and of groups of ranks, at its end."""
    if isinstance(run, GraphedMicroBatch):
        run.close()
