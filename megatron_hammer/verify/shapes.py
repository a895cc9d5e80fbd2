"""Kernels that compute nothing, so that a step can be run on torch's meta device, where tensors have no memory.

What a rank of a large layout keeps and sends is then counted in seconds, without its machine. Everything around these
kernels is the program itself: the layers, what autograd keeps of our fused operations (``kernels/native/autograd.py``),
the head, the store and the optimizer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_hammer.kernels.adamw import OptimizerKernels
from megatron_hammer.kernels.argument_types import Columns
from megatron_hammer.kernels.linear_cross_entropy import LossKernels
from megatron_hammer.kernels.native import autograd as fused
from megatron_hammer.kernels.operations import Operations
from megatron_hammer.train.build import StepKernels


def _nothing(*arguments: Any) -> None:
    """What a kernel would write keeps its shape."""


class NoLayerKernels:
    """``LayerKernels`` and ``AttentionKernels`` of ``kernels/native/autograd.py``."""

    add_rms_norm_forward = add_rms_norm_backward = staticmethod(_nothing)
    rope_forward = rope_backward = staticmethod(_nothing)
    swiglu_forward = swiglu_backward = staticmethod(_nothing)
    attention_forward = attention_backward = staticmethod(_nothing)


def _row_statistics(logits: Tensor, labels: Tensor, columns: Columns) -> Tensor:
    return torch.empty((3, len(labels)), device=logits.device)


def _loss_and_gradient_(
    logits: Tensor, labels: Tensor, columns: Columns, weights: Tensor, z_loss: float = 0.0
) -> Tensor:
    return torch.empty(len(labels), device=logits.device)


def shape_kernels(chunk_tokens: int) -> StepKernels:
    """Our fused operations and update, without what they compute.

    Args:
        chunk_tokens: as ``kernels.loss_chunk_tokens``.
    """
    kernels = NoLayerKernels()
    operations = Operations(
        partial(fused.add_rms_norm, kernels),
        partial(fused.rope, kernels),
        partial(fused.swiglu, kernels),
        partial(fused.attention, kernels=kernels),
        LossKernels("none", chunk_tokens, _row_statistics, _nothing, _loss_and_gradient_),
    )
    return StepKernels(operations, OptimizerKernels("none", _nothing, _nothing))
