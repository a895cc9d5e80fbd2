"""bf16 products by way of fp32: one rounding from the exact ones, a block at a time, and taken where they pay."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels import newton_schulz, wide_products
from megatron_hammer.kernels.fp8 import select_products
from megatron_hammer.kernels.wide_products import WideGraphProducts, WideProducts
from tests.model.tiny import tiny_config, train

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def assert_rounded_once(found: Tensor, exact: Tensor, size: Tensor) -> None:
    """Half a unit of the type, and fp32's noise relative to the sum of the terms' sizes."""
    bound = 0.5 * torch.finfo(found.dtype).eps * exact.abs() + 1e-6 * size
    assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("block", [1, 3 * 24, 2**20])
def test_each_product_is_rounded_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the weight in fp32 not even once; into memory that is given, or not."""
    monkeypatch.setattr(wide_products, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(wide_products, "SCRATCH", type(wide_products.SCRATCH)())
    products, generator = WideProducts(), torch.Generator().manual_seed(3)
    x, weight, grad = (torch.randn(*shape, generator=generator).to(BF16) for shape in ((5, 2, 24), (7, 24), (5, 2, 7)))
    wide = [t.double().flatten(0, -2) for t in (x, weight, grad)]
    for out in (None, torch.full((5, 2, 7), torch.nan, dtype=BF16)):
        y = products.fprop(x, weight, out)
        assert y.dtype == BF16 and y.shape == (5, 2, 7) and (out is None or y is out)
        assert_rounded_once(y.flatten(0, -2), wide[0] @ wide[1].t(), wide[0].abs() @ wide[1].abs().t())
    for out in (None, torch.full((5, 2, 24), torch.nan, dtype=BF16)):
        dx = products.dgrad(grad, weight, out)
        assert dx.dtype == BF16 and dx.shape == (5, 2, 24) and (out is None or dx is out)
        assert_rounded_once(dx.flatten(0, -2), wide[2] @ wide[1], wide[2].abs() @ wide[1].abs())
    exact, size = wide[2].t() @ wide[0], wide[2].abs().t() @ wide[0].abs()
    for dtype, begun in ((torch.float32, False), (torch.float32, True), (BF16, False)):
        place = torch.ones(7, 24, dtype=dtype) if begun else torch.full((7, 24), torch.nan, dtype=dtype)
        products.wgrad(grad, (x,), place, begun)
        assert_rounded_once(place, exact + begun, size + begun)


def test_a_thread_has_one_set_of_scratch_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, head, evaluation and graphs of a thread use the same; what another thread had goes with it."""
    monkeypatch.setattr(wide_products, "SCRATCH", type(wide_products.SCRATCH)())
    monkeypatch.setattr(wide_products, "pay_here", lambda *_: True)
    layers, head = select_products(KernelsConfig(compile="layers"), CPU, BF16)
    x, weight, found = torch.ones(5, 24, dtype=BF16), torch.ones(7, 24, dtype=BF16), list[int]()
    seen = list[weakref.ref[Tensor]]()

    def multiply() -> None:
        for products in (layers, layers.evaluation, head):
            assert torch.equal(products.fprop(x, weight), torch.full((5, 7), 24.0, dtype=BF16))
            found.append(wide_products.SCRATCH.whole.data_ptr())
        seen.append(weakref.ref(wide_products.SCRATCH.whole))

    multiply()
    thread = threading.Thread(target=multiply)
    thread.start()
    thread.join()
    assert len(set(found[:3])) == len(set(found[3:])) == 1 and len(set(found)) == 2
    gc.collect()
    assert seen[0]() is not None and seen[1]() is None


def test_where_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """On x86 without instructions for bf16, and in bf16 alone; in the graphs of a compiler, too."""
    for flags, wanted in (("avx2 avx512f", True), ("avx2 avx512_bf16", False), ("asimd bf16", False), ("", False)):
        for module in (wide_products, newton_schulz):
            monkeypatch.setattr(module, "processor_text", lambda flags=flags: flags)
        for dtype in (BF16, torch.float32, torch.float64):
            layers, head = select_products(KernelsConfig(), CPU, dtype)
            for products in (layers, head, layers.evaluation):
                assert isinstance(products, WideProducts) == (wanted and dtype == BF16)
        layers, head = select_products(KernelsConfig(compile="layers"), CPU, BF16)
        assert layers.in_graph and isinstance(layers, WideGraphProducts) == wanted
        assert all(isinstance(products, WideProducts) == wanted for products in (layers.evaluation, head))


def test_a_model_trains_alike_with_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of bf16 by each, whatever this processor takes: the same losses but for roundings."""
    found, wgrad = [], WideProducts.wgrad
    for wide in (False, True):
        called = list[Tensor]()
        monkeypatch.setattr(wide_products, "pay_here", lambda device, dtype, wide=wide: wide and dtype == BF16)
        monkeypatch.setattr(
            WideProducts, "wgrad", lambda self, grad, *rest, seen=called: (seen.append(grad), wgrad(self, grad, *rest))
        )
        steps, _ = train(0, tiny_config(train__precision="bf16"), 5)
        assert bool(called) == wide
        found.append([loss for loss, *_ in steps])
    assert found[0] == pytest.approx(found[1], rel=0.01)
