"""Our fused operations in a model: autograd around the compiled kernels of a CPU (``cpu.py``) or a GPU (``cuda.py``).

Each function has the signature of its reference after ``kernels``, the compiled functions of a device, and keeps as
little as backward can do with::

    add_rms_norm   x + branch and rstd [r]     d norm and the gradient of the residual stream, added in one pass
    rope           cos, sin                    overwrites qkv; backward writes the gradient of qkv as one tensor
    swiglu         gate_up
    attention      q, k, v, the result and, for each row and head, the logarithm of the sum of exponentials (CPU only)

Statistics and arithmetic are fp32, so in 16 bits a result is rounded once where the reference rounds between steps.
Backward cannot be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_hammer.kernels.linear import Gradient, direct, once_differentiable, write_or_add
from megatron_hammer.kernels.native.cpu import attention_versions, empty
from megatron_hammer.kernels.packed_sequences import PackedSequences


class LayerKernels(Protocol):
    """What the compiled kernels of every device offer; results are written into the arguments named for them."""

    def add_rms_norm_forward(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, normed: Tensor, summed: Tensor | None,
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


class _AddRMSNorm(torch.autograd.Function):
    """(RMSNorm of x + branch, x + branch); without a branch the second is x, so that backward adds its gradient."""

    @staticmethod
    def forward(
        ctx: Any, kernels: LayerKernels, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float,
        gradient: Gradient | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.kernels, ctx.gradient, h = kernels, gradient, x.shape[-1]
        rows = x.contiguous().view(-1, h)
        other = None if branch is None else branch.contiguous().view(-1, h)
        normed, rstd = empty(rows.shape, rows), rows.new_empty(rows.shape[0], dtype=torch.float32)
        summed = None if other is None else empty(rows.shape, rows)
        kernels.add_rms_norm_forward(rows, other, weight, eps, normed, summed, rstd)
        second = x if summed is None else summed.view(x.shape)
        ctx.save_for_backward(second, weight, rstd)
        return normed.view(x.shape), second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_normed, grad_summed = grads
        if grad_normed is None:
            return None, grad_summed, grad_summed, None, None, None
        summed, weight, rstd = ctx.saved_tensors
        h = summed.shape[-1]
        rows = summed.contiguous().view(-1, h)
        beside = None if grad_summed is None else grad_summed.contiguous().view(-1, h)
        grad_x, grad_weight = empty(rows.shape, rows), torch.empty_like(weight)
        ctx.kernels.add_rms_norm_backward(
            grad_normed.contiguous().view(-1, h), beside, rows, weight, rstd, grad_x, grad_weight
        )
        if ctx.gradient is not None:
            ctx.gradient.add(partial(write_or_add, grad_weight))
        grad_x = grad_x.view(summed.shape)
        grad_branch = grad_x if ctx.needs_input_grad[2] else None
        return None, grad_x, grad_branch, grad_weight if ctx.gradient is None else None, None, None


add_rms_norm = direct(_AddRMSNorm)


def rope(kernels: LayerKernels, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int) -> tuple[Tensor, ...]:
    """[s, b, n + 2g, d] -> rotated q, rotated k and v, which share the memory of qkv.

    qkv is written over, so whoever kept it for backward is told so; not where it is a leaf that wants a gradient, or
    not contiguous: then a copy is.
    """
    if not qkv.is_contiguous() or (qkv.is_leaf and qkv.requires_grad):
        qkv = qkv.clone(memory_format=torch.contiguous_format)
    return _rope(kernels, qkv, cos, sin, heads, groups)  # type: ignore[no-any-return]


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: LayerKernels, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, groups: int
    ) -> tuple[Tensor, ...]:
        s, b, _, d = qkv.shape
        rows = cos.contiguous().view(s, d // 2), sin.contiguous().view(s, d // 2)
        kernels.rope_forward(qkv, *rows, heads + groups)
        if not qkv.is_inference():
            torch.autograd.graph.increment_version(qkv)
        ctx.save_for_backward(*rows)
        ctx.kernels, ctx.shape = kernels, qkv.shape
        # As tensors of their own: autograd would follow views of an input back to its own history.
        memory, start, strides = qkv.untyped_storage(), qkv.storage_offset(), qkv.stride()
        q = qkv.new_empty(0).set_(memory, start, (s, b, heads, d), strides)
        k = qkv.new_empty(0).set_(memory, start + heads * d, (s, b, groups, d), strides)
        v = qkv.new_empty(0).set_(memory, start + (heads + groups) * d, (s, b, groups, d), strides)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        rows = [x if x.stride(-1) == 1 else x.contiguous() for x in grads]
        grad_qkv = empty(ctx.shape, rows[0])
        ctx.kernels.rope_backward(*rows, cos, sin, grad_qkv)
        return None, grad_qkv, None, None, None, None


_rope = direct(_Rope)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up: [..., 2f] -> [..., f]."""

    @staticmethod
    def forward(ctx: Any, kernels: LayerKernels, gate_up: Tensor) -> Tensor:
        f = gate_up.shape[-1] // 2
        rows = gate_up.contiguous().view(-1, 2 * f)
        product = empty((rows.shape[0], f), rows)
        kernels.swiglu_forward(rows, product)
        ctx.save_for_backward(gate_up)
        ctx.kernels = kernels
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


swiglu = direct(_SwiGLU)


Bounds = tuple[list[int], list[int]]
"""Where documents begin and end among the rows, and their keys among the keys: ``PackedSequences.bounds``."""


class AttentionKernels(Protocol):
    """What the compiled kernels of a CPU offer besides.

    Documents are rows ``bounds[i]`` to ``bounds[i + 1]``, their keys and values rows ``key_bounds[i]`` and on.
    """

    def attention_forward(
        self, bounds: Sequence[int], key_bounds: Sequence[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, /,
    ) -> None: ...  # fmt: skip
    def attention_backward(
        self, bounds: Sequence[int], key_bounds: Sequence[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        lse: Tensor, grad: Tensor, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, /,
    ) -> None: ...  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None = None, kernels: AttentionKernels | None = None
) -> Tensor:
    """q [s, b, n, d], k and v [keys, b, g, d] -> [s, b, n, d]: causal, within documents where there are any.

    Args:
        kernels: of ``csrc/cpu/attention.inl``; absent: those of the machine's best instructions.
    """
    kernels = kernels or attention_versions(q.dtype)[0]
    bounds = ([0, len(q)], [0, len(k)]) if documents is None else documents.bounds
    assert bounds[0][-1] == len(q), f"documents of {bounds[0][-1]} rows do not divide {len(q)}"
    return _attention(kernels, q, k, v, bounds)  # type: ignore[no-any-return]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: AttentionKernels, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
        q = q if q.stride(3) == 1 else q.contiguous()
        k = k if k.stride(3) == 1 else k.contiguous()
        v = v if v.stride(3) == 1 else v.contiguous()
        s, b, n, _ = q.shape
        out, lse = empty(q.shape, q), q.new_empty(b, n, s, dtype=torch.float32)
        kernels.attention_forward(*bounds, q, k, v, out, lse)
        ctx.kernels, ctx.bounds = kernels, bounds
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = grads[0] if grads[0].stride(3) == 1 else grads[0].contiguous()
        results = [empty(x.shape, x) for x in (q, k, v)]
        ctx.kernels.attention_backward(*ctx.bounds, q, k, v, out, lse, grad, *results)
        return None, *results, None


_attention = direct(_Attention)
