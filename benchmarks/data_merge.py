"""Joining two datasets of many small documents; the peer is megatron-core's ``add_index``.

Ours checks its inputs, syncs, hashes and publishes; the time of the sync is given apart, as in ``data_write.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from data_write import Syncs, file_sums, make_tokens, write_ours
from sides import OURS, Measured, compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, default=10_000_000, help="in each of the two datasets")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_ours(Path(folder) / "input", make_tokens(args.documents))
        return compare("data_merge.py", [folder], args.rounds, not args.without_peer)


def _ours(folder: Path) -> dict[str, Any]:
    from megatron_hammer.dataset.make.merge import merge_datasets

    with Measured() as merging, Syncs() as syncs:
        merge_datasets([folder / "input", folder / "input"], folder / "ours")
    return merging.report(sha1=file_sums(folder / "ours"), sync_seconds=syncs.seconds)


def _peer(folder: Path) -> dict[str, Any]:
    import numpy as np
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    with Measured() as merging:
        builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.int32)
        for _ in range(2):
            builder.add_index(str(folder / "input"))
        builder.finalize(str(folder / "theirs.idx"))
    return merging.report(sha1=file_sums(folder / "theirs"))


if __name__ == "__main__":
    print(json.dumps((_ours if sys.argv[1] == OURS else _peer)(Path(sys.argv[2]))))
