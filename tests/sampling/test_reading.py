"""Many samples at once: the tokens that single samples have, the pieces they are made of, nothing beyond the files."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hammer.base.errors import DataError
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.blend import _BLOCK, Blend
from megatron_hammer.sampling.samples import TrainData
from tests.dataset.written import write_dataset
from tests.sampling.whole_mix import draw_whole

SEQ = 16


def make_sources(tmp_path, weights=(142, 128.5, 30)):
    """{prefix: weight} of sources of different sizes, some documents empty, one source shorter than a sample."""
    rng = np.random.default_rng(0)
    sources = {}
    for k, (weight, count) in enumerate(zip(weights, (60, 40, 1))):
        prefix = str(tmp_path / str(k))
        write_dataset(prefix, rng.integers(0, 50, count) if count > 1 else [SEQ - 3], vocab_size=[300, 70_000][k % 2])
        sources[prefix] = weight
    return sources


@pytest.mark.parametrize("order", ["independent", "megatron"])
@pytest.mark.parametrize("weights", [(1.0,), (142, 128.5, 30)])
def test_a_batch_is_its_samples(tmp_path, order, weights, backend):
    data = TrainData(make_sources(tmp_path, weights), SEQ, 1, order, 600, document_mask=True)
    for first, count in ((0, 1), (0, 600), (7, 64), (599, 1), (150, 200)):  # several epochs of every source
        read = data.read(first, count)
        assert read.windows.shape == (count, SEQ + 1) and read.windows.dtype == np.int64
        assert np.array_equal(read.windows, np.stack([data.tokens(i) for i in range(first, first + count)]))
        assert read.tokens.base is read.labels.base is read.windows and read.loss_weights is None
        assert np.array_equal(read.tokens, read.windows[:, :-1]) and np.array_equal(read.labels, read.windows[:, 1:])
        assert read.sources.dtype == np.int64
        assert read.sources.tolist() == [data.sample_id(i).source for i in range(first, first + count)]
        lengths = [[length for _, _, length in data.locate(i)] for i in range(first, first + count)]
        for of_sample in lengths:
            of_sample[-1] -= 1  # the last token is a label only
        assert read.documents.dtype == np.int32
        assert read.documents.tolist() == [0, *np.cumsum([n for of_sample in lengths for n in of_sample if n])]


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_documents_of_several_sequences(tmp_path, order, adapter, backend):
    rng = np.random.default_rng(0)
    documents = [
        [rng.integers(0, 9000, rng.integers(0, 9)).tolist() for _ in range(rng.integers(0, 4))] for _ in range(60)
    ]
    adapter.write(str(tmp_path / "d"), documents, np.int32)
    data = TrainData({str(tmp_path / "d"): 1}, 7, 3, order, 150)
    assert np.array_equal(data.read(0, 150).windows, np.stack([data.tokens(i) for i in range(150)]))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_every_token_type(tmp_path, adapter, dtype, backend):
    rng = np.random.default_rng(1)
    documents = [[rng.integers(0, 120, rng.integers(0, 30)).tolist()] for _ in range(50)]
    adapter.write(str(tmp_path / "d"), documents, dtype)
    data = TrainData({str(tmp_path / "d"): 1}, SEQ, 3)
    read = data.read(3, 20)
    assert read.documents is None and np.array_equal(read.windows, np.stack([data.tokens(i) for i in range(3, 23)]))


def test_what_cannot_be_read(tmp_path):
    data = TrainData(make_sources(tmp_path), SEQ, 1, "megatron", 30)
    for first, count in ((-1, 2), (29, 2), (30, 1), (0, 0)):
        with pytest.raises(IndexError):
            data.read(first, count)


def test_far_samples(tmp_path):
    """Numbers whose product with seq_length leaves 64 bits."""
    prefix = next(iter(make_sources(tmp_path, (1.0,))))
    data = TrainData({prefix: 1.0}, SEQ, 1)
    far = 2**60
    assert np.array_equal(data.read(far, 9).windows, np.stack([data.tokens(far + i) for i in range(9)]))


@pytest.mark.parametrize("rule", ["chairman", "greedy"])
def test_ranges_of_a_mix(rule, compiled):
    sources, positions = draw_whole([142, 128, 38], rule, 2 * _BLOCK + 50)
    blend = Blend([142, 128, 38], rule)
    for first, count in ((_BLOCK - 3, 6), (0, 2 * _BLOCK + 50), (5, 1), (_BLOCK, _BLOCK), (2 * _BLOCK - 1, 1)):
        found = blend.range(first, count)
        assert np.array_equal(found[0], sources[first : first + count])
        assert np.array_equal(found[1], positions[first : first + count])


# ---- the compiled functions against their twins ----


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_located_windows_equal_the_twin(dtype, compiled, twin):
    rng = np.random.default_rng(2)
    for n in (1, 5, 64, 700, 5000):
        lengths = (rng.pareto(0.7, n) * 20 * rng.integers(0, 2, n)).astype(dtype)  # a few documents hold nearly all
        lengths[-1] += 1
        for stride in (1, 7, 64):
            marks = index.epoch_marks(lengths, n, stride)
            offsets = np.append(rng.integers(0, marks[-1] + 1, 40), marks[-1])
            arguments = lengths, marks, stride, n, offsets, 65
            for ours, numpys in zip(index.locate_windows(*arguments), twin(index.locate_windows, *arguments)):
                assert np.array_equal(ours, numpys) and ours.dtype == numpys.dtype
    empty = np.empty(0, np.int64)
    assert [len(x) for x in index.locate_windows(lengths, marks, stride, n, empty, 65)] == [0, 0]


@pytest.mark.parametrize("wide", [False, True])
def test_megatron_windows_equal_the_twin(wide, compiled, twin):
    rng = np.random.default_rng(3)
    for extra in (0, 1):
        lengths = rng.integers(0, 30, 50).astype(np.int32)
        documents = rng.integers(0, 50, 300).astype(np.int32)
        samples = index.sample_index(lengths, documents, 11, int(lengths[documents].sum()), extra)
        samples = samples.astype(np.int64 if wide else np.int32)
        windows = rng.permutation(len(samples) - 1)
        arguments = lengths, documents, samples, windows, extra
        for ours, numpys in zip(index.megatron_windows(*arguments), twin(index.megatron_windows, *arguments)):
            assert np.array_equal(ours, numpys)


GOOD = {
    "tokens": np.arange(10, dtype=np.uint16),
    "pointers": np.array([0, 6, 6, 14]),
    "boundaries": None,
    "pieces": np.array([[0, 1, 2], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]),
    "counts": np.array([3, 2]),
    "rows": np.array([2, 0]),
}


@pytest.mark.parametrize("ids", [np.int32, np.int64])
def test_copied_windows(ids, backend):
    out = np.full((3, 4), -1, ids)
    index.copy_windows(**GOOD, out=out)
    assert out.tolist() == [[4, 5, 6, 9], [-1] * 4, [1, 2, 8, 9]]
    by_document = GOOD | {"boundaries": np.array([0, 2, 3, 4]), "pieces": GOOD["pieces"].copy()}
    by_document["pieces"][:, 0] = [0, 1, 2, 1, 2]
    again = np.full((3, 4), -1)
    index.copy_windows(**by_document, out=again)
    assert np.array_equal(again, out)
    wide = GOOD | {"tokens": GOOD["tokens"].astype(np.int64), "pointers": 4 * GOOD["pointers"]}
    if ids == np.int32:
        with pytest.raises(TypeError):
            index.copy_windows(**wide, out=out)
    else:
        index.copy_windows(**wide, out=again)
        assert np.array_equal(again, out)


@pytest.mark.parametrize(
    "change",
    [
        {"pieces": [[4, 1, 2], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]},  # no such sequence
        {"pieces": [[-1, 1, 2], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]},
        {"pieces": [[2**62, 1, 2], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]},
        {"pieces": [[0, -1, 2], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]},
        {"pieces": [[0, 1, -2], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]},
        {"pieces": [[0, 1, 2], [1, 0, 0], [3, 2, 2], [2, 1, 3], [3, 2, 1]]},  # beyond the tokens
        {"pieces": [[0, 1, 2], [1, 0, 0], [3, 2**62, 2], [2, 1, 3], [3, 2, 1]]},
        {"pieces": [[0, 1, 2**62], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]},
        {"pieces": [[0, 1, 2], [1, 0, 0], [3, 1, 1], [2, 1, 3], [3, 2, 1]]},  # too few for a row
        {"pieces": [[0, 1, 3], [1, 0, 0], [3, 1, 2], [2, 1, 3], [3, 2, 1]]},  # too many
        {"pointers": [0, 6, 6, -2]},
        {"pointers": [0, 6, 6, 13]},  # not at a token
        {"pointers": [0, 6, 6, 2**62]},
        {"boundaries": [0, 2]},
        {"boundaries": [0, 2, 3, 9]},
        {"boundaries": [0, 2, 3, -1]},
        {"counts": [3, 3]},
        {"counts": [3, 1]},
        {"counts": [-1, 6]},
        {"counts": [3, 2, 0]},
        {"rows": [3, 0]},
        {"rows": [-1, 0]},
        {"rows": [0]},
    ],
)
def test_a_copy_never_leaves_the_arrays(change, backend):
    arguments = GOOD | {name: np.array(value, np.int64) for name, value in change.items()}
    with pytest.raises(ValueError):
        index.copy_windows(**arguments, out=np.empty((3, 4), np.int64))


def test_windows_that_cannot_be(backend):
    lengths = np.array([3, 1, 5], np.int32)
    marks = index.epoch_marks(lengths, 1, 2)
    documents = np.array([0, 1, 2], np.int32)
    samples = index.sample_index(lengths, documents, 2, 9)

    def located(**change):
        arguments = {"lengths": lengths, "marks": marks, "stride": 2, "key": 1, "offsets": np.array([0]), "count": 2}
        return lambda: index.locate_windows(**(arguments | change))

    def megatron(**change):
        arguments = {
            "lengths": lengths,
            "documents": documents,
            "samples": samples,
            "windows": np.array([0]),
            "extra": 1,
        }
        return lambda: index.megatron_windows(**(arguments | change))

    bad = samples.copy()
    bad[1] = 7, 0
    for call in (
        located(offsets=np.array([10])),
        located(offsets=np.array([-1])),
        located(marks=marks[:-1]),
        located(lengths=np.array([3, -1, 5], np.int32), count=9),
        megatron(windows=np.array([4])),
        megatron(windows=np.array([-1])),
        megatron(samples=bad),
        megatron(samples=-samples, windows=np.array([1])),
        megatron(samples=samples * 2, windows=np.array([2])),
        megatron(documents=documents[:1], windows=np.array([2])),
        megatron(documents=documents + 3),
        megatron(lengths=lengths[:1], windows=np.array([1])),
        megatron(lengths=lengths // 3),
    ):
        with pytest.raises(ValueError):
            call()


def test_copies_refuse_wrong_arrays(compiled):
    for change in (
        {"tokens": GOOD["tokens"].astype(np.float32)},
        {"tokens": np.frombuffer(b"a" + GOOD["tokens"].tobytes(), np.uint16, 10, 1)},
        {"pointers": GOOD["pointers"].astype(np.int32)},
        {"pieces": GOOD["pieces"][:, :2]},
        {"out": np.empty((3, 4), np.int16)},
        {"out": np.empty((3, 8), np.int64)[:, ::2]},
        {"out": np.empty(12, np.int64)},
    ):
        with pytest.raises(TypeError):
            compiled.copy_windows(**(GOOD | {"out": np.empty((3, 4), np.int64)} | change))
    frozen = np.empty((3, 4), np.int64)
    frozen.flags.writeable = False
    with pytest.raises(TypeError):
        compiled.copy_windows(**GOOD, out=frozen)


# ---- files ----


@pytest.mark.parametrize("order", ["independent", "megatron"])
@pytest.mark.parametrize("total", [2**31 + 4096, 2**32 + 4096])
def test_more_tokens_than_32_bits_count(tmp_path, order, total):
    """A sparse .bin: nothing on the disk but a few marked places."""
    lengths = [2**30, 2**30 - 100, total - 2**31 + 100] if total < 2**32 else [2**31 - 1, 2**31 - 1, 4098]
    starts = np.cumsum([0, *lengths]).tolist()
    with open(tmp_path / "d.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 3, 4))
        np.array(lengths, "<i4").tofile(file)
        (np.array(starts[:-1], "<i8") * 4).tofile(file)
        np.arange(4, dtype="<i8").tofile(file)
    with open(tmp_path / "d.bin", "wb") as file:
        file.truncate(4 * total)
        for start, length in zip(starts, lengths):
            for place in (start, start + length - 4096):
                file.seek(4 * place)
                np.arange(1, 4097, dtype="<i4").tofile(file)
    seq_length = 1 << 20  # few windows, so that some lie beyond each limit
    data = TrainData({str(tmp_path / "d"): 1.0}, seq_length, 1, order, total // seq_length - 1)
    dataset = data.sources[0]
    assert dataset.num_tokens == total
    seen = set()
    for i in range(total // seq_length - 1):
        pieces = data.locate(i)
        ends = [(dataset.lengths[piece.document] - piece.offset - piece.length) for piece in pieces]
        if pieces[0].document in seen and len(pieces) == 1 and min(ends) > 0 and i > 20:
            continue  # all zeros
        seen.add(pieces[0].document)
        expected = np.concatenate(
            [np.fromfile(tmp_path / "d.bin", "<i4", n, offset=4 * (starts[d] + o)) for d, o, n in pieces]
        )
        assert np.array_equal(data.read(i, 1).windows[0], expected)
    assert seen == {0, 1, 2} or order == "megatron" or total < 2**32


MUTANTS = int(os.environ.get("HAMMER_MUTANTS", "200"))


@settings(
    deadline=None,
    max_examples=MUTANTS,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_files_end_in_a_data_error_or_in_whole_samples(tmp_path, data):
    """Structure-aware: any number of the index may change, .bin may be cut or grow."""
    if not (tmp_path / "good.idx").exists():
        lengths = np.random.default_rng(5).integers(0, 20, 12)
        with IndexedWriter(tmp_path / "good", 300) as writer:
            writer.add(np.arange(lengths.sum()) % 300, lengths, np.array([2, 0, 3, 1, 1, 5]))
        (tmp_path / "good.meta.json").unlink()
    content = bytearray((tmp_path / "good.idx").read_bytes())
    tokens = (tmp_path / "good.bin").read_bytes()
    fields = [(9, "Q"), (17, "B"), (18, "Q"), (26, "Q")]
    fields += [(34 + 4 * k, "i") for k in range(12)] + [(82 + 8 * k, "q") for k in range(19)]
    for _ in range(data.draw(st.integers(1, 3))):
        place, kind = data.draw(st.sampled_from(fields))
        bits = 8 * struct.calcsize(kind)
        low, high = (0, 2**bits - 1) if kind.isupper() else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        near = struct.unpack_from(f"<{kind}", content, place)[0]
        value = data.draw(st.one_of(st.integers(max(near - 3, low), min(near + 3, high)), st.integers(low, high)))
        struct.pack_into(f"<{kind}", content, place, value)
    size = data.draw(st.one_of(st.just(len(tokens)), st.integers(0, len(tokens) + 9)))
    (tmp_path / "f.idx").write_bytes(content)
    (tmp_path / "f.bin").write_bytes((tokens + bytes(9))[:size])
    for order in ("independent", "megatron"):
        try:
            damaged = TrainData({str(tmp_path / "f"): 1.0}, 7, 1, order, 30)
        except DataError:
            continue
        assert np.array_equal(damaged.read(0, 30).windows, np.stack([damaged.tokens(i) for i in range(30)]))
