"""The parallel layers on NVIDIA's Transformer Engine: the names and constructor arguments of ``layers.py``.

``kernels.layers=te`` builds the model of these. What they add to the torch ones: the weight's gradient is accumulated
in fp32 inside the matrix product, straight in the optimizer's buffer; the RMSNorm is one kernel; and fp8
(``kernels.fp8``) runs the four matrix products of a layer on the tensor cores' fp8 units. RoPE, SwiGLU, embedding, head
and loss are ours, and so is the choice of an attention backend, of which Transformer Engine's is one
(``kernels.attention=te``).

A module of the library is kept in a tuple, so that ``nn.Module`` does not register it: only its weight is registered,
under the name that the parameter table gives. So a checkpoint of these layers is one of the torch layers and the other
way round, and the library's own extra state (pickled scales) is never saved. Linear and RMSNorm stay apart. To fuse
them, as LayerNormLinear does, would save one cast a norm under fp8; but names would differ from the torch layers', and
in 16 bits a norm could not be recomputed (``train.recompute=selective``). The norm is one of the ``operations``.

Every name and argument used here is listed in ``kernels/libraries/te.py``. **Nothing of this has run on a real
Transformer Engine yet.** On a CPU these layers train, in fp8 too, on the library's own Python code over a stub of its
C++ extension (``tests/model/te_sources.py``); its kernels are not in that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hammer.kernels.libraries.te import add_rms_norm, fp8_region
from megatron_hammer.kernels.norm import with_gradient
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.kernels.ranges import LINEAR
from megatron_hammer.model.layers import (
    Bias,
    LayerOptions,
    RMSNorm,
    VocabParallelEmbedding,
    column_parallel,
    ready_after,
)

__all__ = [
    "ColumnParallelLinear",
    "LayerOptions",
    "QKVLinear",
    "RMSNorm",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "column_parallel",
    "forward_region",
    "operations",
]


class _Linear(Bias):
    """x W^T with ``parallel_mode`` "column" or "row"; the library is given the sizes of all ranks together.

    A bias is added here, not by the library, so that its gradient goes where all of them go.
    """

    def __init__(
        self, in_features: int, out_features: int, parallel_mode: str, options: LayerOptions, bias: bool
    ) -> None:
        import transformer_engine.pytorch as te

        super().__init__()
        tp = options.tp
        assert tp.size == 1 or tp.handle is not None, "Transformer Engine needs the tensor-parallel group by handle"
        linear = te.Linear(
            in_features,
            out_features,
            sequence_parallel=options.sequence_parallel,
            fuse_wgrad_accumulation=options.store is not None,
            tp_group=tp.handle if tp.size > 1 else None,
            tp_size=tp.size,
            init_method=nn.init.zeros_,
            bias=False,
            params_dtype=options.dtype,
            parallel_mode=parallel_mode if tp.size > 1 else None,  # None never communicates
            device=options.device,
        )
        self.hidden = (linear,)
        self.range_of = options.range_of
        self.weight, self.gradient = options.weight(*linear.weight.shape)
        linear.register_parameter("weight", self.weight)
        if self.gradient is not None:
            # The library's protocol: it writes the gradient to this attribute, and returns none to autograd from a
            # weight without an attribute ``grad_added_to_main_grad``.
            self.weight.main_grad = self.gradient.main_grad  # type: ignore[attr-defined]
        if bias:
            self.add_bias_of(out_features // tp.size if parallel_mode == "column" else out_features, options)

    def forward(self, x: Tensor) -> Tensor:
        # True has the fp8 copy of the weight made anew and its gradient overwritten, False the copy used again and the
        # gradient added to. None, outside of training: no copy is kept, for the weight may have changed since.
        first = None
        if self.gradient is not None and torch.is_grad_enabled():
            first, x = not bool(self.gradient.begun), ready_after(x, [self.gradient])
        with self.range_of(LINEAR):
            y: Tensor = self.hidden[0](x, is_first_microbatch=first)
        return y if self.bias is None else self.with_bias(y)


class ColumnParallelLinear(_Linear):
    """x W^T with the rows of W, the outputs, divided over the ranks: [s/t, b, in] -> [s, b, out/t]."""

    def __init__(self, in_features: int, out_local: int, options: LayerOptions, bias: bool = False) -> None:
        super().__init__(in_features, out_local * options.tp.size, "column", options, bias)


class RowParallelLinear(_Linear):
    """x W^T with the columns of W, the inputs, divided over the ranks: [s, b, in/t] -> [s/t, b, out], summed."""

    def __init__(self, in_local: int, out_features: int, options: LayerOptions, bias: bool = False) -> None:
        super().__init__(in_local * options.tp.size, out_features, "row", options, bias)


class QKVLinear(ColumnParallelLinear):
    """Queries, keys and values in one product: [s/t, b, h] -> [s, b, heads + 2 groups, d] of this rank, in this order.

    With more ranks than query groups, neighbouring ranks hold a copy of their group's key and value rows; to the
    library these are rows like others.
    """

    def __init__(
        self, hidden_size: int, heads_local: int, groups_local: int, head_size: int, options: LayerOptions,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, (heads_local + 2 * groups_local) * head_size, options, bias)
        self.head_size = head_size

    def forward(self, x: Tensor) -> Tensor:
        heads: Tensor = super().forward(x).unflatten(-1, (-1, self.head_size))
        return heads


def operations(chosen: Operations) -> Operations:
    """What these layers compute with: the library's RMSNorm, and the rest as chosen."""
    return replace(chosen, add_rms_norm=with_gradient(add_rms_norm))


def forward_region(options: LayerOptions) -> Callable[[], AbstractContextManager[Any]]:
    """What to run a forward of the layers in: fp8 where the config asks for it."""
    return nullcontext if options.fp8 == "off" else fp8_region(options.fp8, options.world)
