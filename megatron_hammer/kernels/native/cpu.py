"""Our fused operations on a CPU: the compiled kernels (``csrc/cpu``) behind functions that take tensors.

``library()`` holds the functions that ``autograd.py`` and the tables of backends compute with. Where the installation
did not build the module, ``unavailable`` says so and torch does the work. Tensors are checked here, since the module
itself sees addresses: fp32 and bf16, contiguous unless a function says otherwise; results are written into tensors that
the caller has made, large ones with ``empty``.

Every kernel is compiled for several instruction sets, and the machine's widest is taken. Work is divided over as many
threads as torch has, on torch's own OpenMP runtime, and no result depends on their number. ``torch.compile`` is no
faster and takes 10 s and 150 MB at start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch  # before the module below: its OpenMP runtime must be the one that is loaded
from torch import Tensor

from megatron_hammer.base.compiled import find_compiled
from megatron_hammer.kernels.arguments import Columns

INTERFACE = 3  # raised with every change of the compiled functions: an old build must not be called with new arguments
DTYPES = frozenset({torch.float32, torch.bfloat16})

COMPILED: Any = find_compiled("megatron_hammer.kernels.native._cpu", INTERFACE)


def unavailable(device: torch.device) -> str:
    """Why the kernels cannot run in this process, or an empty string."""
    return "" if COMPILED else "megatron_hammer.kernels.native._cpu is missing or outdated: reinstall"


@cache
def attention_unsupported(dtype: torch.dtype) -> str:
    """Why attention cannot compute in this dtype here, or an empty string. To be asked once before the first call.

    It also asks Linux for the use of AMX's tile registers, without which a process ends at the first such instruction.
    """
    if dtype not in DTYPES:
        return f"does not compute in {str(dtype).removeprefix('torch.')}"
    if reason := unavailable(torch.device("cpu")):
        return f"cannot run here ({reason})"
    reason = COMPILED.attention_obstacle(dtype == torch.bfloat16)
    return f"cannot run here ({reason})" if reason else ""


class CpuKernels:
    """The functions of one instruction set; what each computes is in ``csrc/cpu/kernels.hpp``."""

    def __init__(self, version: Any) -> None:
        self._version = version
        self.name: str = version.name

    # ---- layers -------------------------------------------------------------------------------------------------

    def add_rms_norm_forward(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, normed: Tensor, summed: Tensor | None,
        rstd: Tensor,
    ) -> None:  # fmt: skip
        """x, branch, normed, summed: [r, h]; weight: [h]; rstd: [r] fp32. Without a branch no summed."""
        rows, h = x.shape
        assert (branch is None) == (summed is None), "the sum is written where there is a branch"
        half = _check(x.dtype, (x, branch, normed, summed), (rows, h))
        _check(x.dtype, (weight,), (h,))
        _check(torch.float32, (rstd,), (rows,))
        self._version.add_rms_norm_forward(
            torch.get_num_threads(), half, rows, h, _at(x), _at(branch), _at(weight), eps, _at(normed), _at(summed),
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

    # ---- attention: csrc/cpu/attention.cpp -----------------------------------------------------------------------
    #
    # fp32 on AVX-512, bf16 on AMX. Scores are never stored. Keys and values are not repeated for the heads of a group,
    # each document of a micro-batch is its own piece of work in one call, and what the mask hides is not computed. One
    # thread takes a (document, sample, query group) at a time, so that no result depends on the number of threads; with
    # more threads than such pieces the rest of them wait. Against torch 2.13's own attention on a Xeon with AMX, one
    # thread, forward and backward: in bf16 4.9 times as fast at s 256, d 32 (b 4, n 8, g 2), 5.2 at s 512, d 64 and 4.0
    # at s 2048, d 64 (b 1); in fp32 2.0, 2.0 and 1.4 times.

    def attention_forward(
        self, bounds: Sequence[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """q, out [s, b, n, d], k, v [s, b, g, d], each with a contiguous last dimension; lse [b, n, s] fp32.

        Args:
            bounds: document i is the rows [bounds[i], bounds[i + 1]).
        """
        facts = _attention_facts(bounds, q, k, (q, out), (k, v))
        COMPILED.attention_forward(*facts, torch.get_num_threads(), _at(lse), [_strided(x) for x in (q, k, v, out)])

    def attention_backward(
        self, bounds: Sequence[int], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor,
        grad_q: Tensor, grad_k: Tensor, grad_v: Tensor,
    ) -> None:  # fmt: skip
        """The gradients of q, k and v from that of the result, ``grad``, and what forward has left."""
        facts = _attention_facts(bounds, q, k, (q, out, grad, grad_q), (k, v, grad_k, grad_v))
        tensors = [_strided(x) for x in (q, k, v, out, grad, grad_q, grad_k, grad_v)]
        COMPILED.attention_backward(*facts, torch.get_num_threads(), _at(lse), tensors)

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


def _attention_facts(
    bounds: Sequence[int], q: Tensor, k: Tensor, as_q: Sequence[Tensor], as_k: Sequence[Tensor]
) -> tuple[Sequence[int], tuple[int, int, int, int], float, bool]:
    """What describes a call besides its tensors, of which some are laid out as queries and some as keys."""
    (s, b, n, d), g = q.shape, k.shape[2]
    assert not (why := attention_unsupported(q.dtype)), f"fused attention {why}"
    for x, heads in (*((x, n) for x in as_q), *((x, g) for x in as_k)):
        assert x.is_cpu and x.dtype == q.dtype and x.shape == (s, b, heads, d) and x.stride(3) == 1, (
            f"expected {q.dtype} {(s, b, heads, d)} on a CPU, found {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    assert n % g == 0, f"{n} heads do not divide into {g} groups"
    return bounds, (b, n, g, d), d**-0.5, q.dtype == torch.bfloat16


def _strided(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)


def _at(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


@cache
def library() -> CpuKernels:
    """The kernels for the machine's widest instructions; only where ``unavailable`` says nothing."""
    return CpuKernels(COMPILED.versions()[0])


# ---- memory of large results -------------------------------------------------------------------------------------
#
# torch asks glibc for blocks that begin at a multiple of 64 bytes. To be sure of one, glibc looks for a hole that is
# larger by the alignment, so the hole that a tensor leaves is always a little too small for the next tensor of its
# size, and the heap grows: by 140 MB beside the 250 that a micro-batch keeps, at h 512, f 1408, 8 layers and 2,048
# tokens in bf16 (glibc 2.36). A request without an alignment takes a hole of exactly its size; here the beginning is
# moved to such a multiple inside of it.
#
# With the first such tensor the process stops to hand freed memory back to the system (``Memory`` in csrc/cpu): the
# next micro-batch would pay for every page of it, 14 % of a step at that size in fp32.

ALIGNMENT = 64  # bytes: torch's own, a cache line and the widest vector
LARGE_BYTES = 2**18  # smaller ones leave small holes, and 5 us a call would be felt


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A new contiguous tensor of any contents, with the dtype and device of ``like``; not a view, without gradient.

    A large one on a CPU lies where the same result of the next micro-batch finds room again; any other is torch's own.
    """
    size = prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < LARGE_BYTES or COMPILED is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    memory = torch.frombuffer(COMPILED.Memory(size + ALIGNMENT), dtype=torch.uint8)
    offset = -memory.data_ptr() % ALIGNMENT // like.element_size()  # malloc's blocks begin at a multiple of 16
    new = torch.empty(0, dtype=like.dtype)
    return new.set_(memory.untyped_storage(), offset, tuple(shape))  # type: ignore[call-overload, no-any-return]
