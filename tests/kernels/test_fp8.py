"""Products in 8 bits: what the formats promise, what the layers then compute, and that training goes on as it should.

On a CPU the 8-bit numbers are multiplied in fp32 (``emulated_multiply``), once against ``torch._scaled_mm`` itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import Config
from megatron_hammer.kernels import fp8
from megatron_hammer.kernels.backend import Requirements
from megatron_hammer.kernels.fp8 import (
    E4M3,
    E5M2,
    LARGEST,
    Fp8GraphProducts,
    Fp8Products,
    MeasuringKernels,
    Operand,
    emulated_multiply,
)
from megatron_hammer.kernels.linear import Division, Gradient, Products, linear
from megatron_hammer.kernels.linear_cross_entropy import LossKernels
from megatron_hammer.kernels.native import cuda
from megatron_hammer.kernels.norm import add_rms_norm
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.report import kernels_table
from megatron_hammer.kernels.selection import select_operations
from megatron_hammer.kernels.swiglu import swiglu
from megatron_hammer.model.head_loss import HeadAndLoss, Objective
from megatron_hammer.model.initialise import initialise
from megatron_hammer.model.layers import LayerOptions, column_parallel
from megatron_hammer.model.llama import Stage, build_stage
from megatron_hammer.model.parameters import parameter_table
from megatron_hammer.model.recompute import plan_recompute
from megatron_hammer.optim.optimizer import Optimizer
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import choose_kernels
from megatron_hammer.train.step import train_step
from tests.distributed import run_distributed
from tests.host_waits import OperationNames
from tests.kernels.one_gradient import OneGradient
from tests.model.tiny import build, logical_parts, make_context, merged, rank_batches, tiny_config
from tests.train.runs import config_for

# Half of the distance between neighbours, as a share of the number: 3 and 2 bits of mantissa; and half of the smallest
# number above zero (arXiv 2209.05433, table 1), which is the error of those below the smallest normal one.
ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}
HALF_OF_SMALLEST = {E4M3: 2.0**-10, E5M2: 2.0**-17}
BF16_ROUNDING = 2.0**-8


def emulated(in_graph: bool = False, **changes: Any) -> Fp8Products:
    kind = Fp8GraphProducts if in_graph else Fp8Products
    return kind(multiply=emulated_multiply, **changes)


def value_of(x: Operand) -> Tensor:
    return (x.rows.double() * x.scale.double()).view(x.shape)


def error_bound(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What quantisation may add to each element; 1 % for the fp32 arithmetic around it."""
    scale = x.double().abs().max() / LARGEST[dtype]
    return 1.01 * torch.maximum(ROUNDING[dtype] * x.double().abs(), HALF_OF_SMALLEST[dtype] * scale)


def product_bound(a: Tensor, a_dtype: torch.dtype, b: Tensor, b_dtype: torch.dtype) -> Tensor:
    """Of a [m, k] x (b [n, k])^T, each element: errors of both operands, then the result's rounding to bf16."""
    e_a, e_b, a, b = error_bound(a, a_dtype), error_bound(b, b_dtype), a.double(), b.double()
    exact = e_a @ b.abs().t() + a.abs() @ e_b.t() + e_a @ e_b.t()
    return exact + BF16_ROUNDING * ((a @ b.t()).abs() + exact)


def random(seed: int, *shape: int, spread: float = 1.0) -> Tensor:
    """bf16 numbers whose magnitudes spread over e^(+-spread), as those of a trained model do more than a normal's."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = (spread * torch.randn(shape, generator=generator)).exp()
    return (torch.randn(shape, generator=generator) * magnitude).bfloat16()


# ---- casts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("shape, scale", [((1, 1), 1.0), ((5, 7), 1e-8), ((3, 17, 50), 1e6), ((64, 16), 1e-20)])
def test_quantised_numbers_are_as_near_as_the_format_allows(
    dtype: torch.dtype, shape: tuple[int, ...], scale: float
) -> None:
    x = random(len(shape) + shape[-1], *shape, spread=4.0) * scale
    quantised = emulated().quantise(x, dtype)
    assert ((value_of(quantised) - x.double()).abs() <= error_bound(x, dtype)).all()
    assert quantised.rows.float().abs().max() == LARGEST[dtype], "the largest value takes the largest number"
    assert quantised.columns.is_contiguous() and torch.equal(quantised.columns.float(), quantised.rows.float().t())
    if x.numel() > 100:  # and not nearer: the test must see 8 bits
        errors = (value_of(quantised) - x.double()).abs()
        assert (errors > ROUNDING[dtype] / 8 * x.double().abs()).double().mean() > 0.5


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_values_beyond_the_scale_stay_at_the_largest_number(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, -3.0, 1.01, 1e30, 0.5]])
    rows, columns = fp8.cast(x, torch.tensor(LARGEST[dtype]), dtype)
    assert rows.tolist() == columns.t().tolist()
    assert rows.float().tolist() == [[n * LARGEST[dtype] for n in (1.0, -1.0, 1.0, 1.0, 0.5)]]


def test_zeros_stay_zeros() -> None:
    products, weight = emulated(), random(1, 16, 32)
    for x, w in ((torch.zeros(16, 32).bfloat16(), weight), (random(2, 16, 32), torch.zeros_like(weight))):
        assert not products.fprop(products.input(x)[0], products.weight(w, None)).any()
    tiny = torch.full((16, 32), 1e-38).bfloat16()  # too small to be scaled to the largest number, but no division by 0
    assert products.fprop(products.input(tiny)[0], products.weight(weight, None)).isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("multiply", [emulated_multiply, fp8.multiply])
def test_what_is_not_finite_is_seen(bad: float, multiply: Any) -> None:
    """In any operand, all of the product is NaN: the gradient norm is too, and the step is skipped."""
    x, weight, grad_y = random(1, 16, 32), random(2, 48, 32), random(3, 16, 48)
    products = Fp8Products(multiply=multiply)
    broken = x.clone()
    broken[3, 5] = bad
    assert products.fprop(products.input(broken)[0], products.weight(weight, None)).isnan().all()
    broken = grad_y.clone()
    broken[3, 5] = bad
    grad, place = products.gradient(broken), torch.zeros(48, 32)
    products.wgrad(grad, products.input(x)[1], place, True)
    assert products.dgrad(grad, products.weight(weight, None)).isnan().all() and place.isnan().all()


# ---- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("types", [(E4M3, E4M3), (E5M2, E4M3)])
def test_the_emulation_is_torch_s_own_product(types: tuple[torch.dtype, torch.dtype]) -> None:
    """Equal but for the order of fp32 additions; small, as torch's product on a CPU takes its time."""
    products, a, b = Fp8Products(), random(4, 32, 48, spread=3.0), random(5, 64, 48, spread=3.0)
    qa, qb = products.quantise(a, types[0]), products.quantise(b, types[1])
    for dtype, rounding in ((torch.float32, 48 * 2.0**-23), (torch.bfloat16, BF16_ROUNDING)):
        out = [torch.empty(32, 64, dtype=dtype) for _ in range(2)]
        for multiply, place in zip((fp8.multiply, emulated_multiply), out, strict=True):
            arguments = (qa.rows, qa.scale, qb.rows, qb.scale, dtype, False)
            multiply(*arguments, place)
            assert torch.equal(place, multiply(*arguments)), "into a place or not"
        sums = value_of(qa).abs() @ value_of(qb).abs().t()
        assert ((out[0] - out[1]).double().abs() <= rounding * sums).all()


@pytest.mark.parametrize("shape", [(16,), (4, 12), (2, 5, 48)])
@pytest.mark.parametrize("kept", [False, True])
def test_a_linear_layer_is_within_what_the_formats_give(
    shape: tuple[int, ...], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and both gradients, element by element; the sum of two micro-batches in the optimizer's buffer too."""
    monkeypatch.setattr(fp8, "BLOCK_ELEMENTS", 1000)  # several blocks of the weight's gradient, the last one shorter
    options = LayerOptions(torch.bfloat16, operations=Operations(products=emulated()))
    x, weight = random(6, *shape, 32), torch.nn.Parameter(random(7, 80, 32))
    grad_y = random(8, *shape, 80) * 1e-6
    gradient = OneGradient(weight) if kept else None
    for _ in range(2):
        x = x.detach().requires_grad_()
        y = linear(x, weight, Division(gradient, options.operations.products, "column", options.tp))
        y.backward(grad_y)
    assert x.grad is not None and y.shape == grad_y.shape and x.grad.shape == x.shape
    products = options.operations.products
    types = [
        products.input(x)[0].rows.dtype,
        products.weight(weight, gradient).columns.dtype,
        products.gradient(grad_y).rows.dtype,
    ]
    assert types == [E4M3, E4M3, E5M2]
    rows, grads, w = x.detach().flatten(0, -2), grad_y.flatten(0, -2), weight.detach()
    exact = rows.double() @ w.double().t()
    error = (y.detach().flatten(0, -2).double() - exact).abs()
    assert (error <= product_bound(rows, E4M3, w, E4M3)).all() and error.norm() > 0.01 * exact.norm()
    error = (x.grad.flatten(0, -2).double() - grads.double() @ w.double()).abs()
    assert (error <= product_bound(grads, E5M2, w.t(), E4M3)).all()
    found = gradient.main_grad if gradient else weight.grad
    assert found is not None and (gradient is None or gradient.complete == 2)
    exact, bound = 2 * grads.double().t() @ rows.double(), 2 * product_bound(grads.t(), E5M2, rows.t(), E4M3)
    assert ((found.double() - exact).abs() <= bound + (0 if kept else 2 * BF16_ROUNDING * exact.abs())).all()


def test_evaluation_is_bf16_to_the_bit() -> None:
    x, weight = random(9, 4, 16, 32), random(10, 128, 32)
    operations = Operations(products=emulated(), head_products=emulated())
    plain, options = LayerOptions(torch.bfloat16), LayerOptions(torch.bfloat16, operations=operations)
    labels = torch.arange(64).view(16, 4)
    with torch.no_grad():
        assert torch.equal(column_parallel(x, weight, options), column_parallel(x, weight, plain))
        assert torch.equal(*(HeadAndLoss(weight, 120, given)(x, labels) for given in (options, plain)))
    weight.requires_grad_()
    assert not torch.equal(column_parallel(x, weight, options), column_parallel(x, weight, plain))


@pytest.mark.parametrize("objective", [False, True])
def test_the_head_in_8_bits(objective: bool) -> None:
    """Loss and gradients against the head in bf16, a ragged last chunk included: 6 % is one e4m3 rounding."""
    x, weight, labels = random(11, 20, 4, 64, spread=0.1), random(12, 384, 64, spread=0.1), torch.arange(80).view(4, 20)
    results = []
    for products in (Products(), emulated()):
        operations = Operations(loss=LossKernels(chunk_tokens=32), head_products=products)
        options = LayerOptions(torch.bfloat16, operations=operations)
        leaves = hidden, head = [t.clone().requires_grad_() for t in (x, 0.3 * weight)]
        of = Objective(torch.tensor(1 / 80)) if objective else None
        losses = HeadAndLoss(head, 370, options)(hidden, labels, of)
        (losses / 80).sum().backward()
        results.append([losses.detach().mean(), *(t.grad for t in leaves)])
    for exact, found in zip(*results, strict=True):
        assert (found.float() - exact.float()).norm() <= 2.0**-4 * exact.float().norm()
        assert not torch.equal(found, exact)


# ---- largest values from norm and SwiGLU ---------------------------------------------------------------------------


class _CudaTwin:
    """What ``torch.ops.hammer_cuda`` promises of norm and SwiGLU, ``amax`` included, in plain torch."""

    def add_rms_norm_forward(
        self, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, normed: Tensor, summed: Tensor | None,
        rstd: Tensor, amax: Tensor | None = None,
    ) -> None:  # fmt: skip
        result, total = add_rms_norm(x, update, weight, eps)
        normed.copy_(result)
        if summed is not None:
            summed.copy_(total)
        if amax is not None:
            amax.copy_(normed.abs().max())

    def add_rms_norm_backward(
        self, grad_normed: Tensor, grad_summed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor,
        grad_x: Tensor, grad_weight: Tensor,
    ) -> None:  # fmt: skip
        leaves = [t.detach().clone().requires_grad_() for t in (summed, weight)]
        with torch.enable_grad():
            grads = torch.autograd.grad(add_rms_norm(leaves[0], None, leaves[1], 1e-5)[0], leaves, grad_normed)
        grad_x.copy_(grads[0] if grad_summed is None else grads[0] + grad_summed)
        grad_weight.copy_(grads[1])

    def swiglu_forward(self, gate_up: Tensor, product: Tensor, amax: Tensor | None = None) -> None:
        product.copy_(swiglu(gate_up))
        if amax is not None:
            amax.copy_(product.abs().max())

    def swiglu_backward(self, grad: Tensor, gate_up: Tensor, grad_gate_up: Tensor) -> None:
        leaf = gate_up.detach().clone().requires_grad_()
        with torch.enable_grad():
            grad_gate_up.copy_(torch.autograd.grad(swiglu(leaf), leaf, grad)[0])


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_norm_and_swiglu_measure_what_the_products_read(recompute: str) -> None:
    """Bit for bit what measuring again gives; and of a layer's four inputs only attention's output is measured."""
    config, ctx, results = fp8_config(train__recompute=recompute), ParallelContext.single(), []
    for measured in (None, MeasuringKernels(_CudaTwin())):
        shapes: list[tuple[int, ...]] = []

        def counting(x: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(x.shape))
            return fp8.largest(x)

        products = emulated(largest=counting, measured=measured)
        fast = fp8.measuring(Fp8Products(measured=measured or MeasuringKernels(_CudaTwin())))
        operations = Operations(fast["norm"], swiglu=fast["swiglu"], products=products)
        plan = plan_recompute(config)
        model = build_stage(config.model, ctx, dtype=torch.bfloat16, operations=operations, recompute=plan)
        initialise(model, parameter_table(config.model), seed=3)
        batch = rank_batches(config, 1, ctx)[0]
        loss = model(batch.tokens, batch.labels).sum()
        forward = len(shapes)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()], forward))
    (loss, grads, every), (loss_2, grads_2, few) = results
    assert torch.equal(loss, loss_2) and all(torch.equal(a, b) for a, b in zip(grads, grads_2, strict=True))
    assert (every, few) == (2 * 8, 2 * 5), "4 weights and 4 inputs a layer; 3 of the inputs are known"


def test_a_largest_value_is_of_a_whole_unchanged_tensor() -> None:
    measured = MeasuringKernels(_CudaTwin())
    gate_up = random(1, 32, 64)
    product = torch.empty(32, 32).bfloat16()
    measured.swiglu_forward(gate_up, product)
    known = measured.largest_of(product.view(2, 16, 32))
    assert known is not None and known == product.abs().max()
    assert measured.largest_of(product[:16]) is None and measured.largest_of(product.clone()) is None
    product.mul_(2)
    assert measured.largest_of(product) is None
    for _ in range(3 * fp8.MOST_KNOWN):  # memory that is used again and again
        product = torch.empty(32, 32).bfloat16()
        measured.swiglu_forward(gate_up, product)
        assert measured.largest_of(torch.empty(32, 32).bfloat16()) is None
    assert len(measured._known) <= fp8.MOST_KNOWN


# ---- training --------------------------------------------------------------------------------------------------------


def fp8_config(**changes: Any) -> Config:
    """Every size a multiple of 16 on two ranks; bf16."""
    return tiny_config(
        **{"model__ffn_hidden_size": 192, "train__precision": "bf16", "train__global_batch_size": 8, **changes}
    )


def in_fp8(config: Config, ctx: ParallelContext, **changes: Any) -> tuple[Stage, Optimizer]:
    """A built model whose products, head included, are emulated ones: a config cannot ask for that on a CPU."""
    return with_products(config, ctx, partial(emulated, **changes))


def with_products(config: Config, ctx: ParallelContext, make: Callable[..., Products]) -> tuple[Stage, Optimizer]:
    """Of layers and head."""
    chosen, in_graph = choose_kernels(config, ctx.device), config.kernels.compile == "layers"
    head = make()
    operations = replace(chosen.operations, products=make(in_graph=True) if in_graph else head, head_products=head)
    return build(config, ctx, kernels=replace(chosen, operations=operations))


def train(rank: int, config: Config, steps: int) -> tuple[list[tuple[float, float]], dict[str, Tensor]]:
    ctx = make_context(config)
    model, optimizer = in_fp8(config, ctx)
    reports = [train_step(model, optimizer, rank_batches(config, n, ctx), config, n, ctx) for n in range(1, steps + 1)]
    return [(float(r.loss), float(r.grad_norm)) for r in reports], logical_parts(model, config, ctx)


def test_it_learns_what_bf16_learns() -> None:
    """20 steps of a task whose loss falls by a factor; 10 % of the fall is the room for 3 bits of mantissa."""
    config, ctx = fp8_config(), ParallelContext.single()
    losses = [loss for loss, _ in train(0, config, 20)[0]]
    model, optimizer = build(config, ctx)
    plain = [
        float(train_step(model, optimizer, rank_batches(config, n, ctx), config, n, ctx).loss) for n in range(1, 21)
    ]
    assert losses != plain and plain[-1] < 0.7 * plain[0]
    assert abs(losses[-1] - plain[-1]) < 0.1 * (plain[0] - plain[-1])


def exact_tensors(shape: tuple[int, int], seed: int) -> Tensor:
    """-1, 0, 1 and a 7 in each quarter of both dimensions: 8 bits hold them exactly, by one scale in every shard."""
    x = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    for i in range(4):
        x[i * shape[0] // 4, i * shape[1] // 4] = 7
    return x


def _column_parallel(rank: int, tp: int, sp: bool) -> tuple[Tensor, Tensor, Tensor]:
    ctx = make_context(fp8_config(parallel__tensor_model_parallel_size=tp))
    options = LayerOptions(torch.bfloat16, tp=ctx.tp, sequence_parallel=sp, operations=Operations(products=emulated()))
    x, weight, grad_y = exact_tensors((16, 32), 1), exact_tensors((64, 32), 2), exact_tensors((16, 64), 3)
    rows, columns = slice(16 // tp * rank, 16 // tp * (rank + 1)), slice(64 // tp * rank, 64 // tp * (rank + 1))
    x = (x[rows] if sp else x).unsqueeze(1).requires_grad_()
    weight = weight[columns].clone().requires_grad_()
    y = column_parallel(x, weight, options)
    y.backward(grad_y[:, columns].unsqueeze(1))
    assert x.grad is not None and weight.grad is not None
    return y.detach().squeeze(1), x.grad.squeeze(1), weight.grad


@pytest.mark.parametrize("sp", [False, True])
def test_two_ranks_multiply_what_one_does(sp: bool) -> None:
    """To the bit where all sums are exact and each rank's part has the whole's largest value."""
    ((y, grad_x, grad_weight),) = run_distributed(1, _column_parallel, 1, False)
    ranks = run_distributed(2, _column_parallel, 2, sp)
    assert torch.equal(torch.cat([r[0] for r in ranks], 1), y)
    assert torch.equal(torch.cat([r[2] for r in ranks]), grad_weight)
    assert torch.equal(torch.cat([r[1] for r in ranks]) if sp else ranks[1][1], grad_x)


@pytest.mark.parametrize("sp", [False, True])
def test_a_tensor_parallel_run_is_the_run_of_one_rank(sp: bool) -> None:
    """Shards have scales of their own, so its numbers differ by roundings of 8 bits, which 5 steps at lr 0.01 let grow.

    The ranks agree to the bit, on what they hold in common too (``merged``).
    """
    config = fp8_config(parallel__tensor_model_parallel_size=2, parallel__sequence_parallel=sp)
    single, ranks = train(0, fp8_config(), 5), run_distributed(2, train, config, 5)
    assert ranks[0][0] == ranks[1][0]
    merged([weights for _, weights in ranks])
    (loss, norm), (loss_1, norm_1) = ranks[0][0][0], single[0][0]
    assert loss == pytest.approx(loss_1, rel=1e-3) and norm == pytest.approx(norm_1, rel=0.01)
    assert ranks[0][0][-1][0] == pytest.approx(single[0][-1][0], rel=0.03)


def test_a_weight_is_quantised_once_a_step() -> None:
    """And with that the run is, to the bit, the one that quantises for every product."""
    config, ctx = fp8_config(train__micro_batch_size=1), ParallelContext.single()
    shapes: list[tuple[int, ...]] = []

    def counting(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return fp8.largest(x)

    class Forgetful(Fp8Products):
        def weight(self, weight: Tensor, gradient: Gradient | None) -> Operand:
            return self.quantise(weight, E4M3)

    model, optimizer = in_fp8(config, ctx, largest=counting)
    other, other_optimizer = with_products(config, ctx, partial(Forgetful, multiply=emulated_multiply))
    weights = [tuple(p.shape) for p in model.parameters() if p.dim() == 2][1:]  # without the embedding
    assert len(weights) == 4 * 2 + 1
    for step in (1, 2, 3):
        shapes.clear()
        batches = rank_batches(config, step, ctx)
        report = train_step(model, optimizer, batches, config, step, ctx)
        assert len(batches) == 8 and sum(shape in weights for shape in shapes) == len(weights)
        twin_report = train_step(other, other_optimizer, batches, config, step, ctx)
        assert torch.equal(report.loss, twin_report.loss) and torch.equal(report.grad_norm, twin_report.grad_norm)
    batch = rank_batches(config, 1, ctx)[0]
    before = model(batch.tokens, batch.labels)
    with torch.no_grad():  # weights that are written past the optimizer, as by load_state_dict
        model.head.weight.mul_(2)
        other.head.weight.mul_(2)
    after = model(batch.tokens, batch.labels)
    assert torch.equal(after, other(batch.tokens, batch.labels)) and not torch.equal(after, before)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_nothing(recompute: str) -> None:
    assert train(0, fp8_config(train__recompute=recompute), 2)[0] == train(0, fp8_config(), 2)[0]


def test_a_checkpoint_knows_nothing_of_it() -> None:
    """The same tensors as a run in bf16, and they are enough: 2 steps, another process, 2 steps equal 4."""
    config, ctx = fp8_config(), ParallelContext.single()
    whole = train(0, config, 4)[0]
    first, second = in_fp8(config, ctx), in_fp8(config, ctx)
    assert set(first[0].state_dict()) == set(build(config, ctx)[0].state_dict())
    for step in (1, 2):
        train_step(*first, rank_batches(config, step, ctx), config, step, ctx)
    for mine, theirs in zip(second[1].shards(), first[1].shards(), strict=True):
        for name, tensor in mine.tensors.items():
            tensor.copy_(theirs.tensors[name])
    second[1].load_scalar_state(first[1].scalar_state())
    second[1].copy_params_from_masters()
    for step in (3, 4):
        report = train_step(*second, rank_batches(config, step, ctx), config, step, ctx)
        assert (float(report.loss), float(report.grad_norm)) == whole[step - 1]


def test_a_step_never_waits_for_the_device() -> None:
    # Plain ones: the compiled update of a CPU reads its scalars, which waits for nothing there.
    plain = {f"kernels__{name}": "torch" for name in ("norm", "rope", "swiglu", "adamw", "loss")}
    config, ctx = fp8_config(**plain), ParallelContext.single()
    model, optimizer = in_fp8(config, ctx)
    with OperationNames() as seen:
        train_step(model, optimizer, rank_batches(config, 1, ctx), config, 1, ctx)
    assert "aten::aminmax" in seen.names, "the mode must see the casts"
    assert not seen.waits()


def test_a_machine_without_fp8_units_refuses_it() -> None:
    """Before the first collective and when a model is built: no product in software behind the user's back."""
    kernels, cpu = config_for(["kernels.fp8=current", "train.precision=bf16"]).kernels, torch.device("cpu")
    for refuse in (lambda: fp8.check_here(kernels, cpu), lambda: select_operations(kernels, Requirements(cpu))):
        with pytest.raises(ConfigError, match=r"E213.*kernels\.fp8=current cannot run here \(needs a GPU, not cpu\)"):
            refuse()
    assert re.search(r"^ +fp8 +current$", kernels_table(kernels, Requirements(cpu)), re.MULTILINE)
    te = replace(kernels, layers="te", fp8="delayed")  # has answers of its own, but the head is ours
    fp8.check_here(te, cpu)
    with pytest.raises(ConfigError, match="E213"):
        fp8.check_here(replace(te, fp8_head=True), cpu)


# ---- the real thing --------------------------------------------------------------------------------------------------


needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or bool(fp8.unavailable(torch.device("cuda"))), reason="needs a GPU with fp8 units"
)


@pytest.mark.gpu
@needs_fp8
@pytest.mark.parametrize("fused", [False, True])
def test_a_gpu_multiplies_what_the_emulation_does(fused: bool) -> None:
    """Forward may accumulate in fewer bits than fp32; Hopper's 14 are far above bf16's 8 (arXiv 2412.19437, 3.3.2)."""
    device = torch.device("cuda")
    if fused and (why := cuda.unavailable(device)):
        pytest.skip(why)
    real = Fp8Products(fp8.fused_largest, fp8.fused_cast) if fused else Fp8Products()
    x, weight, grad_y = (t.to(device) for t in (random(1, 8, 6, 64), random(2, 144, 64), random(3, 8, 6, 144)))
    results = []
    for products in (emulated(), real):
        operand, kept = products.input(x)
        operands = operand, products.weight(weight, None), products.gradient(grad_y)
        place = torch.ones(144, 64, device=device)
        for add in (False, True):
            products.wgrad(operands[2], kept, place, add)
        grad_x = products.dgrad(operands[2], operands[1])
        results.append((operands, products.fprop(*operands[:2]), grad_x, place))
    for mine, theirs in zip(*(r[0] for r in results), strict=True):
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(mine[:3], theirs[:3], strict=True))
    for mine, theirs in zip(*(r[1:] for r in results), strict=True):
        assert (mine - theirs).float().norm() <= 2.0**-8 * mine.float().norm()


@pytest.mark.gpu
@needs_fp8
def test_a_gpu_learns_in_8_bits_what_it_learns_in_16() -> None:
    """100 steps of a task that is learnt in them, the head too; and the host waits for none of them."""
    losses: dict[str, list[Tensor]] = {}
    for how in ("off", "current"):
        config = fp8_config(kernels__fp8=how, kernels__fp8_head=how == "current", train__num_steps=100)
        config.validate(1)
        ctx = ParallelContext.single("cuda")
        model, optimizer = build(config, ctx)
        losses[how] = []
        for step in range(1, 101):
            batches = [Batch(b.tokens.cuda(), b.labels.cuda()) for b in rank_batches(config, step, ctx)]
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first may load libraries
            try:
                losses[how].append(train_step(model, optimizer, batches, config, step, ctx).loss)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    plain, found = (torch.stack(losses[how]).tolist() for how in ("off", "current"))
    assert plain[-1] < 0.5 * plain[0] and plain != found
    assert sum(found[-10:]) / 10 == pytest.approx(sum(plain[-10:]) / 10, rel=0.05, abs=0.05)
