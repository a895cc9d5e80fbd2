"""The mix of five sources: which source gives each of many samples, and which of its samples that is.

Megatron-LM's rule is drawn whole on both sides and compared bit for bit. Our own rule is timed whole, as counts alone
(what a first look at a far sample costs), and as single looks at samples all over a run whose counts are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from typing import Any

from sides import OURS, Measured, compare

WEIGHTS = [142, 128, 38, 12, 30]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    return compare("data_blend.py", [str(args.samples)], args.rounds, not args.without_peer)


def _ours(samples: int) -> dict[str, Any]:
    import numpy as np

    from megatron_hammer.sampling import index_builder as index
    from megatron_hammer.sampling.blend import Blend
    from megatron_hammer.sampling.cache import IndexStore

    shares, nothing = Blend(WEIGHTS).weights, np.zeros(len(WEIGHTS), np.int64)
    with Measured() as drawing:
        *arrays, _ = index.greedy_blend(shares, nothing, samples)
    sha1 = [hashlib.sha1(array).hexdigest()[:8] for array in arrays]
    del arrays
    with Measured() as own:
        sources, *_ = index.chairman_blend(shares, nothing, samples)
    error = _prefix_error(sources)
    with Measured() as far:
        Blend(WEIGHTS)[samples - 1]
    with tempfile.TemporaryDirectory() as folder:
        Blend(WEIGHTS, store=IndexStore(folder, smallest=0), num_samples=samples)
        with Measured() as kept:
            blend = Blend(WEIGHTS, store=IndexStore(folder, smallest=0), num_samples=samples)
            blend[samples - 1]
        start = time.perf_counter()
        places = np.random.default_rng(0).integers(0, samples, 300).tolist()
        for place in places:
            blend[place]
        look = (time.perf_counter() - start) / len(places)
    return drawing.report(
        sha1=sha1,
        own_rule_seconds=own.seconds,
        own_rule_prefix_error=error,
        first_far_sample_seconds=far.seconds,
        first_far_sample_kept_seconds=kept.seconds,
        random_sample_seconds=look,
    )


def _prefix_error(sources: Any) -> float:
    """Largest |share * t - drawn| over all prefixes and sources."""
    import numpy as np

    shares = np.array(WEIGHTS) / sum(WEIGHTS)
    worst, drawn = 0.0, np.zeros(len(WEIGHTS))
    for first in range(0, len(sources), 1 << 20):
        block = sources[first : first + (1 << 20)]
        times = np.arange(first + 1, first + len(block) + 1)
        for k, share in enumerate(shares):
            counts = drawn[k] + np.cumsum(block == k)
            worst = max(worst, float(np.abs(share * times - counts).max()))
            drawn[k] = counts[-1]
    return worst


def _peer(samples: int) -> dict[str, Any]:
    import numpy as np
    from megatron.core.datasets import helpers

    weights = np.array(WEIGHTS, np.float64) / sum(WEIGHTS)
    with Measured() as drawing:
        sources, positions = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
        helpers.build_blending_indices(sources, positions, weights, len(weights), samples, False)
    return drawing.report(sha1=[hashlib.sha1(array).hexdigest()[:8] for array in (sources, positions)])


if __name__ == "__main__":
    print(json.dumps((_ours if sys.argv[1] == OURS else _peer)(int(sys.argv[2]))))
