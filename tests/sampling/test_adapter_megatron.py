"""The adapter against plain NumPy statements written here, and against megatron-core itself where it is installed."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.sampling.samples import TrainData, check_tokenizer
from tests.dataset.written import write_dataset


@pytest.fixture(scope="session")
def megatron():
    """megatron-core's data modules; it is installed by tests/run.sh and imports on CPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import (
                blended_megatron_dataset_builder,
                gpt_dataset,
                helpers,
                indexed_dataset,
                utils,
            )
    except ImportError as error:
        pytest.skip(f"megatron-core cannot be imported ({error}); tests/run.sh installs it")

    class Modules:
        indexed, gpt, index, blended, split = (
            indexed_dataset,
            gpt_dataset,
            helpers,
            blended_megatron_dataset_builder,
            utils.Split,
        )

    return Modules


# ---- plain statements: slow loops over single tokens and samples ----


def plain_build(lengths, indices, seq_length, seed, num_samples, extra):
    tokens = sum(int(lengths[i]) for i in indices)
    epochs = 1
    while num_samples is not None and epochs * tokens < num_samples * seq_length + extra:
        epochs += 1
    apart, before = False, 0
    if epochs > 1:
        before = ((epochs - 1) * tokens - extra) // seq_length
        apart = num_samples - before < int(0.80 * ((tokens - extra) // seq_length))
    random = np.random.RandomState(seed)
    documents = []
    for count in [epochs - 1, 1] if apart else [epochs]:
        part = np.array(list(indices) * count, np.int32)
        random.shuffle(part)
        documents += part.tolist()
    stream = [(p, o) for p, d in enumerate(documents) for o in range(lengths[d])]
    samples = (len(stream) - extra) // seq_length
    rows = [(0, 0)]
    for k in range(1, samples + 1):
        position, offset = stream[k * seq_length - (1 - extra)]
        rows.append((position, offset + 1 - extra))
    order = []
    for first, end in [(0, before), (before, samples)] if apart else [(0, samples)]:
        part = np.arange(first, end)
        random.shuffle(part)
        order += part.tolist()
    return documents, rows, order, stream


def plain_blend(shares, size, limits=None):
    drawn, sources, positions = [0] * len(shares), [], []
    for i in range(size):
        best, best_lag = None, -math.inf
        for k, share in enumerate(shares):
            lag = share * float(max(i, 1)) - drawn[k]
            if lag > best_lag and (limits is None or drawn[k] < limits[k]):
                best, best_lag = k, lag
        sources.append(best)
        positions.append(drawn[best])
        drawn[best] += 1
    return sources, positions


@pytest.mark.parametrize("extra", [0, 1])
def test_build_and_samples(adapter, extra, backend):
    rng = np.random.default_rng(extra)
    for case in range(60):
        lengths = rng.integers(0, 20, rng.integers(2, 25)).astype(np.int32)
        lengths[0] += 2
        indices = np.arange(int(rng.integers(1, len(lengths) + 1)))
        seq_length = int(rng.integers(1, 12))
        num_samples = [None, int(rng.integers(1, 120))][case % 2]
        documents, rows, order, stream = plain_build(lengths, indices, seq_length, case, num_samples, extra)
        doc, sam, shu = adapter.build(lengths, indices, seq_length, case, num_samples, extra)
        assert (doc.dtype, sam.dtype, shu.dtype) == (np.int32, np.int32, np.uint32)
        assert doc.tolist() == documents and list(map(tuple, sam.tolist())) == rows and shu.tolist() == order
        assert adapter.num_epochs(int(lengths[indices].sum()), num_samples, seq_length, extra) == len(doc) // len(
            indices
        )
        sequences = [[1000 * d + o for o in range(n)] for d, n in enumerate(lengths)]
        for i in range(len(order)):
            first = order[i] * seq_length
            expected = [1000 * documents[p] + o for p, o in stream[first : first + seq_length + extra]]
            assert adapter.get_sample(sequences, doc, sam, shu, i, seq_length, extra).tolist() == expected


def test_kept_partial_sample_is_padded(adapter, backend):
    lengths = np.array([4, 3], np.int32)
    doc, sam, shu = adapter.build(lengths, np.arange(2), 4, 1, None, 1, False)
    last = shu.tolist().index(1)
    tokens = adapter.get_sample([[1, 2, 3, 4], [5, 6, 7]], doc, sam, shu, last, 4, 1, -1)
    stream = [t for d in doc for t in ([1, 2, 3, 4], [5, 6, 7])[d]]
    assert tokens.tolist() == [*stream[4:], -1, -1]


def test_blends(adapter, backend):
    rng = np.random.default_rng(0)
    for _ in range(20):
        weights = rng.uniform(0.1, 9, rng.integers(1, 6))
        sources, positions = adapter.blend(weights.tolist(), 200)
        assert (sources.dtype, positions.dtype) == (np.int16, np.int64)
        assert (sources.tolist(), positions.tolist()) == plain_blend((weights / weights.sum()).tolist(), 200)
        sizes = rng.integers(0, 40, len(weights))
        sizes[0] += 1
        sources, positions = adapter.blend_exhaustive(sizes.tolist())
        shares = (sizes / sizes.sum()).tolist()
        assert (sources.tolist(), positions.tolist()) == plain_blend(shares, int(sizes.sum()), sizes.tolist())
    assert len(adapter.blend_exhaustive([0, 0])[0]) == 0


def test_splits(adapter):
    assert adapter.split_ranges(123, "949,50,1") == [(0, 117), (117, 123), (123, 123)]
    assert adapter.split_ranges(1000, "98,2,0") == [(0, 980), (980, 1000), None]
    assert adapter.split_ranges(10, "1") == [(0, 10), None, None]
    assert adapter.split_ranges(3, "1,0,1") == [(0, 2), None, (2, 3)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.float64, np.float32, np.uint16])
def test_write_and_read(adapter, tmp_path, dtype):
    rng = np.random.default_rng(0)
    documents = [
        [rng.integers(0, 100, rng.integers(0, 5)).tolist() for _ in range(rng.integers(0, 3))] for _ in range(20)
    ]
    adapter.write(str(tmp_path / "d"), documents, dtype)
    found, lengths, pointers, boundaries, sequences = adapter.read(str(tmp_path / "d"))
    expected = [s for d in documents for s in d]
    assert found is dtype and [s.tolist() for s in sequences] == expected
    assert lengths.tolist() == [len(s) for s in expected] and lengths.dtype == np.int32
    ends = np.cumsum(lengths) * np.dtype(dtype).itemsize
    assert pointers.tolist() == [0, *ends[:-1].tolist()]
    assert boundaries.tolist() == np.cumsum([0, *map(len, documents)]).tolist()


# ---- megatron-core ----


def test_megatron_reads_ours(megatron, tmp_path):
    for vocab_size, dtype in ((300, np.uint16), (105_789, np.int32)):
        documents = write_dataset(tmp_path / "d", [3, 0, 5, 1, 0], vocab_size)
        theirs = megatron.indexed.IndexedDataset(str(tmp_path / "d"))
        assert theirs.index.dtype is dtype and len(theirs) == 3
        assert [theirs[k].tolist() for k in range(3)] == [d for d in documents if d]
        assert theirs.document_indices.tolist() == [0, 1, 1, 2, 3, 3]
        assert theirs.get(1, 1, 3).tolist() == documents[2][1:4]


def test_we_read_megatrons_and_the_bytes_are_equal(megatron, adapter, tmp_path):
    import torch

    rng = np.random.default_rng(0)
    for dtype in (np.uint16, np.int32):
        documents = [
            [rng.integers(0, 9000, rng.integers(0, 6)).tolist() for _ in range(rng.integers(0, 3))] for _ in range(50)
        ]
        builder = megatron.indexed.IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype)
        for document in documents:
            for sequence in document:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        builder.finalize(str(tmp_path / "m.idx"))
        ours = IndexedDataset(tmp_path / "m")
        assert ours.header is None and ours.dtype == dtype
        assert [ours.read(k).tolist() for k in range(ours.num_sequences)] == [s for d in documents for s in d]
        assert ours.document_lengths.tolist() == [sum(map(len, d)) for d in documents]
        assert check_tokenizer(ours, "f" * 32, 9000) is not None
        adapter.write(str(tmp_path / "o"), documents, dtype)
        for suffix in (".bin", ".idx"):
            assert (tmp_path / f"m{suffix}").read_bytes() == (tmp_path / f"o{suffix}").read_bytes()
        assert IndexedDataset(tmp_path / "o").fingerprint == ours.fingerprint


def test_sample_index_equals_megatrons_compiled_one(megatron, adapter, backend):
    rng = np.random.default_rng(1)
    for _ in range(300):
        lengths = rng.integers(0, rng.integers(2, 40), rng.integers(1, 30)).astype(np.int32)
        epochs = int(rng.integers(1, 4))
        documents = np.concatenate([rng.permutation(len(lengths)) for _ in range(epochs)]).astype(np.int32)
        tokens, seq_length = int(lengths.sum()), int(rng.integers(2, 30))
        extra, drop_last = bool(rng.integers(2)), bool(rng.integers(2))
        if tokens < 2:
            continue
        theirs = megatron.index.build_sample_idx_int32(
            lengths, documents, seq_length, epochs, tokens, drop_last, int(extra)
        )
        ours = adapter.sample_index(lengths, documents, seq_length, epochs * tokens, int(extra), drop_last)
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


def test_blends_equal_megatrons_compiled_ones(megatron, adapter, backend):
    rng = np.random.default_rng(2)
    for _ in range(20):
        weights = rng.uniform(0.01, 10, rng.integers(1, 8))
        sources, positions = np.zeros(500, np.int16), np.zeros(500, np.int64)
        megatron.index.build_blending_indices(sources, positions, weights / weights.sum(), len(weights), 500, False)
        ours = adapter.blend(weights.tolist(), 500)
        assert np.array_equal(ours[0], sources) and np.array_equal(ours[1], positions)
        sizes = rng.integers(1, 60, len(weights)).astype(np.int64)
        sources, positions = np.zeros(sizes.sum(), np.int16), np.zeros(sizes.sum(), np.int64)
        megatron.index.build_exhaustive_blending_indices(sources, positions, sizes, len(sizes))
        ours = adapter.blend_exhaustive(sizes.tolist())
        assert np.array_equal(ours[0], sources) and np.array_equal(ours[1], positions)


class Marks:
    """As much of a tokenizer as a GPTDatasetConfig asks for."""

    eod, pad, vocab_size, unique_identifiers = 2, 0, 50_000, None


def gpt_config(megatron, blend, seq_length, cache):
    return megatron.gpt.GPTDatasetConfig(
        random_seed=1234, sequence_length=seq_length, blend=blend, split="1,0,0", path_to_cache=cache,
        tokenizer=Marks(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip


def test_indices_and_tokens_equal_megatrons_gpt_dataset(megatron, adapter, tmp_path, backend):
    rng = np.random.default_rng(3)
    for case in range(12):
        prefix = str(tmp_path / f"d{case}")
        write_dataset(prefix, [3, *rng.integers(0, 40, rng.integers(1, 40))], seed=case)
        theirs_data = megatron.indexed.IndexedDataset(prefix)
        indices = np.arange(len(theirs_data), dtype=np.int32)
        seq_length, num_samples = int(rng.integers(2, 20)), int(rng.integers(1, 200))
        config = gpt_config(megatron, ([prefix], None), seq_length, str(tmp_path / "cache"))
        theirs = megatron.gpt.GPTDataset(theirs_data, prefix, indices, num_samples, megatron.split.train, config)
        ours = adapter.build(theirs_data.sequence_lengths, indices, seq_length, 1234, num_samples)
        for a, b in zip(ours, (theirs.document_index, theirs.sample_index, theirs.shuffle_index)):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        data = TrainData({prefix: 1.0}, seq_length, 1234, "megatron", num_samples)
        for i in range(num_samples):
            tokens, _ = theirs._query_document_sample_shuffle_indices(i)
            assert np.array_equal(data.tokens(i), tokens)


def test_order_megatron_equals_megatrons_blended_dataset(megatron, tmp_path, backend):
    """What a run that moves here would have read next, source by source and token by token."""
    rng = np.random.default_rng(4)
    weights = {}
    for k, weight in enumerate([142.0, 128.0, 38.0, 12.0, 30.0]):
        prefix = str(tmp_path / f"s{k}")
        write_dataset(prefix, [9, *rng.integers(0, 60, 30)], seed=k)
        weights[prefix] = weight
    config = gpt_config(megatron, (list(weights), list(weights.values())), 16, None)
    builder = megatron.blended.BlendedMegatronDatasetBuilder(megatron.gpt.GPTDataset, [700, 0, 0], lambda: True, config)
    theirs = builder.build()[0]
    ours = TrainData(weights, 16, 1234, "megatron", 700)
    for i in range(700):
        source, position = int(theirs.dataset_index[i]), int(theirs.dataset_sample_index[i])
        tokens, _ = theirs.datasets[source]._query_document_sample_shuffle_indices(position)
        assert ours.sample_id(i).source == source and np.array_equal(ours.tokens(i), tokens)
