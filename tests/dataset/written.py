"""Small random datasets."""

from __future__ import annotations

import numpy as np

from megatron_hammer.dataset.writer import IndexedWriter


def write_dataset(prefix, lengths, vocab_size=50_000, seed=0, **kwargs):
    """One sequence a document (length 0: none), random ids. Returns the list of documents."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab_size, n).tolist() for n in lengths]
    with IndexedWriter(prefix, vocab_size, **kwargs) as writer:
        writer.add(np.concatenate([np.empty(0, np.int64), *documents]).astype(np.int64), np.asarray(lengths))
    return documents
