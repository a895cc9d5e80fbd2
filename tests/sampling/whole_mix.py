"""A mix drawn as whole arrays by one call of the index builder: what ``Blend``, which draws blocks, is held against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_hammer.sampling import index_builder as index


def draw_whole(weights: Sequence[float], rule: str, num_samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The first ``num_samples``: their sources (int16) and their numbers within them (int64)."""
    shares = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64)
    blend = index.chairman_blend if rule == "chairman" else index.greedy_blend
    sources, positions, _ = blend(shares, np.zeros(len(shares), np.int64), num_samples)
    return sources, positions
