"""The order of samples: against a plain statement, complete in every epoch, never changed by what comes later."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.order import (
    IndependentOrder,
    MegatronOrder,
    build_megatron_index,
    derive_key,
)
from tests.sampling.order_samples import sample

CASES = [  # lengths of the documents, seq_length
    ([5, 0, 3, 9, 1, 0, 7], 4),
    ([1], 1),
    ([1], 5),  # many epochs in one window
    ([2, 1], 7),
    ([100], 8),
    ([16, 16], 8),  # windows end where epochs do
    ([3] * 200, 10),
    ([0, 0, 1000, 0], 64),
]


def plain_stream(lengths, fingerprint, seed, epochs):
    """(document, offset) of every token of the first epochs."""
    stream = []
    for epoch in range(epochs):
        key = derive_key(seed, "documents", fingerprint, epoch)
        for document in index.permute(len(lengths), key, 0, len(lengths)).tolist():
            stream += [(document, offset) for offset in range(lengths[document])]
    return stream


def places(pieces):
    return [(document, offset + k) for document, offset, length in pieces for k in range(length)]


@pytest.mark.parametrize(("lengths", "seq_length"), CASES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_order_equals_a_plain_statement(lengths, seq_length, dtype, backend):
    order = IndependentOrder(np.array(lengths, dtype), "abc", seq_length, 7)
    total = sum(lengths)
    windows = 3 * (total // seq_length + 1)
    stream = plain_stream(lengths, "abc", 7, (windows + 1) * seq_length // total + 2)
    for window in range(windows):
        pieces = order.locate(window)
        assert places(pieces) == stream[window * seq_length : (window + 1) * seq_length + 1]
        assert all(piece.length > 0 for piece in pieces)


@pytest.mark.parametrize(("lengths", "seq_length"), CASES)
def test_every_epoch_reads_each_of_its_windows_once(lengths, seq_length, backend):
    total = sum(lengths)
    order = IndependentOrder(np.array(lengths, np.int32), "abc", seq_length, 7)
    positions = 3 * total // seq_length + 3
    samples = [sample(order, p) for p in range(positions)]
    epochs = [epoch for epoch, _ in samples]
    assert epochs == sorted(epochs)
    for epoch in range(epochs[-1]):  # the last one may be cut
        first, end = -(-epoch * total // seq_length), -(-(epoch + 1) * total // seq_length)
        assert sorted(w for e, w in samples if e == epoch) == list(range(first, end))


def test_an_epoch_reads_every_token_once_as_input():
    """Windows without the token that is only a label tile the stream: three epochs, three times each token."""
    lengths = np.random.default_rng(0).integers(0, 30, 50).astype(np.int32)
    lengths[0] += 24 - lengths.sum() % 24  # whole windows in three epochs
    order = IndependentOrder(lengths, "abc", 8, 1)
    total = int(lengths.sum())
    seen = []
    for position in range(3 * total // 8):
        seen += places(order.locate(sample(order, position)[1]))[:-1]
    expected = [(d, o) for d in range(50) for o in range(lengths[d])]
    assert sorted(seen) == sorted(expected * 3)


def test_order_depends_on_seed_content_and_epoch_only():
    lengths = np.full(300, 5, np.int32)

    def order(fingerprint, seed):
        made = IndependentOrder(lengths, fingerprint, 10, seed)
        return [places(made.locate(sample(made, p)[1])) for p in range(150)]

    one = order("abc", 1)
    assert one == order("abc", 1)
    assert one != order("abc", 2) and one != order("abd", 1)
    made = IndependentOrder(lengths, "abc", 10, 1)
    second = [places(made.locate(sample(made, p)[1])) for p in range(150, 300)]
    assert second != one
    assert sorted(place for w in second for place in w[:10]) == sorted(place for w in one for place in w[:10])


def test_order_is_read_from_anywhere(backend):
    """Reading far ahead, back, or in another process gives the same: there is no hidden cursor."""
    lengths = np.random.default_rng(1).integers(0, 60, 200).astype(np.int32)
    forward = IndependentOrder(lengths, "abc", 32, 3)
    expected = [(sample(forward, p), forward.locate(sample(forward, p)[1])) for p in range(1200)]
    other = IndependentOrder(lengths, "abc", 32, 3)
    for p in [1199, 0, 600, 5, 1198, *np.random.default_rng(2).integers(0, 1200, 100).tolist()]:
        assert (sample(other, p), other.locate(sample(other, p)[1])) == expected[p]
    assert len(other._marks) <= 4  # epochs in memory


def test_far_epochs_cost_nothing(compiled):
    order = IndependentOrder(np.full(1000, 700, np.int32), "abc", 2048, 3)
    epoch, window = sample(order, 10**12)
    assert epoch == 10**12 * 2048 // 700_000
    assert sum(piece.length for piece in order.locate(window)) == 2049


def test_documents_and_windows_are_mixed():
    """Neighbouring samples come from all over the source, in each epoch in another way."""
    order = IndependentOrder(np.full(10_000, 64, np.int32), "abc", 64, 3)
    first = np.array([order.locate(sample(order, p)[1])[0].document for p in range(4000)])
    second = np.array([order.locate(sample(order, p)[1])[0].document for p in range(10_000, 14_000)])
    for documents in (first, second):
        assert abs(np.corrcoef(documents[:-1], documents[1:])[0, 1]) < 0.08  # 5 deviations
    assert (first == second).sum() < 8


def test_megatrons_arrays_of_a_million_documents(compiled):
    """Sums of megatron-core 0.16.1's own arrays for the same lengths, seed and sequence length."""
    rng = np.random.default_rng(1234)
    drawn = rng.lognormal(np.log(800) - 0.5, 1.0, 1_000_000)
    lengths = np.clip(drawn, 2, 200_000).astype(np.int32)
    assert int(lengths.sum(dtype=np.int64)) == 799_791_290
    for indices in (range(len(lengths)), np.arange(len(lengths), dtype=np.int32)):
        built = build_megatron_index(lengths, indices, 2048, 1234)
        assert [hashlib.sha1(array).hexdigest()[:8] for array in built] == ["a5ac2c54", "9f459d79", "2d79c310"]


def test_megatron_order_refuses_a_seed_numpy_does_not_take():
    for seed in (-1, 2**32):
        with pytest.raises(ConfigError, match="E271"):
            MegatronOrder(np.array([5], np.int32), 2, seed, 3)
