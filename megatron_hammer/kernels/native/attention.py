"""Causal attention on a CPU, forward and backward, by the compiled kernels of ``csrc/cpu/attention.cpp``.

fp32 on AVX-512, bf16 on AMX; other dtypes and processors are torch's. Scores are never stored: of the forward pass the
result and one number a row and head stay. Keys and values are not repeated for the heads of a group, each document of a
micro-batch is its own piece of work in one call, and what the mask hides is not computed. One thread takes a (document,
sample, query group) at a time, so that no result depends on the number of threads; with more threads than such pieces
the rest of them wait.

Against torch 2.13's own attention on a Xeon with AMX, one thread, forward and backward: in bf16 4.9 times as fast at
s 256, d 32 (b 4, n 8, g 2), 5.2 at s 512, d 64 and 4.0 at s 2048, d 64 (b 1); in fp32 2.0, 2.0 and 1.4 times.

Legend: s sequence, b micro-batch, n query heads, g query groups, d head_dim (local ones).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_hammer.kernels.native import cpu
from megatron_hammer.kernels.native.memory import empty
from megatron_hammer.kernels.packed_sequences import PackedSequences


@cache
def obstacle(dtype: torch.dtype) -> str:
    """Why the kernels cannot compute in this dtype here, or an empty string. To be asked once before the first call.

    It also asks Linux for the use of AMX's tile registers, without which a process ends at the first such instruction.
    """
    if dtype not in cpu.DTYPES:
        return f"does not compute in {str(dtype).removeprefix('torch.')}"
    if missing := cpu.missing(torch.device("cpu")):
        return f"cannot run here ({missing})"
    reason = cpu.COMPILED.attention_obstacle(dtype == torch.bfloat16)
    return f"cannot run here ({reason})" if reason else ""


def attention(q: Tensor, k: Tensor, v: Tensor, documents: PackedSequences | None = None) -> Tensor:
    """Backend "fused": q [s, b, n, d], k and v [s, b, g, d] -> [s, b, n, d], within documents where there are any."""
    lengths = (len(q),) if documents is None else documents.lengths
    assert sum(lengths) == len(q), f"documents of {sum(lengths)} rows do not divide {len(q)}"
    out: Tensor = _Attention.apply(q, k, v, [0, *accumulate(lengths)])
    return out


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the result and per row and head the logarithm of the sum of exponentials."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Sequence[int]) -> Tensor:
        s, b, n, d = q.shape
        g = k.shape[2]
        assert k.shape == v.shape == (s, b, g, d) and n % g == 0, f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        assert not (why := obstacle(q.dtype)), f"fused attention {why}"
        q, k, v = (_rows_contiguous(x, q.dtype) for x in (q, k, v))
        out, lse = empty((s, b, n, d), q), q.new_empty(b, n, s, dtype=torch.float32)
        ctx.facts = (bounds, (b, n, g, d), d**-0.5, q.dtype == torch.bfloat16)
        ctx.save_for_backward(q, k, v, out, lse)
        tensors = [_address(x) for x in (q, k, v, out)]
        cpu.COMPILED.attention_forward(*ctx.facts, torch.get_num_threads(), lse.data_ptr(), tensors)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc, untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        grad = _rows_contiguous(grad, q.dtype)
        grad_q, grad_k, grad_v = (empty(x.shape, x) for x in (q, k, v))
        tensors = [_address(x) for x in (q, k, v, out, grad, grad_q, grad_k, grad_v)]
        cpu.COMPILED.attention_backward(*ctx.facts, torch.get_num_threads(), lse.data_ptr(), tensors)
        return grad_q, grad_k, grad_v, None


def _rows_contiguous(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [s, b, heads, d] in the only layout that the kernels ask for: each head's row of d in one piece."""
    assert x.is_cpu and x.dtype == dtype, f"expected {dtype} on a CPU, found {x.dtype} on {x.device}"
    return x if x.stride(3) == 1 else x.contiguous()


def _address(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)
