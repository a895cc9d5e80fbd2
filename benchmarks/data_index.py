"""The three arrays of Megatron-LM's order, and the marks of our own, for one epoch of many documents.

The dataset is synthetic: one sequence a document, lognormal lengths (mean 800, sigma 1), a sparse .bin. The peer is
what megatron-core's ``GPTDataset`` does with an empty cache, which it fills (a twentieth of its time). Opening the
dataset is timed apart on our side, because it reads and checks all of the index, which the peer does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from sides import OURS, Measured, compare

SEQ, SEED = 2048, 1234


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prefix", type=Path, required=True, help="dataset to index; made if it is not there")
    parser.add_argument("--documents", type=int, default=50_000_000, help="of a dataset that is made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if not Path(f"{args.prefix}.idx").exists():
        make_dataset(args.prefix, args.documents)
    return compare("data_index.py", [str(args.prefix)], args.rounds, not args.without_peer)


def make_dataset(prefix: Path, documents: int) -> None:
    """A dataset of documents of log-normal length and no content: a sparse file of zeros, four bytes a token."""
    import numpy as np

    rng = np.random.default_rng(SEED)
    lengths = np.empty(documents, np.int32)
    for i in range(0, documents, 1 << 22):
        k = min(1 << 22, documents - i)
        lengths[i : i + k] = np.clip(rng.lognormal(np.log(800) - 0.5, 1.0, k), 2, 200_000).astype(np.int32)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, documents, documents + 1))
        lengths.tofile(file)
        ends = np.cumsum(lengths, dtype=np.int64) * 4
        np.append(0, ends[:-1]).tofile(file)
        np.arange(documents + 1, dtype=np.int64).tofile(file)
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(int(ends[-1]))


def _ours(prefix: str) -> dict[str, Any]:
    from megatron_hammer.dataset.reader import IndexedDataset
    from megatron_hammer.sampling import index_builder as index
    from megatron_hammer.sampling.order import build_megatron_index

    with Measured() as opening:
        dataset = IndexedDataset(prefix)
    with Measured() as marks:
        index.epoch_marks(dataset.lengths, 1, 64)
    dataset.forget()
    with Measured() as building:
        everything = range(dataset.num_sequences)
        built = build_megatron_index(dataset.lengths, everything, SEQ, SEED, forget=dataset.forget)
    return building.report(
        sha1=[hashlib.sha1(array).hexdigest()[:8] for array in built],
        backend=index.BACKEND,
        open_seconds=opening.seconds,
        own_order_seconds=marks.seconds,
        own_order_peak_mb=marks.peak_mb,
    )


def _peer(prefix: str) -> dict[str, Any]:
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        """As much of one as the config asks for."""

        unique_identifiers, eod, pad, vocab_size = None, 0, 0, 105_789

    cache = tempfile.TemporaryDirectory(dir=Path(prefix).parent)  # without one it is kept beside the dataset
    config = GPTDatasetConfig(
        random_seed=SEED, sequence_length=SEQ, blend=([prefix], None), split="1,0,0", path_to_cache=cache.name,
        tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    dataset = IndexedDataset(prefix, multimodal=False, mmap=True)
    indices = np.arange(len(dataset), dtype=np.int32)
    with Measured() as building:
        built = GPTDataset(dataset, prefix, indices, None, Split.train, config)
    cache.cleanup()
    arrays = built.document_index, built.sample_index, built.shuffle_index
    return building.report(sha1=[hashlib.sha1(np.ascontiguousarray(array)).hexdigest()[:8] for array in arrays])


if __name__ == "__main__":
    print(json.dumps((_ours if sys.argv[1] == OURS else _peer)(sys.argv[2])))
