"""Documents of which a rank has the last rows only, for tests of attention with fewer queries than keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_hammer.kernels.packed_sequences import PackedKeys, PackedSequences


def spans(rows_and_keys: Sequence[tuple[int, int]]) -> PackedSequences:
    """Spans of so many rows with so many keys, on the CPU; every key once, in order."""
    rows, keys = zip(*rows_and_keys, strict=True)
    ends = [torch.from_numpy(np.cumsum([0, *of]).astype(np.int32)) for of in (rows, keys)]
    positions = torch.cat([torch.arange(k - r, k) for r, k in rows_and_keys])
    return PackedSequences(rows, ends[0], positions, PackedKeys(keys, ends[1], torch.arange(sum(keys)), 1))
