"""How evenly attention is split over context-parallel ranks, on documents of long-tailed lengths: a simulation.

    python benchmarks/context_split.py [--micro-batches N]

For each length of samples, mix of documents and number of ranks: the pairs of a query and a key of the rank that has
most, as a multiple of the mean, for our split (``parallel/sequence_split.py``) and for each sample cut in zigzag
whatever documents are in it; the keys that the rank with most is given, as a share of the micro-batch's tokens; the
spans of the rank with most; the time of the split on one core. The seed is fixed; only the split is computed.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from megatron_hammer.base.tables import align
from megatron_hammer.parallel.sequence_split import imbalance, split

MIXES = {"short": (150, 1.0), "web": (400, 1.2), "code": (600, 1.5), "books": (1100, 2.0)}
"""Median and sigma of log-normal lengths, in tokens; chosen by eye."""
SAMPLES = ((1, 4096), (2, 8192), (1, 32_768), (1, 131_072))
RANKS = (2, 4, 8, 16)


def documents(generator: np.random.Generator, samples: int, length: int, mix: str) -> np.ndarray:
    """Cumulative lengths, cut at the ends of samples."""
    (median, sigma), ends = MIXES[mix], [0]
    for sample in range(1, samples + 1):
        while ends[-1] < sample * length:
            drawn = max(1, int(generator.lognormal(np.log(median), sigma)))
            ends.append(min(sample * length, ends[-1] + drawn))
    return np.array(ends)


def zigzag_by_sample(ends: np.ndarray, samples: int, shards: int) -> float:
    """Imbalance of the plain split."""
    seen = np.arange(ends[-1]) - np.repeat(ends[:-1], np.diff(ends)) + 1  # keys of each token
    chunks = seen.reshape(samples, 2 * shards, -1).sum((0, 2))
    pairs = chunks[:shards] + chunks[: shards - 1 : -1]
    return float(pairs.max() / pairs.mean())


def measure(samples: int, length: int, mix: str, shards: int, micro_batches: int) -> tuple[str, ...]:
    """One row of the table."""
    generator = np.random.default_rng(1234)
    ours, plain, keys, spans, seconds = [], [], [], [], 0.0
    for _ in range(micro_batches):
        ends = documents(generator, samples, length, mix)
        start = time.perf_counter()
        parts = split(ends, shards)
        seconds += time.perf_counter() - start
        ours.append(imbalance(parts))
        plain.append(zigzag_by_sample(ends, samples, shards))
        keys.append(max(sum(s.stop - s.document_start for s in part) for part in parts) / ends[-1])
        spans.append(max(map(len, parts)))
    return (
        f"{samples} x {length:,}", mix, str(shards), f"{np.mean(ours):.2f}", f"{max(ours):.2f}",
        f"{np.mean(plain):.2f}", f"{max(plain):.2f}", f"{np.mean(keys):.2f}", f"{np.mean(spans):.0f}",
        f"{seconds / micro_batches * 1e3:.1f}",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, default=100, metavar="N", help="of each row")
    arguments = parser.parse_args()
    head = ("samples", "mix", "CP", "ours, mean", "largest", "zigzag by sample, mean", "largest", "keys", "spans",
            "ms")  # fmt: skip
    rows = [
        measure(samples, length, mix, shards, arguments.micro_batches)
        for samples, length in SAMPLES
        for mix in MIXES
        for shards in RANKS
    ]
    print(*align([head, *rows]), sep="\n")


if __name__ == "__main__":
    main()
