"""The loops that run over every document or sample: compiled, or in NumPy where the installation compiled nothing.

A name here is the function that this process uses, of the compiled module (``csrc/data``) or of its twin
``index_builder_numpy.py``, where each is documented; results are identical. It is chosen once, at import, and
``BACKEND`` says which. Needs no torch.

One epoch of our own order, 50 million documents, a core of an Intel Xeon: 1.1 s compiled (``benchmarks/results/``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from megatron_hammer.base.compiled import find_compiled
from megatron_hammer.sampling import index_builder_numpy as numpy_twin
from megatron_hammer.sampling.index_builder_numpy import Drawn, Located

__all__ = [
    "BACKEND",
    "Located",
    "Shuffler",
    "blend_counts",
    "chairman_blend",
    "copy_windows",
    "epoch_marks",
    "find_pieces",
    "greedy_blend",
    "locate_windows",
    "megatron_windows",
    "permute",
    "random_state",
    "sample_index",
]

INTERFACE = 2  # raised with every change of the compiled functions: an old build must not be called with new arguments

_compiled: Any = find_compiled("megatron_hammer.sampling._index", INTERFACE)
_chosen: Any = numpy_twin if _compiled is None else _compiled

BACKEND = "C++" if _compiled is not None else "NumPy (the compiled index builder is missing or outdated: reinstall)"

Array = np.ndarray

permute: Callable[[int, int, int, int], Array] = _chosen.permute
"""(n, key, start, count): values of a pseudo-random permutation of [0, n)."""
epoch_marks: Callable[[Array, int, int], Array] = _chosen.epoch_marks
"""(lengths, key, stride): tokens before every stride-th document of an epoch."""
find_pieces: Callable[[Array, Array, int, int, int, int], Array] = _chosen.find_pieces
"""(lengths, marks, stride, key, offset, count): the spans of documents that some tokens of an epoch are."""
locate_windows: Callable[[Array, Array, int, int, Array, int], Located] = _chosen.locate_windows
"""(lengths, marks, stride, key, offsets, count): the same for several windows of one epoch."""
megatron_windows: Callable[[Array, Array, Array, Array, int], Located] = _chosen.megatron_windows
"""(lengths, documents, samples, windows, extra): the same in Megatron-LM's order."""
copy_windows: Callable[[Array, Array, Array | None, Array, Array, Array, Array], None] = _chosen.copy_windows
"""(tokens, pointers, boundaries, pieces, counts, rows, out): the tokens of located windows."""


class Shuffler(Protocol):
    """What ``random_state`` returns."""

    def shuffle(self, values: np.ndarray) -> None:
        """Shuffle a one-dimensional integer array in place."""


def random_state(seed: int) -> Shuffler:
    """MT19937 whose ``shuffle`` permutes as ``numpy.random.RandomState(seed).shuffle`` does; seed in [0, 2^32)."""
    if _compiled is None:
        return numpy_twin.random_state(seed)
    compiled: Shuffler = _compiled.MersenneTwister(seed)
    return compiled


def sample_index(
    lengths: np.ndarray,
    documents: np.ndarray,
    seq_length: int,
    total_tokens: int,
    extra: int = 1,
    drop_last: bool = True,
) -> np.ndarray:
    """Megatron-LM's sample index, in 64 bits where positions or offsets need them."""
    if _compiled is None:
        return numpy_twin.sample_index(lengths, documents, seq_length, total_tokens, extra, drop_last)
    is_wide = numpy_twin.needs_64_bits(lengths, documents)
    build = _compiled.sample_index_int64 if is_wide else _compiled.sample_index_int32
    rows: np.ndarray = build(lengths, documents, seq_length, total_tokens, extra, drop_last)
    return rows


def chairman_blend(weights: np.ndarray, drawn: np.ndarray, count: int) -> Drawn:
    """The next ``count`` samples of a mix, by Tijdeman's chairman assignment."""
    if _compiled is None:
        return numpy_twin.chairman_blend(weights, drawn, count)
    found: Drawn = _compiled.chairman_blend(weights.tolist(), drawn.tolist(), count)
    return found


def greedy_blend(weights: np.ndarray, drawn: np.ndarray, count: int, limits: np.ndarray | None = None) -> Drawn:
    """The next ``count`` samples of a mix, by Megatron-LM's rule."""
    if _compiled is None:
        return numpy_twin.greedy_blend(weights, drawn, count, limits)
    most = [] if limits is None else limits.tolist()
    found: Drawn = _compiled.greedy_blend(weights.tolist(), drawn.tolist(), count, most)
    return found


def blend_counts(chairman: bool, weights: np.ndarray, drawn: np.ndarray, count: int) -> np.ndarray:
    """The counts after the next ``count`` samples of either rule, int64: what the blends return last."""
    if _compiled is None:
        return numpy_twin.blend_counts(chairman, weights, drawn, count)
    counts: np.ndarray = _compiled.blend_counts(chairman, weights.tolist(), drawn.tolist(), count)
    return counts
