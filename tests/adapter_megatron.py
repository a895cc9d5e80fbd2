"""Megatron-LM's data functions, offered by our own code under the names of an outside specification.

Every function below has the signature of a plain NumPy statement of the formats; comparing the two (or comparing with
megatron-core itself) is done outside and in ``tests/sampling``. Run with ``PYTHONPATH=tests`` or load by path.
"""

from __future__ import annotations

import itertools

import numpy as np

from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.sampling import blend as _blend
from megatron_hammer.sampling import index_builder as _index
from megatron_hammer.sampling import order as _order


def write(prefix, docs, dtype):
    """docs: list of documents, each a list of sequences (lists of ids)."""
    sequences = [np.asarray(sequence, dtype) for document in docs for sequence in document]
    with IndexedWriter(prefix, dtype=dtype) as writer:
        writer.add(
            np.concatenate([np.empty(0, dtype), *sequences]),
            np.array([len(sequence) for sequence in sequences], np.int64),
            np.array([len(document) for document in docs], np.int64),
        )


def read(prefix):
    """-> (dtype, lengths, pointers, document_indices, list of sequences)"""
    dataset = IndexedDataset(prefix)
    sequences = [dataset.read(k) for k in range(dataset.num_sequences)]
    return dataset.dtype.type, dataset.lengths, dataset.pointers, dataset.document_indices, sequences


def num_epochs(tokens, num_samples, seq, extra):
    return _order.num_epochs(tokens, num_samples, seq, extra)


def sample_index(lens, doc, seq, total_tokens, extra=1, drop_last=True):
    lengths, documents = np.ascontiguousarray(lens, np.int32), np.ascontiguousarray(doc, np.int32)
    return _index.sample_index(lengths, documents, int(seq), int(total_tokens), int(extra), bool(drop_last))


def build(lens, indices, seq, seed, num_samples=None, extra=1, drop_last=True):
    """-> (document_index, sample_index, shuffle_index)"""
    lengths, kept = np.ascontiguousarray(lens, np.int32), np.ascontiguousarray(indices, np.int32)
    return tuple(_order.build_megatron_index(lengths, kept, seq, seed, num_samples, int(extra), bool(drop_last)))


def blend(weights, size):
    """-> (dataset_index int16, dataset_sample_index int64)"""
    return _blend.Blend(weights, "greedy").range(0, size)


def blend_exhaustive(sizes):
    """Megatron-LM's mix that draws exactly sizes[k] samples from source k -> (sources int16, numbers int64)"""
    limits = np.asarray(sizes, np.int64)
    total = int(limits.sum())
    weights = limits / total if total else np.zeros(len(limits))
    sources, positions, _ = _index.greedy_blend(weights, np.zeros(len(limits), np.int64), total, limits)
    return sources, positions


def split_ranges(n, split):
    """Megatron-LM's --split "949,50,1": ranges of sequences for train, valid and test; None for an empty share"""
    shares = [float(share) for share in split.split(",")]
    shares = [*shares, *[0.0] * (3 - len(shares))]
    ends = np.cumsum([0.0, *(share / sum(shares) for share in shares)]).tolist()
    return [None if stop <= start else (round(start * float(n)), round(stop * float(n)))
            for start, stop in itertools.pairwise(ends)]  # fmt: skip


def get_sample(seqs, doc, sam, shu, i, seq, extra=1, pad=-1):
    """tokens of sample i (seq + extra of them, padded at the end only in a kept partial sample)"""
    built = _order.MegatronIndex(np.asarray(doc), np.asarray(sam), np.asarray(shu))
    lengths = np.array([len(sequence) for sequence in seqs], np.int32)
    tokens = np.full(seq + extra, pad, np.int64)
    filled = 0
    for sequence, offset, length in _order.megatron_spans(built, lengths, int(built.shuffle[i]), int(extra)):
        tokens[filled : filled + length] = seqs[sequence][offset : offset + length]
        filled += length
    return tokens
