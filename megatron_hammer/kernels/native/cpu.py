"""Our fused operations on a CPU: the compiled kernels (``csrc/cpu``) behind functions that take tensors.

``library()`` is the namespace that ``fused.py`` and the tables of kernels/ compute with. Where the installation did not
build the module, ``missing`` says so and torch does the work. Tensors are checked here, since the module itself sees
addresses: fp32 and bf16, contiguous unless a function says otherwise; results are written into what the caller made.

Every kernel is compiled for several instruction sets, and the machine's widest is taken. Work is divided over as many
threads as torch has, on torch's own OpenMP runtime, and no result depends on their number. ``torch.compile`` is no
faster and takes 10 s and 150 MB at start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch  # before the module below: its OpenMP runtime must be the one that is loaded
from torch import Tensor

from megatron_hammer.base.compiled import find_compiled
from megatron_hammer.kernels.linear_cross_entropy import Columns

INTERFACE = 3  # raised with every change of the compiled functions: an old build must not be called with new arguments
DTYPES = frozenset({torch.float32, torch.bfloat16})

COMPILED: Any = find_compiled("megatron_hammer.kernels.native._cpu", INTERFACE)


def missing(device: torch.device) -> str:
    """Why the kernels cannot run in this process, or an empty string."""
    return "" if COMPILED else "megatron_hammer.kernels.native._cpu is missing or outdated: reinstall"


class Kernels:
    """The functions of one instruction set; what each computes is in ``csrc/cpu/kernels.hpp``."""

    def __init__(self, version: Any) -> None:
        self._version = version
        self.name: str = version.name

    # ---- layers -------------------------------------------------------------------------------------------------

    def add_rms_norm_forward(
        self, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, normed: Tensor, summed: Tensor | None,
        rstd: Tensor,
    ) -> None:  # fmt: skip
        """x, update, normed, summed: [r, h]; weight: [h]; rstd: [r] fp32. Without update no summed."""
        rows, h = x.shape
        assert (update is None) == (summed is None), "the sum is written where there is an update"
        half = _check(x.dtype, (x, update, normed, summed), (rows, h))
        _check(x.dtype, (weight,), (h,))
        _check(torch.float32, (rstd,), (rows,))
        self._version.add_rms_norm_forward(
            torch.get_num_threads(), half, rows, h, _at(x), _at(update), _at(weight), eps, _at(normed), _at(summed),
            _at(rstd),
        )  # fmt: skip

    def add_rms_norm_backward(
        self, grad_normed: Tensor, grad_summed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor,
        grad_x: Tensor, grad_weight: Tensor,
    ) -> None:  # fmt: skip
        """grad_x [r, h] with grad_summed added; grad_weight [h], summed in fp32 in an order that is fixed."""
        rows, h = summed.shape
        half = _check(summed.dtype, (grad_normed, grad_summed, summed, grad_x), (rows, h))
        _check(summed.dtype, (weight, grad_weight), (h,))
        _check(torch.float32, (rstd,), (rows,))
        self._version.add_rms_norm_backward(
            torch.get_num_threads(), half, rows, h, _at(grad_normed), _at(grad_summed), _at(summed), _at(weight),
            _at(rstd), _at(grad_x), _at(grad_weight),
        )  # fmt: skip

    def rope_forward(self, qkv: Tensor, cos: Tensor, sin: Tensor, turned: int) -> None:
        """Rotate the first ``turned`` heads of qkv [s, b, heads, d] in place; cos, sin: [s, d/2]."""
        s, b, heads, d = qkv.shape
        assert turned <= heads and d % 2 == 0, f"{turned} of {heads} heads of {d} cannot be turned"
        half = _check(qkv.dtype, (qkv,), (s, b, heads, d))
        _check(qkv.dtype, (cos, sin), (s, d // 2))
        self._version.rope_forward(torch.get_num_threads(), half, s, b, heads, turned, d, _at(qkv), _at(cos), _at(sin))

    def rope_backward(
        self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, grad_qkv: Tensor
    ) -> None:
        """grad_qkv [s, b, n + 2g, d] from gradients [s, b, n or g, d], of which the last dimension is contiguous."""
        s, b, heads, d = grad_qkv.shape
        grads = (grad_q, grad_k, grad_v)
        assert d % 2 == 0 and heads == sum(x.shape[2] for x in grads), f"{heads} heads of {d} are not those of q, k, v"
        for x in grads:
            assert x.shape[:2] == (s, b) and x.shape[3] == d and x.stride(3) == 1 and x.dtype == grad_qkv.dtype, (
                f"a gradient is {x.dtype} {tuple(x.shape)} with strides {x.stride()}"
            )
        half = _check(grad_qkv.dtype, (grad_qkv,), (s, b, heads, d))
        _check(grad_qkv.dtype, (cos, sin), (s, d // 2))
        strided = ((_at(x), *x.stride()[:3], x.shape[2]) for x in grads)
        self._version.rope_backward(torch.get_num_threads(), half, s, b, d, *strided, _at(cos), _at(sin), _at(grad_qkv))

    def swiglu_forward(self, gate_up: Tensor, product: Tensor) -> None:
        """[r, 2f] -> [r, f]."""
        rows, f = product.shape
        half = _check(gate_up.dtype, (gate_up,), (rows, 2 * f))
        _check(gate_up.dtype, (product,), (rows, f))
        self._version.swiglu_forward(torch.get_num_threads(), half, rows, f, _at(gate_up), _at(product))

    def swiglu_backward(self, grad: Tensor, gate_up: Tensor, grad_gate_up: Tensor) -> None:
        """grad: [r, f]; gate_up, grad_gate_up: [r, 2f]."""
        rows, f = grad.shape
        half = _check(grad.dtype, (gate_up, grad_gate_up), (rows, 2 * f))
        _check(grad.dtype, (grad,), (rows, f))
        self._version.swiglu_backward(
            torch.get_num_threads(), half, rows, f, _at(grad), _at(gate_up), _at(grad_gate_up)
        )

    # ---- loss: the functions of linear_cross_entropy.py ------------------------------------------------------------

    def row_statistics(self, logits: Tensor, labels: Tensor, columns: Columns) -> Tensor:
        """Largest logit, sum of exp(z - largest), logit of the label or 0: [3, n] fp32."""
        statistics = torch.empty((3, len(labels)), dtype=torch.float32)
        self._version.row_statistics(*_rows(logits, labels, columns), _at(logits), _at(labels), _at(statistics))
        return statistics

    def softmax_gradient_(
        self, logits: Tensor, labels: Tensor, columns: Columns, lse: Tensor, loss: Tensor, weights: Tensor,
        z_loss: float = 0.0,
    ) -> None:  # fmt: skip
        """Turn logits into the gradient of sum(weights * (loss + z_loss * lse^2)), in place."""
        numbers = [x.float().contiguous() for x in (lse, loss, weights)]
        _check(torch.float32, numbers, (len(labels),))
        self._version.softmax_gradient(
            *_rows(logits, labels, columns), _at(logits), _at(labels), *map(_at, numbers), z_loss
        )

    def loss_and_gradient_(
        self, logits: Tensor, labels: Tensor, columns: Columns, weights: Tensor, z_loss: float = 0.0
    ) -> Tensor:
        """Both on a rank that holds the whole vocabulary: loss [n] fp32. A label beyond it is an IndexError."""
        loss = torch.empty(len(labels), dtype=torch.float32)
        weights = weights.float().contiguous()
        _check(torch.float32, (weights,), (len(labels),))
        self._version.loss_and_gradient(
            *_rows(logits, labels, columns), _at(logits), _at(labels), _at(weights), z_loss, _at(loss)
        )
        return loss

    # ---- optimizer --------------------------------------------------------------------------------------------------

    def adamw(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor | None, lr: float,
        beta1: float, beta2: float, eps: float, decay: float, divisor: Tensor, skip: Tensor, updates: Tensor,
    ) -> None:  # fmt: skip
        """Update flat fp32 tensors, and ``param`` from the new weights; ``updates`` is the count before this one."""
        if skip.item() != 0:
            return
        _check(torch.float32, (master, grad, exp_avg, exp_avg_sq), master.shape)
        half = param is not None and _check(param.dtype, (param,), master.shape)
        self._version.adamw(
            torch.get_num_threads(), half, master.numel(), _at(master), _at(grad), _at(exp_avg), _at(exp_avg_sq),
            _at(param), lr, beta1, beta2, eps, decay, divisor.item(), updates.item(),
        )  # fmt: skip

    def add_square_sum(self, part: Tensor, out: Tensor) -> None:
        """out, an fp32 scalar, += sum(part^2); fp32 within blocks of a fixed size, fp64 over them."""
        _check(torch.float32, (part,), part.shape)
        out.add_(self._version.square_sum(torch.get_num_threads(), part.numel(), _at(part)))

    def accumulate(self, place: Tensor, values: Tensor, add: bool) -> None:
        """place, fp32, = values, or += with ``add``; without a widened copy of values."""
        _check(torch.float32, (place,), values.shape)
        half = _check(values.dtype, (values,), values.shape)
        self._version.accumulate(torch.get_num_threads(), half, values.numel(), _at(place), _at(values), add)


def _check(dtype: torch.dtype, tensors: Sequence[Tensor | None], shape: Sequence[int]) -> bool:
    """That tensors are what the compiled code takes them for; whether the type is bf16."""
    assert dtype in DTYPES, f"the compiled kernels do not compute in {dtype}"
    for x in tensors:
        assert x is None or (x.dtype == dtype and x.shape == tuple(shape) and x.is_contiguous() and x.is_cpu), (
            f"expected contiguous {dtype} {tuple(shape)}, found {x.dtype} {tuple(x.shape)}, strides {x.stride()}"
        )
    return dtype == torch.bfloat16


def _rows(logits: Tensor, labels: Tensor, columns: Columns) -> tuple[int, bool, int, int, int, int, int]:
    """What describes a chunk of logits, of which a row is contiguous."""
    n, width = logits.shape
    assert logits.dtype in DTYPES and logits.is_cpu and (logits.stride(1) == 1 or width <= 1), (
        f"logits are {logits.dtype} with strides {logits.stride()}"
    )
    assert labels.dtype == torch.int64 and labels.shape == (n,) and labels.is_contiguous(), "labels must be [n] int64"
    assert 0 <= columns.valid <= width, f"{columns.valid} of {width} columns cannot be valid"
    return (
        torch.get_num_threads(), logits.dtype == torch.bfloat16, n, logits.stride(0), columns.start, columns.valid,
        width,
    )  # fmt: skip


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def library() -> Kernels:
    """The kernels for the machine's widest instructions; only where ``missing`` says nothing."""
    return Kernels(COMPILED.versions()[0])
