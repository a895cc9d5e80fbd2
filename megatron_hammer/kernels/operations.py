"""The set of operations that a model is built with.

The model receives an ``Operations`` and never asks which implementation it holds. The plain torch functions that are in
it by default are the reference for every faster backend; ``selection.py`` makes one of the backends that a config asks
for.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_hammer.kernels import attention, norm, rope, swiglu
from megatron_hammer.kernels.attention import AttentionFunction
from megatron_hammer.kernels.context_parallel import across_ranks
from megatron_hammer.kernels.linear import Products
from megatron_hammer.kernels.linear_cross_entropy import LossKernels
from megatron_hammer.kernels.norm import AddRMSNormFunction
from megatron_hammer.kernels.ranges import ATTENTION, NORM, ROPE, SWIGLU, RangeOf, within
from megatron_hammer.kernels.rope import RopeFunction
from megatron_hammer.kernels.swiglu import SwiGLUFunction
from megatron_hammer.parallel.context import Group


@dataclass(frozen=True)
class Operations:
    """The functions that a model computes with; each has the signature of its reference."""

    add_rms_norm: AddRMSNormFunction = field(default_factory=lambda: norm.with_gradient(norm.add_rms_norm))
    rope: RopeFunction = rope.rope
    swiglu: SwiGLUFunction = swiglu.swiglu
    attention: AttentionFunction = attention.whole_samples
    loss: LossKernels = field(default_factory=LossKernels)
    products: Products = field(default_factory=Products)
    """Matrix products of the decoder layers."""
    head_products: Products = field(default_factory=Products)
    """Matrix products of the output head."""

    def across(self, context_parallel: Group) -> Operations:
        """The same operations for ranks that share samples: attention gathers their keys and values."""
        return replace(self, attention=across_ranks(self.attention, context_parallel))

    def within(self, range_of: RangeOf) -> Operations:
        """The same operations, each in its range; the products are in the ranges of their layers."""
        return replace(
            self,
            add_rms_norm=within(range_of, NORM, self.add_rms_norm),
            rope=within(range_of, ROPE, self.rope),
            swiglu=within(range_of, SWIGLU, self.swiglu),
            attention=within(range_of, ATTENTION, self.attention),
        )
