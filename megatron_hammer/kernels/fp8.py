"""The matrix products of linear layers in fp8 (``kernels.fp8=current``), on the fp8 units of a GPU.

Each operand becomes 8-bit numbers and one fp32 scale, taken from its own largest value ("current" scaling, arXiv
2209.05433; no history, so a resumed run is the same run): e4m3 for inputs and weights, e5m2 for gradients. The products
accumulate in fp32 and apply both scales at their end::

    x  [r, in]  --e4m3--> rows, columns       y  [r, out]  =  x.rows       W.rows^T       bf16
    W  [out, in] -e4m3--> rows, columns       dx [r, in]   =  dy.rows      W.columns^T    bf16
    dy [r, out] --e5m2--> rows, columns       dW [out, in] += dy.columns   x.columns^T    fp32

The fp8 units of Hopper multiply only matrices whose summed dimension is contiguous in both, so each operand exists in
both orders: ``rows`` as it lies, ``columns`` its transpose. Backward keeps the columns of x, one byte an element where
bf16 keeps two. A weight is quantised once a step. Scales never leave the device. Evaluation is in bf16.

Bytes an element with our CUDA library: 2 read and 2 written for both orders, and 2 read before that for the largest
value, but not of what our norm and SwiGLU write: they measure it on the way. Plain torch makes several passes. The
weight gradient is worth its casts: with r rows it saves 2 r (1/790 - 1/1300) ps an element of dW on an H200 and costs 8
bytes more there than bf16's, since ``torch._scaled_mm`` cannot add to what is in memory: it pays above 2,000 rows even
if nothing stays in cache (predicted, not measured).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.config import KernelsConfig
from megatron_hammer.kernels import wide_products
from megatron_hammer.kernels.linear import PLAIN, Gradient, GraphProducts, Products, write_or_add_in_graph
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.native import cuda
from megatron_hammer.kernels.wide_products import WideGraphProducts, WideProducts

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}  # arXiv 2209.05433, table 1
# Tensors without a larger value are not scaled up any more: the inverse of a scale stays finite, and zeros stay zero.
SMALLEST = 2.0**-100
# Elements of one block of a weight's gradient that is added to what is there: 32 MiB in fp32 stay in a GPU's L2 cache,
# and the head's product needs no 0.9 GB beside it.
BLOCK_ELEMENTS = 2**23
MOST_KNOWN = 64  # largest values that are held before those of tensors that are gone are dropped; chosen by eye


class Operand(NamedTuple):
    """A tensor [.., c] of r rows in 8 bits; its values are ``scale`` times the numbers."""

    rows: Tensor
    """[r, c]."""
    columns: Tensor
    """[c, r], contiguous."""
    scale: Tensor
    """fp32 scalar on the device."""
    shape: torch.Size


# ---- casts -----------------------------------------------------------------------------------------------------------


def largest(x: Tensor) -> Tensor:
    """The reference: largest absolute value, an fp32 scalar on the device; NaN if x holds one."""
    low, high = x.aminmax()
    return torch.maximum(-low, high).float()


def cast(x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference: x [r, c] * factor in 8 bits, [r, c] and [c, r]; what is beyond the largest number stays at it."""
    rows = (x.float() * factor).clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
    return rows, rows.t().contiguous()


def _scalar(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=device)


def fused_largest(x: Tensor) -> Tensor:
    """``largest`` by our CUDA library."""
    amax = _scalar(x.device)
    cuda.library().amax(x, amax)
    return amax


def fused_cast(x: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``cast`` by our CUDA library: x is read once."""
    rows, columns = torch.empty_like(x, dtype=dtype), x.new_empty(x.shape[::-1], dtype=dtype)
    cuda.library().cast_fp8(x, factor, rows, columns)
    return rows, columns


class MeasuringKernels:
    """The kernels of norm and SwiGLU that say, of each tensor they write, its largest value: no pass over it for that.

    The products that read a tensor ask for it by its memory, so nothing between the two knows of it; for a tensor that
    was not written here (gathered from other ranks, say) there is no answer, and it is measured.
    """

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._known: dict[StorageWeakRef, tuple[int, int, Tensor]] = {}  # memory -> elements, version, largest value

    def add_rms_norm_forward(self, x: Tensor, *others: Any) -> None:
        amax, normed = _scalar(x.device), others[3]
        self._kernels.add_rms_norm_forward(x, *others, amax)
        self._note(normed, amax)

    def swiglu_forward(self, gate_up: Tensor, product: Tensor) -> None:
        amax = _scalar(gate_up.device)
        self._kernels.swiglu_forward(gate_up, product, amax)
        self._note(product, amax)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def _note(self, x: Tensor, amax: Tensor) -> None:
        if len(self._known) >= MOST_KNOWN:
            self._known = {memory: known for memory, known in self._known.items() if not memory.expired()}
        if not x.is_inference():  # such a tensor has no version, and no products in 8 bits read it
            self._known[StorageWeakRef(x.untyped_storage())] = x.numel(), x._version, amax

    def largest_of(self, x: Tensor) -> Tensor | None:
        """The largest value of a whole tensor that was written here and has not been changed."""
        elements, version, amax = self._known.get(StorageWeakRef(x.untyped_storage()), (0, 0, None))
        return amax if (elements, version) == (x.numel(), x._version) else None


# ---- products --------------------------------------------------------------------------------------------------------


def multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool, out: Tensor | None = None
) -> Tensor:
    """a [m, k] times the transpose of b [n, k], both contiguous: [m, n] in ``dtype``, which is that of ``out``.

    Args:
        fast: let the fp8 units accumulate with fewer bits than fp32 (as Transformer Engine does in forward only).
    """
    # Private, and the same in torch 2.11 to 2.15 (tests/test_private_torch.py).
    return torch._scaled_mm(a, b.t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast, out=out)


def emulated_multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool, out: Tensor | None = None
) -> Tensor:
    """The reference of ``multiply``: the same numbers multiplied in fp32. For tests and parity checks on a CPU."""
    product = (a.float() @ b.float().t()).mul_(a_scale * b_scale)
    return product.to(dtype) if out is None else out.copy_(product)


class Fp8Products(Products):
    """Products in 8 bits with tensor-wise current scaling.

    Sizes must be multiples of 16, except that of a product's rows (``config/`` sees to it). Under tensor parallelism
    an operand that all ranks hold has one scale, as they compute it from the same numbers; a divided one has a scale a
    rank.
    """

    def __init__(
        self,
        largest: Callable[[Tensor], Tensor] = largest,
        cast: Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]] = cast,
        multiply: Callable[..., Tensor] = multiply,
        measured: MeasuringKernels | None = None,
    ) -> None:
        super().__init__()
        self.evaluation, self.operands = PLAIN, self
        self.largest, self.cast, self.multiply, self.measured = largest, cast, multiply, measured
        self._weights: dict[Gradient, tuple[tuple[int, int], Operand]] = {}  # of each weight: its version, quantised

    def quantise(self, x: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Operand:
        """x [.., c] scaled by its own largest value, which may be known.

        An infinite or undefined value makes the whole product NaN: the step is skipped, as in bf16.
        """
        rows = x.detach().flatten(0, -2).contiguous()
        factor = LARGEST[dtype] / (self.largest(rows) if amax is None else amax).clamp(min=SMALLEST)
        return Operand(*self.cast(rows, factor, dtype), factor.reciprocal(), x.shape)

    def input(self, x: Tensor) -> tuple[Operand, tuple[Tensor, ...]]:
        operand = self.quantise(x, E4M3, self.measured.largest_of(x) if self.measured else None)
        return operand, (operand.columns, operand.scale)

    def weight(self, weight: Tensor, gradient: Gradient | None) -> Operand:
        """Quantised anew only after it has changed, where its ``gradient`` says when: 2 bytes a weight are held.

        A compiled layer quantises for each micro-batch: what a graph takes for a constant must not change.
        """
        if gradient is None or self.in_graph or gradient.version is None:
            return self.quantise(weight, E4M3)
        version = gradient.version, weight._version
        held = self._weights.get(gradient)
        if held is None or held[0] != version:
            held = self._weights[gradient] = version, self.quantise(weight, E4M3)
        return held[1]

    def gradient(self, grad_y: Tensor) -> Operand:
        return self.quantise(grad_y, E5M2)

    def fprop(self, x: Operand, weight: Operand, out: Tensor | None = None) -> Tensor:
        y = self.multiply(x.rows, x.scale, weight.rows, weight.scale, torch.bfloat16, True, out)
        return y.view(*x.shape[:-1], -1)

    def dgrad(self, grad: Operand, weight: Operand, out: Tensor | None = None) -> Tensor:
        dx = self.multiply(grad.rows, grad.scale, weight.columns, weight.scale, torch.bfloat16, False, out)
        return dx.view(*grad.shape[:-1], -1)

    def wgrad(self, grad: Operand, kept: tuple[Tensor, ...], place: Tensor, begun: bool) -> None:
        x, x_scale = kept
        if not begun:
            self.multiply(grad.columns, grad.scale, x, x_scale, place.dtype, False, place)
            return
        rows = max(1, BLOCK_ELEMENTS // place.shape[1])
        for i in range(0, place.shape[0], rows):
            part = grad.columns[i : i + rows]
            place[i : i + rows].add_(self.multiply(part, grad.scale, x, x_scale, place.dtype, False))


class Fp8GraphProducts(Fp8Products, GraphProducts):
    """The same in layers that torch.compile makes a graph of."""

    def wgrad_in_graph(self, gradient: Gradient, grad: Operand, kept: tuple[Tensor, ...]) -> None:
        product = self.multiply(grad.columns, grad.scale, *kept, gradient.main_grad.dtype, False)
        write_or_add_in_graph(gradient.main_grad, gradient.begun, product)


def select_products(
    kernels: KernelsConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Products, Products]:
    """The products of the layers (of ``layers.py``; Transformer Engine's have their own) and of the head.

    Raises:
        ConfigError: the config asks for 8 bits, which this device cannot multiply.
    """
    check_here(kernels, device)
    in_graph, layers = kernels.compile == "layers", kernels.fp8 != "off" and kernels.layers == "torch"
    wide = wide_products.pay_here(device, dtype)
    head = WideProducts() if wide else PLAIN
    plain = (WideGraphProducts() if wide else GraphProducts()) if in_graph else head
    if not (layers or kernels.fp8_head):
        return plain, head
    fast = Fp8Products()
    if not in_graph and not cuda.unavailable(device):  # the compiler fuses casts with what comes before
        fast = Fp8Products(fused_largest, fused_cast, measured=MeasuringKernels(cuda.library()))
    in_layers = Fp8GraphProducts() if in_graph else fast
    return in_layers if layers else plain, fast if kernels.fp8_head else head


def measuring(products: Products) -> dict[str, Any]:
    """The fused operations, by their setting, that measure what these products read; empty where none do."""
    if not isinstance(products, Fp8Products) or products.measured is None:
        return {}
    k = products.measured
    return {"norm": partial(fused.add_rms_norm, k), "swiglu": partial(fused.swiglu, k)}


def check_here(kernels: KernelsConfig, device: torch.device) -> None:
    """Raises ``ConfigError`` as ``select_products``: for each rank, before its first collective."""
    ours = kernels.fp8_head or (kernels.fp8 != "off" and kernels.layers == "torch")
    if ours and (why := unavailable(device)):
        raise ConfigError(13, f"kernels.fp8={kernels.fp8}", f"cannot run here ({why})", "use kernels.fp8=off")


def unavailable(device: torch.device) -> str:
    """Why this device cannot multiply in 8 bits, or an empty string."""
    if device.type != "cuda":
        # torch 2.13 has it on a CPU too, right to the last bit and some 1,000 times slower than bf16 (Xeon, AMX).
        return f"needs a GPU, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return "" if (major, minor) >= (8, 9) else f"the GPU has compute capability {major}.{minor}, fp8 needs 8.9"
