"""Random samples of 2,048 tokens from a dataset in the page cache, on one core.

Ours: ``micro_batches`` (tokens and labels, int64) in batches, what copies their tokens, as int32 ("tokens only"), and
sample by sample. Both of our orders; the figures compared are those of the order "independent". The peer:
``GPTDataset[i]`` (tokens, labels, loss mask, positions; no attention mask), and its tokens only. ``seconds`` is per
sample. The dataset is that of ``data_index.py`` with real tokens in its .bin.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sides import OURS, compare

SEQ, SEED = 2048, 1234


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", type=Path, required=True, help="dataset to read; made if it is not there")
    parser.add_argument("--documents", type=int, default=1_000_000, help="of a dataset that is made (3.2 GB a million)")
    parser.add_argument("--batch", type=int, default=64, help="samples a call")
    parser.add_argument("--samples", type=int, default=40_000, help="read in one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if not Path(f"{args.prefix}.idx").exists():
        _make_dataset(args.prefix, args.documents)
    _read_file(Path(f"{args.prefix}.bin"))
    options = [str(args.prefix), str(args.batch), str(args.samples)]
    return compare("data_read.py", options, args.rounds, not args.without_peer)


def _make_dataset(prefix: Path, documents: int) -> None:
    import numpy as np
    from data_index import make_dataset

    make_dataset(prefix, documents)
    path = Path(f"{prefix}.bin")
    rng = np.random.default_rng(0)
    block = rng.integers(0, 105_789, 1 << 22).astype(np.int32)
    with open(path, "r+b") as file:
        left = path.stat().st_size
        while left:
            left -= file.write(block.data.cast("B")[: min(left, block.nbytes)])


def _read_file(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(64 << 20):
            pass


def _rate(samples: int, step: int, work: Callable[[int], object]) -> dict[str, float]:
    """Samples a second, wall and CPU time, of ``work(first)`` for every ``step``-th sample number."""
    for first in range(0, samples // 10, step):  # page tables and caches
        work(first)
    wall, cpu = time.perf_counter(), time.process_time()
    for first in range(0, samples, step):
        work(first)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"a_second": samples / wall, "a_cpu_second": samples / cpu}


def _flat(rates: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}_{unit}": value for name, rate in rates.items() for unit, value in rate.items()}


def _ours(prefix: str, batch: int, samples: int) -> dict[str, Any]:
    import numpy as np

    from megatron_hammer.sampling import index_builder as index
    from megatron_hammer.sampling.loader import micro_batches
    from megatron_hammer.sampling.samples import TrainData

    def copy_tokens(data: TrainData, out: np.ndarray, first: int) -> None:
        """What ``TrainData.read`` does of it: find the windows, and copy them."""
        for part in data.order.parts(first, len(out)):
            index.copy_windows(*data._memory[part.source], *part.order.locate_all(part.windows), part.rows, out)

    rates = {}
    for order in ("independent", "megatron"):
        data = TrainData({prefix: 1.0}, SEQ, SEED, order, 10 * samples)
        out = np.empty((batch, SEQ + 1), np.int32)
        rates[f"{order}_batches"] = _rate(
            samples, batch, lambda i, data=data: micro_batches(data, i, batch, batch, 0, 1)
        )
        rates[f"{order}_tokens_only"] = _rate(samples, batch, partial(copy_tokens, data, out))
        rates[f"{order}_one_by_one"] = _rate(samples // 10, 1, lambda i, data=data: data.tokens(i))
    return {"seconds": 1 / rates["independent_batches"]["a_second"], **_flat(rates)}


def _peer(prefix: str, batch: int, samples: int) -> dict[str, Any]:
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        """As much of one as the config asks for."""

        unique_identifiers, eod, pad, vocab_size = None, 0, 0, 105_789

    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=SEQ, blend=([prefix], None), split="1,0,0", path_to_cache=None,
        tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip
    dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    data = GPTDataset(dataset, prefix, np.arange(len(dataset), dtype=np.int32), samples, Split.train, config)
    rates = {
        "batches": _rate(samples, 1, lambda i: data[i]),
        "tokens_only": _rate(samples, 1, lambda i: data._query_document_sample_shuffle_indices(i)),
    }
    return {"seconds": 1 / rates["batches"]["a_second"], **_flat(rates)}


if __name__ == "__main__":
    print(json.dumps((_ours if sys.argv[1] == OURS else _peer)(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
