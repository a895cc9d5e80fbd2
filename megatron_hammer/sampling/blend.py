"""Which source gives sample i of a mix, and which of that source's samples it is.

Two rules, both greedy and online, so the mix of a longer run begins with the mix of a shorter one:

    "chairman"   Tijdeman's chairman assignment: at every prefix each source is off by less than one sample
    "greedy"     Megatron-LM's, for runs that move here from there: off by up to 1.5 samples (measured on five sources)

No array of the run's length is kept: samples are drawn in blocks when asked for, and the counts at the start of each
block are remembered, so going back is cheap. The first look at sample i counts through all blocks before it: 6 ns a
sample in C++ (five sources, a Sapphire Rapids core), so a second for a run of 170 million samples; the counts of a long
run can be kept (``cache.py``).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.cache import IndexStore, Key

BlendRule = Literal["chairman", "greedy"]

_BLOCK = 1 << 16  # samples drawn at once: half a millisecond of work, 640 KiB kept while in use
_BLOCKS_KEPT = 4


class Blend:
    """An endless mix of sources.

    Args:
        weights: share of each source, above zero; any positive sum.
        rule: see the module.
        store: where the counts of a long run's blocks are kept; None: in memory only.
        num_samples: length of the run, so that they can be made at once; the samples do not depend on it.
    """

    def __init__(
        self,
        weights: Sequence[float] | np.ndarray,
        rule: BlendRule = "chairman",
        store: IndexStore | None = None,
        num_samples: int | None = None,
    ) -> None:
        values = np.asarray(weights, np.float64)
        assert len(values) > 0 and np.isfinite(values).all() and (values > 0).all(), (
            f"weights {weights} must be positive"
        )
        self.weights: np.ndarray = values / values.sum()
        """Shares that sum to one, float64."""
        self._chairman = rule == "chairman"
        self._draw = index.chairman_blend if self._chairman else index.greedy_blend
        self._counts = [np.zeros(len(values), np.int64)]  # samples of each source before block k
        if store is not None and num_samples is not None and len(values) > 1:
            blocks = num_samples // _BLOCK
            exact = " ".join(map(float.hex, self.weights.tolist()))
            key: Key = {"rule": rule, "weights": exact, "block": _BLOCK, "blocks": blocks}
            work = num_samples // 8  # in documents: a sample of a mix takes an eighth of the time
            kept = store.get("blend", key, work, lambda: self._count_blocks(blocks))
            self._counts = list(kept["counts"])
        self._lock = threading.RLock()  # a thread may read ahead while another names samples
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getitem__(self, i: int) -> tuple[int, int]:
        """Source of sample ``i``, and its number among the samples of that source."""
        if len(self.weights) == 1:
            return 0, i
        sources, positions = self._block(i // _BLOCK)
        return int(sources[i % _BLOCK]), int(positions[i % _BLOCK])

    def range(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples [first, first + count): their sources (int16), and their numbers within them (int64)."""
        if len(self.weights) == 1:
            return np.zeros(count, np.int16), np.arange(first, first + count)
        parts = []
        while True:
            block, start = divmod(first, _BLOCK)
            sources, positions = self._block(block)
            taken = slice(start, min(start + count, _BLOCK))
            parts.append((sources[taken], positions[taken]))
            first, count = first + _BLOCK - start, count - (_BLOCK - start)
            if count <= 0:
                break
        return (
            parts[0]
            if len(parts) == 1
            else (np.concatenate([s for s, _ in parts]), np.concatenate([p for _, p in parts]))
        )

    def counts(self, i: int) -> np.ndarray:
        """How many of samples [0, i) each source gives: int64."""
        if len(self.weights) == 1:
            return np.array([i])
        with self._lock:
            self._count_blocks(i // _BLOCK)
        return index.blend_counts(self._chairman, self.weights, self._counts[i // _BLOCK], i % _BLOCK)

    def _count_blocks(self, block: int) -> dict[str, np.ndarray]:
        """Count through all blocks before ``block``."""
        while len(self._counts) <= block:
            self._counts.append(index.blend_counts(self._chairman, self.weights, self._counts[-1], _BLOCK))
        return {"counts": np.stack(self._counts)}

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        with self._lock:
            return self._find_block(block)

    def _find_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        if len(self._counts) <= block:
            self._count_blocks(block)
        sources, positions, after = self._draw(self.weights, self._counts[block], _BLOCK)
        if len(self._counts) == block + 1:
            self._counts.append(after)
        self._blocks[block] = (sources, positions)
        if len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return sources, positions
