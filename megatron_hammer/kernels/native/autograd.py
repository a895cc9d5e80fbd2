"""Our fused operations in a model: autograd around the compiled kernels of a CPU (``cpu.py``) or a GPU (``cuda.py``).

Each function has the signature of its reference after ``k``, the kernels' namespace, and keeps as little as backward
can do with::

    add_rms_norm   x + update and rstd [r]     d norm and the gradient of the residual stream, added in one pass
    rope           cos, sin                    overwrites qkv; backward writes the gradient of qkv as one tensor
    swiglu         gate_up

Statistics and arithmetic are fp32, so in 16 bits a result is rounded once where the reference rounds between steps.
Backward cannot be differentiated again.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hammer.kernels.native.memory import empty


class Kernels(Protocol):
    """What a device's kernels offer; results are written into the arguments that are named for them."""

    def add_rms_norm_forward(
        self, x: Tensor, update: Tensor | None, weight: Tensor, eps: float, normed: Tensor, summed: Tensor | None,
        rstd: Tensor, /,
    ) -> None: ...  # fmt: skip
    def add_rms_norm_backward(
        self, grad_normed: Tensor, grad_summed: Tensor | None, summed: Tensor, weight: Tensor, rstd: Tensor,
        grad_x: Tensor, grad_weight: Tensor, /,
    ) -> None: ...  # fmt: skip
    def rope_forward(self, qkv: Tensor, cos: Tensor, sin: Tensor, turned: int, /) -> None: ...
    def rope_backward(
        self, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, cos: Tensor, sin: Tensor, grad_qkv: Tensor, /
    ) -> None: ...
    def swiglu_forward(self, gate_up: Tensor, product: Tensor, /) -> None: ...
    def swiglu_backward(self, grad: Tensor, gate_up: Tensor, grad_gate_up: Tensor, /) -> None: ...


def add_rms_norm(k: Kernels, x: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x + update, x + update); without an update the second is x, so that backward adds its gradient."""
    return _AddRMSNorm.apply(k, x, update, weight, eps)  # type: ignore[no-any-return]


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Kernels, x: Tensor, update: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.kernels, h = k, x.shape[-1]
        rows = x.contiguous().view(-1, h)
        other = None if update is None else update.contiguous().view(-1, h)
        normed, rstd = empty(rows.shape, rows), rows.new_empty(rows.shape[0], dtype=torch.float32)
        summed = None if other is None else empty(rows.shape, rows)
        k.add_rms_norm_forward(rows, other, weight, eps, normed, summed, rstd)
        second = x if summed is None else summed.view(x.shape)
        ctx.save_for_backward(second, weight, rstd)
        return normed.view(x.shape), second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_normed, grad_summed = grads
        if grad_normed is None:
            return None, grad_summed, grad_summed, None, None
        summed, weight, rstd = ctx.saved_tensors
        h = summed.shape[-1]
        rows = summed.contiguous().view(-1, h)
        beside = None if grad_summed is None else grad_summed.contiguous().view(-1, h)
        grad_x, grad_weight = empty(rows.shape, rows), torch.empty_like(weight)
        ctx.kernels.add_rms_norm_backward(
            grad_normed.contiguous().view(-1, h), beside, rows, weight, rstd, grad_x, grad_weight
        )
        grad_x = grad_x.view(summed.shape)
        return None, grad_x, grad_x if ctx.needs_input_grad[2] else None, grad_weight, None


def rope(k: Kernels, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> tuple[Tensor, ...]:
    """[s, b, n + 2g, d] -> rotated q, rotated k and v, which share the memory of qkv.

    qkv is written over, so whoever kept it for backward is told so; not where it is a leaf that wants a gradient, or
    not contiguous: then a copy is.
    """
    if not qkv.is_contiguous() or (qkv.is_leaf and qkv.requires_grad):
        qkv = qkv.clone(memory_format=torch.contiguous_format)
    return _Rope.apply(k, qkv, cos, sin, heads, groups)  # type: ignore[no-any-return]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k: Kernels, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int
    ) -> tuple[Tensor, ...]:
        s, _, _, d = qkv.shape
        rows = cos.contiguous().view(s, d // 2), sin.contiguous().view(s, d // 2)
        k.rope_forward(qkv, *rows, heads + groups)
        if not qkv.is_inference():
            torch.autograd.graph.increment_version(qkv)
        ctx.save_for_backward(*rows)
        ctx.kernels, ctx.shape = k, qkv.shape
        # As tensors of their own: autograd would follow views of an input back to its own history.
        return tuple(
            qkv.new_empty(0).set_(qkv.untyped_storage(), x.storage_offset(), x.shape, x.stride())
            for x in qkv.split((heads, groups, groups), dim=2)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        rows = [x if x.stride(-1) == 1 else x.contiguous() for x in grads]
        grad_qkv = empty(ctx.shape, rows[0])
        ctx.kernels.rope_backward(*rows, cos, sin, grad_qkv)
        return None, grad_qkv, None, None, None, None


def swiglu(k: Kernels, gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [..., 2f] -> [..., f]."""
    return _SwiGLU.apply(k, gate_up)  # type: ignore[no-any-return]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Kernels, gate_up: Tensor) -> Tensor:
        f = gate_up.shape[-1] // 2
        rows = gate_up.contiguous().view(-1, 2 * f)
        product = empty((rows.shape[0], f), rows)
        k.swiglu_forward(rows, product)
        ctx.save_for_backward(gate_up)
        ctx.kernels = k
        return product.view(*gate_up.shape[:-1], f)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gate_up,) = ctx.saved_tensors
        rows = gate_up.contiguous().view(-1, gate_up.shape[-1])
        grad_gate_up = empty(rows.shape, rows)
        grad = grads[0].contiguous().view(-1, rows.shape[1] // 2)
        ctx.kernels.swiglu_backward(grad, rows, grad_gate_up)
        return None, grad_gate_up.view(gate_up.shape)
