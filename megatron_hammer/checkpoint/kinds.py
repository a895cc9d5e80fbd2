"""Which logical tensors have which kinds of state: fp32 master, first moment, second moment.

Every tensor has all three, except that a matrix which Muon updates has no second moment (``optimizer.style``).
Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_hammer.config import ModelConfig
from megatron_hammer.model.parameters import hidden_matrices, logical_shapes

SECOND_MOMENT = "exp_avg_sq"
STATE_KINDS = ("weight", "exp_avg", SECOND_MOMENT)
"""What a run goes on from; a new one takes weights only."""


def style_of(config_tree: Mapping[str, Any]) -> str:
    """``optimizer.style`` of a checkpoint's config; those of before there was one are AdamW's."""
    return str(config_tree.get("optimizer", {}).get("style", "adamw"))


def shapes_of(model: ModelConfig, kind: str, style: str) -> dict[str, tuple[int, ...]]:
    """Name -> true global shape of the tensors that have this kind, in the order of the model."""
    without = hidden_matrices(model) if style == "muon" and kind == SECOND_MOMENT else frozenset()
    return {name: shape for name, shape in logical_shapes(model).items() if name not in without}
