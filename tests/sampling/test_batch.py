"""One batch on the host and on a device: what is moved, what is shared, and what stays absent."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch

from megatron_hammer.kernels.packed_sequences import PackedSequences
from megatron_hammer.sampling.batch import Batch

CPU = torch.device("cpu")
WINDOWS = np.arange(10).reshape(2, 5)


def test_windows_are_one_memory_on_both_sides() -> None:
    batch = Batch.from_windows(WINDOWS).to(CPU)
    assert batch.windows is not None and batch.windows.tolist() == WINDOWS.tolist()
    assert batch.tokens.tolist() == WINDOWS[:, :-1].tolist() and batch.labels.tolist() == WINDOWS[:, 1:].tolist()
    for view in (batch.tokens, batch.labels):
        assert view.untyped_storage().data_ptr() == batch.windows.untyped_storage().data_ptr()
    assert batch.loss_weights is batch.documents is batch.sources is None


def test_everything_moves() -> None:
    weights = np.array([[0, 1, 1, 0.5], [1, 1, 0, 0]], np.float32)
    host = Batch.from_windows(WINDOWS, weights, np.array([0, 3, 8], np.int32), np.array([1, 0]))
    batch = host.to(CPU)
    assert batch.loss_weights is not None and batch.loss_weights.dtype == torch.float32
    assert batch.loss_weights.tolist() == weights.tolist()
    assert isinstance(batch.documents, PackedSequences) and batch.documents.lengths == (3, 5)
    assert batch.sources is not None and batch.sources.dtype == torch.int64 and batch.sources.tolist() == [1, 0]


def test_tokens_and_labels_that_are_apart() -> None:
    batch = Batch(WINDOWS[:, :2], WINDOWS[:, 3:]).to(CPU)
    assert batch.tokens.tolist() == [[0, 1], [5, 6]] and batch.labels.tolist() == [[3, 4], [8, 9]]
    assert batch.windows is None


def test_batches_are_made_without_torch() -> None:
    code = (
        "import sys, numpy as np\n"
        "from megatron_hammer.sampling.batch import Batch\n"
        "Batch.from_windows(np.zeros((2, 5), np.int64))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_part_of_a_batch() -> None:
    """Under context parallelism: tokens, labels, weights and sources of the same places, documents as spans."""
    windows = np.arange(34).reshape(2, 17)
    weights = windows[:, 1:] / np.float32(100)
    for documents in (None, np.array([0, 3, 16, 27, 32], np.int32)):
        whole = Batch.from_windows(windows, weights, documents, np.array([7, 9]))
        parts = [whole.shard(rank, 4) for rank in range(4)]
        for part in parts:
            assert part.tokens.shape == part.labels.shape == (2, 4) and np.array_equal(part.labels, part.tokens + 1)
            assert part.loss_weights is not None and np.array_equal(part.loss_weights, part.labels / np.float32(100))
            assert part.sources is not None and np.array_equal(part.sources, np.where(part.tokens < 17, 7, 9))
            packed = part.to(CPU).documents
            assert isinstance(packed, PackedSequences) and packed.keys is not None and packed.keys.shards == 4
            assert sum(packed.lengths) == 8 and packed.positions.shape == (8,)
        assert sorted(np.concatenate([part.tokens.ravel() for part in parts])) == sorted(whole.tokens.ravel())
    assert whole.shard(0, 1) is whole
