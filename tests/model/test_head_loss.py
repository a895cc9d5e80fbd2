"""Head and loss in one against torch on all logits: values, gradients, layouts, memory, and what must not happen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_hammer.kernels.linear_cross_entropy import LossKernels
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.model.head_loss import HeadAndLoss, Objective
from megatron_hammer.model.layers import LayerOptions
from megatron_hammer.model.llama import build_stage
from megatron_hammer.parallel import collectives
from megatron_hammer.parallel.context import Group
from megatron_hammer.parallel.placement import padded_vocab_size
from megatron_hammer.train.build import build
from megatron_hammer.train.step import loss_and_gradients
from tests.distributed import run_distributed
from tests.kernels.one_gradient import OneGradient
from tests.model.tiny import logical_parts, make_context, merged, rank_batches, tiny_config

VOCABULARY, HIDDEN = 301, 24  # padded to 384 rows on one rank, 512 on two or four


def options(chunk: int = 5, **changes: Any) -> LayerOptions:
    return LayerOptions(operations=Operations(loss=LossKernels(chunk_tokens=chunk)), **changes)


def problem(dtype: torch.dtype, s: int = 8, b: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [s, b, h], all true rows of the head [v, h], labels and weights [b, s]: some tokens do not count."""
    x = torch.randn(s, b, HIDDEN, dtype=torch.float64).to(dtype)
    weight = (torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64) / 3).to(dtype)
    weights = torch.rand(b, s) + 0.5
    weights[:, ::4] = 0
    return x, weight, torch.randint(0, VOCABULARY, (b, s)), weights


def shard(weight: Tensor, rank: int = 0, size: int = 1) -> Tensor:
    rows = padded_vocab_size(len(weight), size)
    return F.pad(weight, (0, 0, 0, rows - len(weight))).chunk(size)[rank].clone().requires_grad_()


def plain(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Loss [b, s] by way of all logits."""
    logits = F.linear(x.transpose(0, 1).flatten(0, 1), weight)[:, :VOCABULARY]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels.flatten(), reduction="none").view_as(labels)


def reference(x: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, z_loss: float = 0.0) -> list[Tensor]:
    """Loss [b, s], gradient of x and of the weight, in fp64 and by autograd through all logits."""
    x, weight = (t.detach().to(torch.float64, copy=True).requires_grad_() for t in (x, weight))
    loss = plain(x, weight, labels)
    lse = (x @ weight.t()).logsumexp(-1).t()
    objective = (weights.double() * (loss + z_loss * lse.square())).sum()
    return [loss.detach(), *torch.autograd.grad(objective, (x, weight))]


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("way", ["early", "early, kept", "late", "late, kept"])
@pytest.mark.parametrize("chunk", [1, 5, 24, 1000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_equals_torch(dtype: torch.dtype, tolerance: float, chunk: int, way: str) -> None:
    """Sums of 301 and 24 terms in another order. The kept gradient is fp32 whatever the weight is."""
    x, weight, labels, weights = problem(dtype)
    mine, x_mine = shard(weight), x.clone().requires_grad_()
    gradient = OneGradient(mine) if "kept" in way else None
    objective = None if way.startswith("late") else Objective(weights)
    losses = HeadAndLoss(mine, VOCABULARY, options(chunk), gradient)(x_mine, labels, objective)
    assert losses.shape == labels.shape and losses.dtype == dtype
    (losses * weights).sum().backward()
    loss, grad_x, grad_weight = reference(x, weight, labels, weights)
    found = mine.grad if gradient is None else gradient.main_grad
    assert x_mine.grad is not None and found is not None
    assert error(losses.detach(), loss) < tolerance and error(x_mine.grad, grad_x) < tolerance
    assert error(found[:VOCABULARY], grad_weight) < max(tolerance, 1e-6 if gradient else 0)
    assert not found[VOCABULARY:].any(), "padding must get no gradient"
    assert not x_mine.grad[::4].any(), "tokens that do not count must give none"
    assert gradient is None or (gradient.complete == 1 and mine.grad is None)


@pytest.mark.parametrize(
    "chunk, kept, more", [(384, True, 1.0), (384, False, 1.0), (100, True, 1.05), (100, False, 1.5)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_err_no_more_than_the_plain_way(dtype: torch.dtype, chunk: int, kept: bool, more: float) -> None:
    """Plain: all logits in 16 bits, softmax in fp32, autograd. 2 % for chance: both round at the same places.

    With several chunks a CPU rounds the weight's gradient once for each instead of once (a GPU does not), which adds up
    to about as much; and once more where it must go back to 16 bits, sqrt(2) in all.
    """
    x, weight, labels, weights = problem(dtype, s=96, b=4)
    exact = reference(x, weight, labels, weights)
    plain_x, plain_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    plain_losses = plain(plain_x, plain_weight, labels)
    (plain_losses * weights).sum().backward()
    mine, x_mine = shard(weight), x.clone().requires_grad_()
    gradient = OneGradient(mine) if kept else None
    losses = HeadAndLoss(mine, VOCABULARY, options(chunk), gradient)(x_mine, labels, Objective(weights))
    (losses * weights).sum().backward()
    found = gradient.main_grad if gradient else mine.grad
    assert found is not None and x_mine.grad is not None and plain_x.grad is not None and plain_weight.grad is not None
    errors = [
        error(t.detach(), truth) for t, truth in zip((losses, x_mine.grad, found[:VOCABULARY]), exact, strict=True)
    ]
    theirs = [
        error(t.detach(), truth)
        for t, truth in zip((plain_losses, plain_x.grad, plain_weight.grad), exact, strict=True)
    ]
    for mine_err, plain_err, factor in zip(errors, theirs, (1.0, 1.0, more), strict=True):
        assert mine_err <= 1.02 * factor * plain_err


def _on_ranks(
    rank: int, size: int, sp: bool, early: bool, problem: tuple[Tensor, ...], z_loss: float
) -> tuple[Any, ...]:
    """Loss, gradients, and how many all-gathers and reductions it took."""
    x, weight, labels, weights = problem
    calls = {"gather": 0, "reduce": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    before = collectives._all_gather_into, collectives._reduce_scatter_into, collectives.dist.all_reduce
    collectives._all_gather_into = counted("gather", before[0])
    collectives._reduce_scatter_into = counted("reduce", before[1])
    collectives.dist.all_reduce = counted("reduce", before[2])
    try:
        mine, rows = shard(weight, rank, size), (x.chunk(size)[rank] if sp else x).clone().requires_grad_()
        setting = options(7, tp=Group(rank, size), sequence_parallel=sp)
        objective = Objective(weights, z_loss) if early else None
        losses = HeadAndLoss(mine, VOCABULARY, setting)(rows, labels, objective)
        (losses * weights).sum().backward()
    finally:
        collectives._all_gather_into, collectives._reduce_scatter_into, collectives.dist.all_reduce = before
    assert rows.grad is not None and mine.grad is not None
    return losses.detach().numpy(), rows.grad.numpy(), mine.grad.numpy(), calls


@pytest.mark.parametrize("early, z_loss", [(True, 0.0), (True, 1e-2), (False, 0.0)])
@pytest.mark.parametrize("size, sp", [(1, False), (2, False), (2, True), (4, False), (4, True)])
def test_ranks_equal_one(size: int, sp: bool, early: bool, z_loss: float) -> None:
    """fp64, 24 tokens in chunks of 7: one all-gather a chunk, one reduction of dx, and under SP one gather of x."""
    made = problem(torch.float64)
    loss, grad_x, grad_weight = reference(*made, z_loss=z_loss)
    results = run_distributed(size, _on_ranks, size, sp, early, made, z_loss)
    for losses, rows, _, calls in results:
        assert error(torch.from_numpy(losses), loss) < 1e-13
        assert (losses == results[0][0]).all(), "all ranks must report the same bits"
        passes = 1 if early else 2
        assert calls == {"gather": passes * (4 + sp), "reduce": 1} if size > 1 else {"gather": 0, "reduce": 0}
        if not sp:
            assert error(torch.from_numpy(rows), grad_x) < 1e-13
    if sp:
        assert error(torch.cat([torch.from_numpy(rows) for _, rows, *_ in results]), grad_x) < 1e-13
    whole = torch.cat([torch.from_numpy(part) for _, _, part, _ in results])
    assert error(whole[:VOCABULARY], grad_weight) < 1e-13 and not whole[VOCABULARY:].any()


def test_z_loss_is_what_autograd_makes_of_it() -> None:
    x, weight, labels, weights = problem(torch.float64)
    mine, x_mine = shard(weight), x.clone().requires_grad_()
    losses = HeadAndLoss(mine, VOCABULARY, options())(x_mine, labels, Objective(weights, z_loss=0.1))
    (losses * weights).sum().backward()
    loss, grad_x, grad_weight = reference(x, weight, labels, weights, 0.1)
    without = reference(x, weight, labels, weights)
    assert x_mine.grad is not None and mine.grad is not None
    assert error(losses.detach(), loss) < 1e-13, "the loss that is reported stays the cross-entropy"
    assert error(x_mine.grad, grad_x) < 1e-13 and error(mine.grad[:VOCABULARY], grad_weight) < 1e-13
    assert error(without[1], grad_x) > 0.01, "it must matter here"


def test_a_loss_scale_scales_the_gradient() -> None:
    """By a power of two: exactly."""
    x, weight, labels, _ = problem(torch.float32)
    sums = []
    for scale in (1.0, 2.0**14):
        mine, x_mine = shard(weight), x.clone().requires_grad_()
        gradient, objective = OneGradient(mine), Objective(torch.tensor(scale / labels.numel()))
        losses = HeadAndLoss(mine, VOCABULARY, options(), gradient)(x_mine, labels, objective)
        (losses * objective.weight).sum().backward()
        sums.append((gradient.main_grad, x_mine.grad))
    for one, scaled in zip(*sums, strict=True):
        assert one is not None and torch.equal(one * 2**14, scaled)


def test_a_backward_of_something_else_is_refused() -> None:
    x, weight, labels, weights = problem(torch.float32)
    losses = HeadAndLoss(shard(weight), VOCABULARY, options())(x.requires_grad_(), labels, Objective(weights))
    with pytest.raises(RuntimeError, match="backward must start from"):
        losses.sum().backward()


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def test_evaluation_computes_no_gradient() -> None:
    """24 tokens in 5 chunks: a product each, and three in training, whose backward has none left."""
    x, weight, labels, weights = problem(torch.float32)
    mine, x = shard(weight), x.requires_grad_()
    run = HeadAndLoss(mine, VOCABULARY, options())
    with torch.no_grad(), _Products() as evaluation:
        losses, again = run(x, labels), run(x, labels, Objective(weights))
    assert evaluation.count == 10 and torch.equal(losses, again)
    with _Products() as training:
        trained = run(x, labels, Objective(weights))
    assert training.count == 15
    torch.testing.assert_close(trained.detach(), losses, rtol=1e-6, atol=0)  # one pass here, two there
    with _Products() as backward:
        (trained * weights).sum().backward()
    assert backward.count == 0


class _LiveBytes(TorchDispatchMode):
    """Largest sum of the tensors that live at one time, of those made in the region."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and func._schema.is_mutable is False:
                storage = x.untyped_storage()
                if storage._cdata not in known:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def test_memory_at_full_size() -> None:
    """16,384 tokens x 105,789 pieces x 2048 in bf16, on torch's meta device, where tensors have sizes and no values.

    At most 0.5 GiB besides weights, hidden states and gradient buffers; the logits alone would take 3.2.
    """
    with torch.device("meta"):
        x = torch.empty(2048, 8, 2048, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(padded_vocab_size(105_789, 1), 2048, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.empty(8, 2048, dtype=torch.int64)
        scale = torch.empty(())
    gradient = OneGradient(weight)
    setting = options(2048, dtype=torch.bfloat16, device=torch.device("meta"))
    with _LiveBytes() as memory:
        losses = HeadAndLoss(weight, 105_789, setting, gradient)(x, labels, Objective(scale))
    assert losses.shape == (8, 2048)
    assert 0.4 * 2**30 < memory.peak <= 0.5 * 2**30, f"{memory.peak / 2**30:.3f} GiB"


def _gradients(rank: int, tp: int, sp: bool, tied: bool, kept: bool) -> dict[str, Tensor]:
    """This rank's gradient of two micro-batches, from the optimizer's buffer or from autograd alone."""
    config = tiny_config(
        parallel__tensor_model_parallel_size=tp,
        parallel__sequence_parallel=sp,
        model__tie_word_embeddings=tied,
        kernels__loss_chunk_tokens=13,
    )
    ctx = make_context(config)
    model, optimizer = build(config, ctx)
    batches = rank_batches(config, 1, ctx)
    assert len(batches) > 1
    if kept:
        for _ in range(2):  # the second time over what the first one left
            loss_and_gradients(model, optimizer, batches, config, ctx)
            optimizer.store.reduce()
    else:
        count = sum(batch.labels.numel() for batch in batches)
        plain = build_stage(config.model, ctx, model.placement, operations=model.options.operations)
        plain.load_state_dict(model.state_dict())
        for batch in batches:
            (plain(batch.tokens, batch.labels).sum() / count).backward()
        optimizer.store.begin(first=True, last=True)
        for weight, gradient in zip(plain.parameters(), optimizer.store.gradients, strict=True):
            assert weight.grad is not None
            gradient.add(lambda place, begun, grad=weight.grad: place.copy_(grad))  # type: ignore[misc]
        optimizer.store.reduce()
    for weight, gradient in zip(model.parameters(), optimizer.store.gradients, strict=True):
        weight.grad = gradient.main_grad
    return logical_parts(model, config, ctx, grads=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp, sp", [(1, False), (2, False), (2, True)])
def test_accumulation_into_the_optimizer(tp: int, sp: bool, tied: bool) -> None:
    """Four micro-batches, each gradient added in place, equal what autograd brings; tied: both add to one weight.

    The late way is held against torch above. 1e-6 of the norm: fp32 sums in another order.
    """
    expected = merged(run_distributed(tp, _gradients, tp, sp, tied, False))
    found = merged(run_distributed(tp, _gradients, tp, sp, tied, True))
    assert ("lm_head.weight" in found) != tied
    for name, gradient in expected.items():
        assert gradient.any() and error(found[name], gradient.double()) < 1e-6, name
