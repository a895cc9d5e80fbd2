"""The compiled index builder equals its NumPy twin; both refuse what cannot be."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.order import derive_key

SIZES = sorted({0, 1, 2, 3, 5, 6, 7, 10, 1000, *(2**k + d for k in range(2, 17) for d in (-1, 0, 1))})


def test_backend_is_compiled_here(compiled):
    assert index.BACKEND == "C++"


@pytest.mark.parametrize("n", SIZES)
def test_permutation_is_a_bijection_and_equals_the_twin(n, compiled, twin):
    for key in (0, 1, 2**64 - 1, derive_key("key", n)):
        values = index.permute(n, key, 0, n)
        assert np.array_equal(np.sort(values), np.arange(n))
        assert np.array_equal(values, twin(index.permute, n, key, 0, n))


def test_permutation_has_random_access(backend):
    whole = index.permute(10_007, 3, 0, 10_007)
    for start, count in ((0, 1), (63, 2), (64, 64), (5000, 777), (10_006, 1), (10_007, 0)):
        assert np.array_equal(index.permute(10_007, 3, start, count), whole[start : start + count])


@pytest.mark.parametrize("n", [2**40 + 1, 10**15 + 7, 2**60])
def test_permutation_of_a_large_range_equals_the_twin(n, compiled, twin):
    values = index.permute(n, 11, n - 5000, 5000)
    assert np.array_equal(values, twin(index.permute, n, 11, n - 5000, 5000))
    assert len(np.unique(values)) == 5000 and values.min() >= 0 and values.max() < n
    assert abs(values.mean() / n - 0.5) < 0.03  # the mean of 5000 uniform values has a deviation of 0.004


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_permutations_come_out_evenly(n, compiled):
    trials = 12_000
    counts = Counter(tuple(index.permute(n, derive_key("even", k), 0, n).tolist()) for k in range(trials))
    orders = math.factorial(n)
    expected = trials / orders
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values()) + expected * (
        orders - len(counts)
    )
    assert chi_square < orders - 1 + 5 * math.sqrt(2 * (orders - 1)) + 5


@pytest.mark.parametrize("n", [97, 4096, 70_001])
def test_where_a_position_goes_is_uniform(n, compiled):
    cells, keys = 16, max(20, 200_000 // n)
    table = np.zeros((cells, cells))
    for k in range(keys):
        values = index.permute(n, derive_key("uniform", n, k), 0, n)
        np.add.at(table, (np.arange(n) * cells // n, values * cells // n), 1)
    sides = np.bincount(np.arange(n) * cells // n)
    expected = np.outer(sides, sides) * keys / n
    chi_square = ((table - expected) ** 2 / expected).sum()
    freedom = (cells - 1) ** 2
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_neighbours_do_not_stay_neighbours(compiled):
    values = index.permute(100_000, 5, 0, 100_000)
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(len(values))
    assert (np.abs(np.diff(values)) == 1).sum() < 20  # 2 expected
    other = index.permute(100_000, 6, 0, 100_000)
    assert (values == other).sum() < 12  # 1 expected


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_marks_and_pieces_equal_a_plain_walk(dtype, backend):
    rng = np.random.default_rng(1)
    for n in (1, 2, 63, 64, 65, 500):
        lengths = (rng.integers(0, 40, n) * rng.integers(0, 2, n)).astype(dtype)
        lengths[0] += 1
        key = derive_key("walk", n)
        order = index.permute(n, key, 0, n)
        stream = [(d, o) for d in order.tolist() for o in range(lengths[d])]
        marks = index.epoch_marks(lengths, key, 8)
        starts = np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
        assert np.array_equal(marks, np.append(starts[:-1:8], starts[-1]))
        for _ in range(20):
            offset, count = int(rng.integers(0, len(stream) + 1)), int(rng.integers(0, 200))
            pieces = index.find_pieces(lengths, marks, 8, key, offset, count)
            assert pieces.shape[1] == 3 and (pieces[:, 2] > 0).all()
            found = [(d, o + k) for d, o, length in pieces.tolist() for k in range(length)]
            assert found == stream[offset : offset + count]


def test_marks_and_pieces_equal_the_twin_on_unaligned_lengths(compiled, twin):
    rng = np.random.default_rng(2)
    lengths = rng.integers(0, 1000, 300_000).astype(np.int32)
    unaligned = np.frombuffer(b"ab" + lengths.tobytes(), "<i4", len(lengths), 2)  # as in an .idx
    assert not unaligned.flags.aligned
    marks = index.epoch_marks(unaligned, 9, 64)
    assert np.array_equal(marks, twin(index.epoch_marks, lengths, 9, 64))
    for offset in rng.integers(0, marks[-1], 50).tolist():
        pieces = index.find_pieces(unaligned, marks, 64, 9, offset, 2049)
        assert np.array_equal(pieces, twin(index.find_pieces, lengths, marks, 64, 9, offset, 2049))


def plain_sample_index(lengths, documents, seq_length, extra, drop_last):
    """Token by token: the place of every token of the stream, then every seq_length-th of them."""
    places = [(p, o) for p, d in enumerate(documents) for o in range(lengths[d])]
    usable = len(places) - extra
    samples = usable // seq_length if drop_last else math.ceil(usable / seq_length)
    rows = [(0, 0)]
    for k in range(1, samples + 1):
        token = k * seq_length
        if token > usable:  # the partial sample
            rows.append((len(documents) - 1, lengths[documents[-1]] - extra))
        elif extra:
            rows.append(places[token])
        else:  # the end of the token before
            position, offset = places[token - 1]
            rows.append((position, offset + 1))
    return np.array(rows)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("drop_last", [True, False])
def test_sample_index_equals_a_plain_walk(extra, drop_last, compiled, twin):
    rng = np.random.default_rng(3)
    for _ in range(150):
        lengths = rng.integers(0, rng.integers(2, 30), rng.integers(1, 12)).astype(np.int32)
        documents = rng.integers(0, len(lengths), rng.integers(1, 40)).astype(np.int32)
        total = int(lengths[documents].sum())
        if total < 1:
            continue
        seq_length = int(rng.integers(1, 20))
        rows = index.sample_index(lengths, documents, seq_length, total, extra, drop_last)
        assert rows.dtype == np.int32
        assert np.array_equal(rows, plain_sample_index(lengths, documents, seq_length, extra, drop_last))
        again = twin(index.sample_index, lengths, documents, seq_length, total, extra, drop_last)
        assert np.array_equal(rows, again) and again.dtype == np.int32
        wide = compiled.sample_index_int64(lengths, documents, seq_length, total, extra, drop_last)
        assert wide.dtype == np.int64 and np.array_equal(wide, rows)


@pytest.mark.parametrize("total", [16_777_218, 204_800_005, 2_048_000_002, 2**31 + 4096, 2**32 + 4096])
def test_sample_counts_are_exact_where_float32_is_not(total, backend):
    lengths = np.full(4, 2**30 + 2**27, np.int32)
    documents = np.arange(4, dtype=np.int32)
    lengths[3] = total - (total // 4) * 3 if total < 2**32 else total - 3 * int(lengths[0])
    lengths[:3] = total // 4 if total < 2**32 else lengths[0]
    assert int(lengths.sum(dtype=np.int64)) == total
    assert len(index.sample_index(lengths, documents, 2048, total, 1, True)) - 1 == (total - 1) // 2048
    assert len(index.sample_index(lengths, documents, 2048, total, 1, False)) - 1 == -(-(total - 1) // 2048)


GOOD = {"lengths": [3, 4], "documents": [0, 1, 0], "seq_length": 2, "total_tokens": 10}


@pytest.mark.parametrize(
    "change",
    [
        {"documents": []},
        {"documents": [0, 2]},
        {"documents": [0, -1]},
        {"documents": [2**31 - 1]},
        {"lengths": [3, -4]},
        {"lengths": [3, -(2**31)]},
        {"lengths": []},
        {"seq_length": 0},
        {"seq_length": -1},
        {"total_tokens": 11},
        {"total_tokens": 2**62},
        {"total_tokens": -1},
        {"extra": 2},
        {"total_tokens": 9, "drop_last": False},
    ],
)
def test_sample_index_refuses_bad_input(change, backend):
    arguments = {**GOOD, **change}
    arguments |= {name: np.array(arguments[name], np.int32) for name in ("lengths", "documents")}
    with pytest.raises((ValueError, MemoryError)):
        index.sample_index(**arguments)


def test_other_functions_refuse_bad_input(backend):
    lengths = np.array([3, -1, 5], np.int32)
    good = np.array([3, 1, 5], np.int32)
    marks = index.epoch_marks(good, 1, 2)
    shares, zeros = np.array([0.5, 0.5]), np.zeros(2, np.int64)
    for call in (
        lambda: index.permute(-1, 0, 0, 0),
        lambda: index.permute(2**61, 0, 0, 1),
        lambda: index.permute(5, 0, 3, 3),
        lambda: index.permute(5, 0, -1, 2),
        lambda: index.epoch_marks(lengths, 1, 2),
        lambda: index.epoch_marks(good, 1, 0),
        lambda: index.find_pieces(good, marks[:-1], 2, 1, 0, 1),
        lambda: index.find_pieces(good, marks, 2, 1, 10, 1),
        lambda: index.find_pieces(good, marks, 2, 1, -1, 1),
        lambda: index.find_pieces(lengths, marks, 2, 1, 0, 100),
        lambda: index.chairman_blend(np.array([1.0, 0.0]), zeros, 3),
        lambda: index.chairman_blend(np.array([1.0, np.nan]), zeros, 3),
        lambda: index.chairman_blend(shares, np.array([0, -1]), 3),
        lambda: index.chairman_blend(shares, zeros[:1], 3),
        lambda: index.chairman_blend(shares, np.array([2**52, 2**52]), 1),
        lambda: index.greedy_blend(shares, zeros, -1),
        lambda: index.greedy_blend(shares, zeros, 3, np.array([1, 1])),
        lambda: index.greedy_blend(shares, zeros, 3, np.array([1])),
    ):
        with pytest.raises(ValueError):
            call()


def test_compiled_functions_refuse_wrong_arrays(compiled):
    lengths = np.array([3, 1, 5], np.int32)
    documents = np.arange(3, dtype=np.int32)
    for call in (
        lambda: compiled.epoch_marks(lengths.astype(np.float32), 1, 2),
        lambda: compiled.epoch_marks(lengths[::2], 1, 2),
        lambda: compiled.epoch_marks(lengths.reshape(1, 3), 1, 2),
        lambda: compiled.sample_index_int32(lengths.astype(np.int64), documents, 2, 9, 1, True),
        lambda: compiled.sample_index_int32(lengths, documents.astype(">i4"), 2, 9, 1, True),
        lambda: compiled.MersenneTwister(1).shuffle(np.arange(4.0)),
        lambda: compiled.MersenneTwister(1).shuffle(np.arange(4, dtype=np.int16)),
        lambda: compiled.MersenneTwister(1).shuffle(np.frombuffer(bytes(8), np.int32)),
        lambda: compiled.MersenneTwister(-1),
        lambda: compiled.MersenneTwister(2**32),
    ):
        with pytest.raises(TypeError):
            call()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_shuffle_is_that_of_numpy(dtype, compiled):
    for seed in (0, 1234, 2**32 - 1):
        ours, numpys = index.random_state(seed), np.random.RandomState(seed)
        for n in (0, 1, 2, 3, 127, 128, 129, 1000, 65_537):  # one after the other: the state must agree as well
            a, b = np.arange(n, dtype=dtype), np.arange(n, dtype=dtype)
            ours.shuffle(a)
            numpys.shuffle(b)
            assert np.array_equal(a, b), (seed, n)
