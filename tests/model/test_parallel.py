"""Every layout computes what one process computes, and the parallelism is real."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hammer.config import Config
from megatron_hammer.parallel.placement import padded_vocab_size
from megatron_hammer.train.step import loss_and_gradients
from tests.distributed import run_distributed
from tests.model.tiny import build, make_context, merged, rank_batches, tiny_config, train

LAYOUTS = [(1, False, 2, 1), (2, False, 2, 1), (4, True, 1, 1), (1, False, 2, 2), (2, True, 1, 2)]
"""TP, sequence parallelism beyond the query groups, DP, CP: one of each kind. tests/verify/test_grid.py covers their
pairs, and 8 ranks."""


STEPS = 10  # the loss falls to less than a third of its start


@pytest.fixture(scope="module")
def single() -> tuple[list[tuple[float, float, bool]], dict[str, torch.Tensor]]:
    return train(0, tiny_config(), STEPS)


def layout_config(tp: int, sp: bool, dp: int, cp: int, **changes: Any) -> Config:
    config = tiny_config(
        parallel__tensor_model_parallel_size=tp,
        parallel__sequence_parallel=sp,
        parallel__context_parallel_size=cp,
        **changes,
    )
    config.validate(tp * dp * cp)
    return config


@pytest.mark.parametrize("tp, sp, dp, cp", LAYOUTS)
def test_layouts_equal_one_process(tp: int, sp: bool, dp: int, cp: int, single: Any) -> None:
    """1e-5 relative is about 80 fp32 roundings, and the loss falls by a factor, so errors would grow."""
    results = run_distributed(tp * dp * cp, train, layout_config(tp, sp, dp, cp), STEPS)
    expected, weights = single
    assert expected[-1][0] < expected[0][0] / 3, "the run must be one in which something is learnt"
    for rank_steps, _ in results:
        for (loss, norm, applied), (loss_1, norm_1, _) in zip(rank_steps, expected, strict=True):
            assert loss == pytest.approx(loss_1, rel=1e-5)
            assert norm == pytest.approx(norm_1, rel=1e-3)  # a norm near its minimum amplifies rounding
            assert applied
    assert len({tuple(steps) for steps, _ in results}) == 1, "all ranks must report the same numbers"
    for name, tensor in merged([parts for _, parts in results]).items():
        error = (tensor - weights[name]).norm() / weights[name].norm()
        assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize(
    "tp, sp, dp, cp",
    [(2, False, 2, 1), (4, True, 1, 1), (1, False, 1, 4), (2, True, 2, 2)],
)
def test_layouts_equal_one_process_with_documents(tp: int, sp: bool, dp: int, cp: int) -> None:
    """A tensor-parallel rank holds all positions of its heads; of context-parallel ranks each has some documents."""
    changes: dict[str, Any] = {"data__attention_mask": "document"}
    causal, _ = train(0, tiny_config(), 1)
    expected, weights = train(0, tiny_config(**changes), 6)
    assert abs(expected[0][0] - causal[0][0]) > 1e-4 * causal[0][0], "the mask must matter here"
    results = run_distributed(tp * dp * cp, train, layout_config(tp, sp, dp, cp, **changes), 6)
    for rank_steps, _ in results:
        for (loss, norm, applied), (loss_1, norm_1, _) in zip(rank_steps, expected, strict=True):
            assert loss == pytest.approx(loss_1, rel=1e-5)
            assert norm == pytest.approx(norm_1, rel=1e-3)
            assert applied
    for name, tensor in merged([parts for _, parts in results]).items():
        assert (tensor - weights[name]).norm() < 1e-4 * weights[name].norm(), name


def _watch_reduction(rank: int, config: Config) -> list[str]:
    """Events of one step's backward: layers done (last first) and reduce-scatters started."""
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    events: list[str] = []
    start = optimizer.store.start_reduction

    def record(bucket: Any) -> None:
        events.append("reduce-scatter")
        start(bucket)

    optimizer.store.start_reduction = record  # type: ignore[method-assign]
    for i, layer in enumerate(model.layers.values()):
        layer.register_full_backward_hook(lambda *_, i=i: events.append(f"layer {i}"))
    batches = rank_batches(config, 1, ctx)
    begin = optimizer.store.begin

    def note(first: bool, last: bool, **how: Any) -> None:
        events.append(f"micro-batch {0 if first else 1}")
        begin(first, last, **how)

    optimizer.store.begin = note  # type: ignore[method-assign]
    assert len(batches) == 2
    loss_and_gradients(model, optimizer, batches, config, ctx)
    optimizer.store.reduce()
    return events


def test_reduction_starts_during_the_last_backward() -> None:
    config = tiny_config()
    for events in run_distributed(2, _watch_reduction, config):
        assert events.index("reduce-scatter") > events.index("micro-batch 1"), "only the last micro-batch reduces"
        last = events[events.index("micro-batch 1") :]
        assert last.index("reduce-scatter") < last.index("layer 0"), events
        assert last.count("reduce-scatter") > 2


class _Shapes(TorchDispatchMode):
    """Every shape that any operation of a region returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.seen.add(tuple(x.shape))
        return out


def _observe(rank: int, config: Config) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(all shapes of building, one step and its update; shapes that a sequence-parallel layer keeps for backward)."""
    ctx = make_context(config)
    kept: list[tuple[int, ...]] = []
    with _Shapes() as shapes:
        model, optimizer = build(config, ctx)
        batch = rank_batches(config, 1, ctx)[0]
        optimizer.store.begin(first=True, last=True)
        model(batch.tokens, batch.labels).sum().backward()
        loss_and_gradients(model, optimizer, rank_batches(config, 1, ctx), config, ctx)
        optimizer.clip_grad_norm(1.0)
        optimizer.step(1e-3)
    x = torch.randn(config.data.seq_length // ctx.tp.size, 2, config.model.hidden_size, requires_grad=True)
    pack = lambda t: (kept.append(tuple(t.shape)), t)[1]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer = model.layers["0"]
        layer.mlp_norm(x)
        layer.mlp.gate_up(layer.mlp_norm(x)[0])
        layer.attention.qkv(layer.attention_norm(x)[0])
    dist.barrier()
    return sorted(shapes.seen), kept


def test_no_full_vocabulary_and_sharded_rows() -> None:
    config = tiny_config(
        parallel__tensor_model_parallel_size=2,
        parallel__sequence_parallel=True,
        model__vocab_size=1009,
        train__global_batch_size=4,
    )
    assert config.model.vocab_size is not None
    s, b, h = config.data.seq_length, 2, config.model.hidden_size
    for shapes, kept in run_distributed(2, _observe, config):
        full = padded_vocab_size(1009, 2)
        # Shapes are of tensors in memory; the flat buffers are one-dimensional and hold all parameters.
        assert not [shape for shape in shapes if len(shape) > 1 and any(n >= 1009 for n in shape)], full
        rows = [shape for shape in kept if len(shape) == 3]
        assert (s // 2, b, h) in rows
        assert not [shape for shape in rows if shape[0] == s], "a sequence-parallel region kept rows of other ranks"
