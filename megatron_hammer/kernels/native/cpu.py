"""Our fused operations on a CPU: the compiled kernels (``csrc/cpu``) behind functions that take tensors.

``library()`` holds the functions that ``autograd.py`` and the tables of backends compute with. Where the installation
did not build the module, ``unavailable`` says so and torch does the work. Tensors are fp32 or bf16, and contiguous
unless a function says otherwise, which the module checks (``csrc/cpu/tensor.hpp``); results are written into tensors
that the caller has made, large ones with ``empty``.

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
from megatron_hammer.kernels.argument_types import Columns

INTERFACE = 7  # raised with every change of the compiled functions: an old build must not be called with new arguments
DTYPES = frozenset({torch.float32, torch.bfloat16})

COMPILED: Any = find_compiled("megatron_hammer.kernels.native._cpu", INTERFACE)


def unavailable(device: torch.device) -> str:
    """Why the kernels cannot run in this process, or an empty string."""
    return "" if COMPILED else "megatron_hammer.kernels.native._cpu is missing or outdated: reinstall"


@cache
def attention_unsupported(dtype: torch.dtype) -> str:
    """Why attention cannot compute in this dtype here, or an empty string."""
    if dtype not in DTYPES:
        return f"does not compute in {str(dtype).removeprefix('torch.')}"
    reason = unavailable(torch.device("cpu"))
    return f"cannot run here ({reason})" if reason else ""


@cache
def attention_versions(dtype: torch.dtype) -> tuple[Any, ...]:
    """The attention kernels that this machine can run in this dtype, those of its best instructions first.

    Only where ``attention_unsupported`` says nothing. Looking for them asks Linux for the use of AMX's tile registers,
    without which a process ends at the first such instruction.
    """
    return tuple(COMPILED.attention_versions(dtype == torch.bfloat16))


def attention_is_fast(dtype: torch.dtype) -> bool:
    """Whether this machine has one that was measured to be faster than torch's.

    On an EPYC with AVX-512 those for AVX2 and more are, 1.1 to 4.2 times; the portable one takes 1.3 to 2.3 times as
    long there, and nobody has measured it on other machines, such as those with NEON.
    """
    return not attention_unsupported(dtype) and bool(attention_versions(dtype)[0].name != "portable")


class CpuKernels:
    """The functions of one instruction set; what each computes is in ``csrc/cpu/kernels.hpp``."""

    def __init__(self, version: Any) -> None:
        self._version = version
        self.name: str = version.name
        # Those of ``LayerKernels`` in autograd.py are the compiled ones.
        self.add_rms_norm_forward = version.add_rms_norm_forward
        self.add_rms_norm_backward = version.add_rms_norm_backward
        self.rope_forward, self.rope_backward = version.rope_forward, version.rope_backward
        self.swiglu_forward, self.swiglu_backward = version.swiglu_forward, version.swiglu_backward
        self.accumulate = version.accumulate

    # ---- loss: the functions of linear_cross_entropy.py ------------------------------------------------------------

    def row_statistics(self, logits: Tensor, labels: Tensor, columns: Columns) -> Tensor:
        """Largest logit, sum of exp(z - largest), logit of the label or 0: [3, n] fp32."""
        statistics = torch.empty((3, len(labels)), dtype=torch.float32)
        self._version.row_statistics(logits, labels, columns.start, columns.valid, statistics)
        return statistics

    def softmax_gradient_(
        self, logits: Tensor, labels: Tensor, columns: Columns, lse: Tensor, loss: Tensor, weights: Tensor,
        z_loss: float = 0.0,
    ) -> None:  # fmt: skip
        """Turn logits into the gradient of sum(weights * (loss + z_loss * lse^2)), in place."""
        numbers = (x.float().contiguous() for x in (lse, loss, weights))
        self._version.softmax_gradient(logits, labels, columns.start, columns.valid, *numbers, z_loss)

    def loss_and_gradient_(
        self, logits: Tensor, labels: Tensor, columns: Columns, weights: Tensor, z_loss: float = 0.0
    ) -> Tensor:
        """Both on a rank that holds the whole vocabulary: loss [n] fp32. A label beyond it is an IndexError."""
        loss = torch.empty(len(labels), dtype=torch.float32)
        weights = weights.float().contiguous()
        self._version.loss_and_gradient(logits, labels, columns.start, columns.valid, weights, z_loss, loss)
        return loss

    # ---- optimizer --------------------------------------------------------------------------------------------------

    def adamw(
        self, master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, param: Tensor | None, lr: float,
        beta1: float, beta2: float, eps: float, decay: float, divisor: Tensor, skip: Tensor, updates: Tensor,
    ) -> None:  # fmt: skip
        """Update flat fp32 tensors, and ``param`` from the new weights; ``updates`` is the count before this one."""
        if skip.item() != 0:
            return
        numbers = (lr, beta1, beta2, eps, decay, divisor.item(), updates.item())
        self._version.adamw(master, grad, exp_avg, exp_avg_sq, param, *numbers)

    def add_square_sum(self, part: Tensor, out: Tensor) -> None:
        """out, an fp32 scalar, += sum(part^2)."""
        out.add_(self._version.square_sum(part))


@cache
def library() -> CpuKernels:
    """The kernels for the machine's widest instructions; only where ``unavailable`` says nothing."""
    return CpuKernels(COMPILED.versions()[0])


# ---- memory of large results ---------------------------------------------------------------------------------------

LARGE_BYTES = 2**18  # smaller ones leave small holes, and 5 us a call would be felt


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A new contiguous tensor of any contents, with the dtype and device of ``like``; not a view, without gradient.

    A large one on a CPU lies in huge pages, where the same result of the next micro-batch finds room again
    (``csrc/cpu/arena.hpp`` says what malloc's blocks cost); any other is torch's own.
    """
    dtype = like.dtype
    size = prod(shape) * dtype.itemsize
    if not like.is_cpu or size < LARGE_BYTES or COMPILED is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    # Beside products, which leave nothing of this code in the cache, each call of torch takes some 5 us.
    return torch.frombuffer(COMPILED.Memory(size), dtype=dtype).resize_(shape)
