"""CUDA graphs of micro-batches, with a stand-in that records torch's operations on a CPU and does them again.

The stand-in holds the rules of a capture: nothing may be read back from a tensor, and a replay runs the recorded
operations on the recorded memory, whatever Python would do now. A GPU's own graphs are tested where there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config, KernelsConfig
from megatron_hammer.kernels.native import cpu
from megatron_hammer.parallel.board import StatusSlot
from megatron_hammer.train import loop
from megatron_hammer.train.cuda_graph import CudaGraphs, GraphedMicroBatch, Recorder, check_here, micro_batch_runner
from megatron_hammer.train.run import run_rank
from megatron_hammer.train.schedules import micro_batch
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.host_waits import WAITING
from tests.model.tiny import build, logical_parts, make_context, rank_batches, tiny_config
from tests.train.runs import config_for, overrides
from tests.train.test_schedules import weighted_batches

PLAIN = dict(  # our compiled kernels do not go through torch's dispatcher, where the stand-in listens
    kernels__norm="torch", kernels__rope="torch", kernels__swiglu="torch", kernels__loss="torch",
    kernels__attention="sdpa",
)  # fmt: skip


@pytest.fixture(autouse=True)
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled sum of 16-bit gradients and no memory of our own either."""
    monkeypatch.setattr(cpu, "COMPILED", None)


class Recording(TorchDispatchMode):
    """Every operation of a region with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        assert name not in WAITING, f"{name} reads a value back: no graph can hold it"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """What an operation returns goes to the memory that it went to before; views and in-place results are there."""
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
                again = func(*args, **kwargs)
                for work in tree_leaves(again):
                    if isinstance(work, torch.ScriptObject):  # of a collective
                        work.wait()  # type: ignore[attr-defined]
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in before:
                        old.copy_(new)

    def reset(self) -> None:
        self.calls.clear()


class Recordings:
    """The stand-in for ``CudaGraphs``."""

    def __init__(self) -> None:
        self.count = self.waits = 0

    def warm_up(self, work: Callable[[], Tensor]) -> None:
        work()

    def record(self, work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
        self.count += 1
        with Recording() as recording:
            output = work()
        return recording, output

    def wait(self) -> None:
        self.waits += 1


def trained(
    rank: int, config: Config, recorder: Callable[[], Recorder] | None, kind: str | None = None
) -> tuple[list[Any], dict[str, Tensor], int]:
    """Losses and norms of three steps, the weights after them, and how many graphs there are."""
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    made = recorder() if recorder else None
    run = GraphedMicroBatch(optimizer.store, made) if made is not None else micro_batch
    numbers = []
    for step in range(1, 4):
        batches = rank_batches(config, step, ctx)
        if kind:
            weights = [batch.loss_weights for batch in weighted_batches(config, kind, ctx)]
            batches = [
                dataclasses.replace(batch, loss_weights=w * step) for batch, w in zip(batches, weights, strict=True)
            ]
        report = train_step(model, optimizer, batches, config, step, ctx, run)
        numbers.append((float(report.loss), float(report.grad_norm), bool(report.applied)))
    return numbers, logical_parts(model, config, ctx), getattr(made, "count", 0)


def equal(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert torch.equal(a[1][name].nan_to_num(7), b[1][name].nan_to_num(7)), name


@pytest.mark.parametrize(
    "changes, kind, recorded",
    [
        ({}, None, 2),
        (dict(train__precision="bf16", train__z_loss=0.01), None, 2),
        (dict(train__precision="fp16"), None, 2),
        (dict(model__tie_word_embeddings=True), None, 2),
        (dict(train__recompute="full"), None, 2),
        (dict(train__recompute="selective"), "weights", 2),
        (dict(train__micro_batch_size=8), "mask", 1),
        (dict(kernels__loss_chunk_tokens=24), None, 2),
    ],
)
def test_replayed_steps_are_equal_in_bits(changes: dict[str, Any], kind: str | None, recorded: int) -> None:
    config = tiny_config(**(PLAIN | changes))
    graphed = trained(0, config, Recordings, kind)
    equal(graphed, trained(0, config, None, kind))
    assert graphed[2] == recorded, "the first micro-batch of a step, and the others"


@pytest.mark.parametrize("tp", [1, 2])
def test_two_ranks(tp: int) -> None:
    """DP 2: the reduction starts after the last replay. TP 2: the collectives of the layers are recorded.

    Sequence parallelism is not tried: gloo's reduce-scatter copies out of a buffer of its own, which no recording has.
    """
    config = tiny_config(**PLAIN, parallel__tensor_model_parallel_size=tp)
    graphed, plain = (run_distributed(2, trained, config, recorder) for recorder in (Recordings, None))
    for a, b in zip(graphed, plain, strict=True):
        equal(a, b)


@pytest.mark.parametrize("micro_batch_size, sums", [(2, {False, True}), (8, {False})])
def test_all_that_is_recorded_has_run_before(micro_batch_size: int, sums: set[bool]) -> None:
    """Kernels that are loaded or compiled at their first call are: those of a micro-batch that adds to sums, too."""
    config = tiny_config(**PLAIN, train__micro_batch_size=micro_batch_size)
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    ran, recorded = list[bool](), list[bool]()

    class Noted(Recordings):
        def warm_up(self, work: Callable[[], Tensor]) -> None:
            ran.append(bool(optimizer.store.begun))
            super().warm_up(work)

        def record(self, work: Callable[[], Tensor]) -> tuple[Recording, Tensor]:
            assert optimizer.store.begun in ran
            recorded.append(bool(optimizer.store.begun))
            return super().record(work)

    run = GraphedMicroBatch(optimizer.store, Noted())
    train_step(model, optimizer, rank_batches(config, 1, ctx), config, 1, ctx, run)
    assert set(ran) == set(recorded) == sums


def test_graphs_are_given_up_before_the_groups_of_ranks(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits for ever for a graph with one of its messages: at a run's end, and where a phase makes new graphs."""
    order, made, slot = list[str](), iter(range(9)), StatusSlot()

    class Graphs(GraphedMicroBatch):
        def __init__(self, number: int) -> None:
            super().__init__(None, Recordings())  # type: ignore[arg-type]
            self.number = number
            self.replays = {True: (Recording(), torch.ones(()))}

        def __call__(self, *given: Any) -> Tensor:
            assert self.replays
            return micro_batch(*given)

        def close(self) -> None:
            super().close()
            assert not self.replays and self.recorder.waits == 1  # type: ignore[attr-defined]
            order.append(f"graphs {self.number}")

    monkeypatch.setattr(loop, "micro_batch_runner", lambda *_: Graphs(next(made)))
    monkeypatch.setattr(
        "megatron_hammer.train.run.end_process_group", lambda: order.append(f"groups {slot.is_waiting}")
    )
    phases = f"[{{samples: 16, train: {{{data}/a: 1}}}}, {{train: {{{data}/a: 1}}, seq_length: 64}}]"
    more = (f"data.phases={phases}", "data.train=null", "data.valid=null", "train.num_steps=3")
    assert run_rank(config_for(overrides(data, tmp_path / "run", *more)), 0, 0, 1, None, status=slot) == 0
    assert order == ["graphs 0", "graphs 1", "groups True"], (
        "and who has others wait for it there is no rank that hangs"
    )


def test_the_stand_in_sees_what_a_graph_cannot_hold() -> None:
    def reads_back() -> Tensor:
        x = torch.ones(3)
        return x * float(x.sum())

    with pytest.raises(AssertionError, match="_local_scalar_dense reads a value back"):
        Recordings().record(reads_back)
    x = torch.ones(3)
    flag = [2.0]
    recording, output = Recordings().record(lambda: x * flag[0])
    x.fill_(5)
    flag[0] = 3.0
    recording.replay()
    assert output.tolist() == [10, 10, 10], "the recorded factor, not today's"


def test_shapes_must_stay() -> None:
    config = tiny_config(**PLAIN)
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    run = GraphedMicroBatch(optimizer.store, Recordings())
    batches = rank_batches(config, 1, ctx)
    train_step(model, optimizer, batches, config, 1, ctx, run)
    short = [dataclasses.replace(batch, tokens=batch.tokens[:1], labels=batch.labels[:1]) for batch in batches]
    with pytest.raises(AssertionError, match=r"recorded for \(2, 32\), given \(1, 32\)"):
        train_step(model, optimizer, short, config, 2, ctx, run)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train__device="cpu"), "does not run with train.device=cpu"),
        (dict(data__attention_mask="document"), "is not for data.attention_mask=document"),
        (dict(kernels__fp8="current", train__precision="bf16"), "is not for kernels.fp8=current"),
        (dict(kernels__layers="te"), "is not for kernels.layers=te"),
        (dict(kernels__compile="layers"), "is not for kernels.compile=layers"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    plain = dict(model__vocab_size=304, data__seq_length=32)
    with pytest.raises(ConfigError, match=rf"E216\].*kernels.cuda_graph=true {message}"):
        tiny_config(**(plain | changes), kernels__cuda_graph=True).validate(1)


def test_a_run_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"E216\].*needs a GPU, not cpu"):
        check_here(KernelsConfig(cuda_graph=True), torch.device("cpu"))
    check_here(KernelsConfig(), torch.device("cpu"))
    check_here(KernelsConfig(cuda_graph=True), torch.device("cuda"))


def test_without_the_setting_nothing_is_recorded() -> None:
    config = tiny_config(**PLAIN)
    _, optimizer = build(config, make_context(config))
    assert micro_batch_runner(config.kernels, optimizer.store) is micro_batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, dict(train__precision="bf16"), dict(train__recompute="full")])
def test_on_a_gpu(changes: dict[str, Any]) -> None:
    """The real graphs: equal bits, since the same kernels run in the same order on the same values."""
    from megatron_hammer.parallel.context import ParallelContext

    config = tiny_config(**changes, kernels__deterministic=True)
    ctx = ParallelContext.single(torch.device("cuda"))
    found = []
    for graphs in (True, False):
        model, optimizer = build(config, ctx)
        run = GraphedMicroBatch(optimizer.store, CudaGraphs()) if graphs else micro_batch
        losses = []
        for step in range(1, 5):
            batches = [
                dataclasses.replace(b, tokens=b.tokens.cuda(), labels=b.labels.cuda())
                for b in rank_batches(config, step, ctx)
            ]
            losses.append(float(train_step(model, optimizer, batches, config, step, ctx, run).loss))
        found.append((losses, [w.detach().clone() for w in optimizer.store.weights]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
