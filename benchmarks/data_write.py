"""Writing a dataset of many small documents: ours in batches of flat tokens and lengths, the peer's one by one.

Ours syncs its files, hashes them and publishes them whole; the peer does none of this. So the time of our sync is given
apart: it depends on the disk, and on who else uses it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sides import OURS, Measured, compare

LENGTH, BATCH = 8, 1 << 18  # tokens of a document, documents a call
VOCABULARY = 105_789


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    options = [str(args.documents), str(args.folder)]
    return compare("data_write.py", options, args.rounds, not args.without_peer)


class Syncs:
    """Seconds that this process spends in fsync."""

    def __enter__(self) -> Syncs:
        self.seconds, self._fsync = 0.0, os.fsync
        os.fsync = self._timed  # type: ignore[assignment]
        return self

    def _timed(self, descriptor: int) -> None:
        start = time.perf_counter()
        self._fsync(descriptor)
        self.seconds += time.perf_counter() - start

    def __exit__(self, *_: object) -> None:
        os.fsync = self._fsync


def file_sums(prefix: Path) -> list[str]:
    sums = []
    for suffix in (".bin", ".idx"):
        with open(f"{prefix}{suffix}", "rb") as file:
            sums.append(hashlib.file_digest(file, "sha1").hexdigest()[:8])
    return sums


def make_tokens(documents: int) -> Any:
    import numpy as np

    return (np.arange(documents * LENGTH, dtype=np.int64) * 7919 % VOCABULARY).astype(np.int32)


def write_ours(prefix: Path, tokens: Any) -> None:
    import numpy as np

    from megatron_hammer.dataset.writer import IndexedWriter

    with IndexedWriter(prefix, VOCABULARY) as writer:
        for first in range(0, len(tokens), BATCH * LENGTH):
            batch = tokens[first : first + BATCH * LENGTH]
            writer.add(batch, np.full(len(batch) // LENGTH, LENGTH))


def _ours(documents: int, folder: Path) -> dict[str, Any]:
    tokens = make_tokens(documents)
    write_ours(folder / "warm", tokens[: BATCH * LENGTH])
    with Measured() as writing, Syncs() as syncs:
        write_ours(folder / "ours", tokens)
    return writing.report(sha1=file_sums(folder / "ours"), sync_seconds=syncs.seconds)


def _peer(documents: int, folder: Path) -> dict[str, Any]:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    tokens = torch.from_numpy(make_tokens(documents)).view(-1, LENGTH)
    with Measured() as writing:
        builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.int32)
        for document in tokens:
            builder.add_item(document)
            builder.end_document()
        builder.finalize(str(folder / "theirs.idx"))
    return writing.report(sha1=file_sums(folder / "theirs"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[3]) as folder:
        print(json.dumps((_ours if sys.argv[1] == OURS else _peer)(int(sys.argv[2]), Path(folder))))
