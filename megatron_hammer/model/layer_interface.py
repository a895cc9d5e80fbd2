"""The interface that the two modules of parallel layers share: plain torch's and Transformer Engine's.

A decoder layer is built of the classes of one module, ``layers.py`` (torch, any device) or ``layers_te.py``
(Transformer Engine). mypy holds both modules to ``LayerModule``, and ``tests/model/test_layer_interface.py`` does so at
run time. Sizes with ``_local`` are those of this rank's part of a weight, as its placement says.

Legend: s sequence, b micro-batch, h hidden, d size of a head, t tensor-parallel ranks (1 without sequence parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from megatron_hammer.kernels.operations import Operations
from megatron_hammer.model.layers import LayerOptions


class Norm(Protocol):
    """Adds what the last sublayer computed to the residual stream and normalises: see ``layers.RMSNorm``."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]: ...
    def __call__(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]: ...


class Linear(Protocol):
    """A matrix that is divided over the tensor-parallel ranks: [.., in] -> [.., out]."""

    def forward(self, x: Tensor) -> Tensor: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class HeadsLinear(Protocol):
    """The matrix of queries, keys and values: [s/t, b, h] -> [s, b, heads + 2 groups, d] of this rank."""

    def forward(self, x: Tensor) -> Tensor: ...
    def __call__(self, x: Tensor) -> Tensor: ...


class LayerModule(Protocol):
    """A module of parallel layers: each a ``torch.nn.Module`` with a parameter ``weight``, and ``bias`` where asked."""

    def RMSNorm(self, hidden_size: int, eps: float, options: LayerOptions, /) -> Norm:
        """Residual add and norm; the weight is on all ranks."""

    def ColumnParallelLinear(
        self, in_features: int, out_local: int, options: LayerOptions, bias: bool = False, /
    ) -> Linear:
        """The outputs are divided over the ranks: [s/t, b, in] -> [s, b, out_local]."""

    def RowParallelLinear(
        self, in_local: int, out_features: int, options: LayerOptions, bias: bool = False, /
    ) -> Linear:
        """The inputs are divided over the ranks: [s, b, in_local] -> [s/t, b, out], summed over them."""

    def QKVLinear(
        self, hidden_size: int, heads_local: int, groups_local: int, head_size: int, options: LayerOptions,
        bias: bool = False, /,
    ) -> HeadsLinear:  # fmt: skip
        """Queries, keys and values in one product."""

    def operations(self, chosen: Operations, /) -> Operations:
        """What the layers compute with, of what was chosen for this run."""

    def forward_region(self, options: LayerOptions, /) -> Callable[[], AbstractContextManager[None]]:
        """What to run a forward of all layers in."""
