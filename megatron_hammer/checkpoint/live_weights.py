"""The whole logical weights of a model that is being trained, as a checkpoint of this moment would hold them.

Generation from a live run uses them, without a checkpoint on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_hammer.checkpoint.write import owned_views
from megatron_hammer.config import ModelConfig
from megatron_hammer.model.parameters import logical_shapes
from megatron_hammer.parallel.sharding import Shard


def live_weights(shards: Sequence[Shard], model: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name -> tensor of its logical shape, in ``dtype``, on the CPU: copies of the fp32 masters, rounded once.

    Args:
        shards: of all ranks of one replica; those of one process are all of it.
    """
    shapes, weights = logical_shapes(model), dict[str, Tensor]()
    for piece, view in zip(*owned_views(shards), strict=True):
        if piece.kind == "weight":
            if piece.name not in weights:
                weights[piece.name] = torch.empty(shapes[piece.name], dtype=dtype)
            rows = weights[piece.name][slice(*piece.rows)]
            (rows if piece.cols is None else rows[:, slice(*piece.cols)]).copy_(view.detach().view(piece.shape))
    return weights
