"""Training and validation samples, the tokenizer check, and what one step reads on each rank."""

from __future__ import annotations

import hashlib
import itertools
import os
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.dataset.format import TokenizerRecord, path_of
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.sampling.cache import IndexStore
from megatron_hammer.sampling.loader import ReadAhead, chain_digest, micro_batches
from megatron_hammer.sampling.samples import SampleId, TrainData, ValidData, check_tokenizer, describe_samples
from tests.dataset.written import write_dataset

SEQ = 16


@pytest.fixture
def sources(tmp_path):
    """{prefix: weight} of three sources of different sizes, and their documents."""
    rng = np.random.default_rng(0)
    weights, documents = {}, {}
    for name, count, weight in (("zh", 60, 142), ("en", 40, 128.5), ("code", 5, 30)):
        prefix = str(tmp_path / name)
        documents[prefix] = write_dataset(prefix, rng.integers(0, 50, count), seed=count)
        weights[prefix] = weight
    return weights, documents


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_tokens_are_those_of_the_located_pieces(sources, order, backend):
    weights, documents = sources
    data = TrainData(weights, SEQ, 1, order, 400)
    for i in range(400):
        prefix = list(weights)[data.sample_id(i).source]
        expected = [t for d, o, n in data.locate(i) for t in documents[prefix][d][o : o + n]]
        tokens = data.tokens(i)
        assert tokens.dtype == np.int64 and tokens.shape == (SEQ + 1,) and tokens.tolist() == expected


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_documents_of_several_sequences(tmp_path, order, adapter):
    """Our unit is the document, Megatron's the sequence; both are located by document."""
    rng = np.random.default_rng(0)
    documents = [
        [rng.integers(0, 9000, rng.integers(0, 9)).tolist() for _ in range(rng.integers(0, 4))] for _ in range(60)
    ]
    adapter.write(str(tmp_path / "d"), documents, np.int32)
    flat = [[t for sequence in document for t in sequence] for document in documents]
    data = TrainData({str(tmp_path / "d"): 1}, 7, 3, order, 150)
    for i in range(150):
        assert data.tokens(i).tolist() == [t for d, o, n in data.locate(i) for t in flat[d][o : o + n]]


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_cumulative_lengths_are_those_of_the_located_pieces(sources, order, backend):
    """Of the s inputs: the token that is a target only belongs to no document, and no document is empty."""
    data = TrainData(sources[0], SEQ, 1, order, 400, document_mask=True)
    for first, count in ((0, 1), (3, 4), (100, 33)):
        expected = [0]
        for i in range(first, first + count):
            left = SEQ
            for _, _, n in data.locate(i):
                if min(n, left):
                    expected.append(expected[-1] + min(n, left))
                left -= min(n, left)
        found = data.read(first, count).documents
        assert found.dtype == np.int32 and found.tolist() == expected
    batch = micro_batches(data, 8, 16, 4, 1, 2)[1]
    assert batch.documents.tolist() == data.read(20, 4).documents.tolist() and batch.documents[-1] == 4 * SEQ
    assert TrainData(sources[0], SEQ, 1, order, 400).read(0, 4).documents is None


def test_shares_of_the_sources(sources):
    weights, _ = sources
    data = TrainData(weights, SEQ, 1)
    counts = np.bincount([data.sample_id(i).source for i in range(3000)])
    shares = np.array(list(weights.values())) / sum(weights.values())
    assert np.abs(counts - shares * 3000).max() < 1


def test_each_source_is_read_epoch_by_epoch(sources):
    data = TrainData(sources[0], SEQ, 1)
    windows = {}
    for i in range(2000):
        sample = data.sample_id(i)
        windows.setdefault((sample.source, sample.epoch), []).append(sample.window)
    for (source, epoch), found in windows.items():
        assert len(found) == len(set(found))
        if (source, epoch + 1) in windows:
            assert sorted(found) == list(range(min(found), max(found) + 1))


def test_the_past_does_not_depend_on_the_length_of_the_run(sources):
    weights, _ = sources
    runs = [TrainData(weights, SEQ, 1, "independent", n) for n in (None, 10, 10_000)]
    for i in range(300):
        assert runs[0].sample_id(i) == runs[1].sample_id(i) == runs[2].sample_id(i)
    moved = TrainData(dict(weights), SEQ, 2)
    assert [moved.sample_id(i) for i in range(50)] != [runs[0].sample_id(i) for i in range(50)]


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_global_batch_and_digest_are_the_same_for_every_layout(sources, order):
    weights, _ = sources
    batch, steps = 16, 5
    data = TrainData(weights, SEQ, 1, order, batch * steps)
    seen = {}
    for dp_size, micro in ((1, 1), (1, 16), (2, 4), (4, 2), (8, 2), (16, 1)):
        accum = batch // (dp_size * micro)
        digest, rows = "", []
        for step in range(steps):
            first = step * batch
            ranks = [micro_batches(data, first, batch, micro, rank, dp_size) for rank in range(dp_size)]
            for m in range(accum):
                for rank in range(dp_size):
                    one = ranks[rank][m]
                    assert one.tokens.shape == one.labels.shape == (micro, SEQ) and one.tokens.dtype == np.int64
                    assert np.array_equal(one.tokens[:, 1:], one.labels[:, :-1])
                    rows += np.concatenate([one.tokens, one.labels[:, -1:]], axis=1).tolist()
            digest = chain_digest(digest, (data.sample_id(i) for i in range(first, first + batch)), data.fingerprints)
        seen[dp_size, micro] = digest, rows
    assert len({digest for digest, _ in seen.values()}) == 1
    expected = [data.tokens(i).tolist() for i in range(batch * steps)]
    assert all(rows == expected for _, rows in seen.values())


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_reading_ahead_changes_nothing(sources, order):
    weights, _ = sources
    asked = []
    data = TrainData(weights, SEQ, 1, order, 40, document_mask=True)
    ahead = ReadAhead(lambda first, count: asked.append(first) or micro_batches(data, first, count, 2, 1, 2))
    for first in (0, 8, 16, 0, 8, 32):  # forward, back as after a resume, and a jump to the last step
        ours, expected = ahead.get(first, 8, 8 if first < 32 else 0), micro_batches(data, first, 8, 2, 1, 2)
        assert len(ours) == len(expected) == 2
        for one, other in zip(ours, expected):
            assert np.array_equal(one.tokens, other.tokens) and np.array_equal(one.labels, other.labels)
            assert np.array_equal(one.documents, other.documents) and np.array_equal(one.sources, other.sources)
    assert set(asked) == {0, 8, 16, 24, 32} and asked.count(8) == 2  # read once for each time, never beyond the end


def test_what_fails_while_reading_ahead_is_raised(sources, monkeypatch):
    weights, _ = sources
    data = TrainData(weights, SEQ, 1)
    ahead = ReadAhead(partial(micro_batches, data, micro_batch_size=8, dp_rank=0, dp_size=1))
    plain = data.read

    def read(first, count):
        if first == 8:
            raise OSError(5, "Input/output error")
        return plain(first, count)

    monkeypatch.setattr(data, "read", read)
    ahead.get(0, 8, 8)
    with pytest.raises(OSError, match="Input/output"):
        ahead.get(8, 8, 0)


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_samples_named_at_once_have_the_digest_of_samples_named_one_by_one(sources, order, backend):
    """Checkpoints keep the digest: it is that of one update a sample, whose name is stated here once more."""
    data = TrainData(sources[0], SEQ, 1, order, 1200)
    digest = hashlib.blake2b(b"before", digest_size=16)
    for i in range(100, 1124):  # several epochs of every source
        sample = data.sample_id(i)
        (span,) = data.order.spans
        place, position = span.blend[i]
        window = int(span.orders[place].windows(position, 1)[0])
        epoch = window * SEQ // data.sources[sample.source].num_tokens
        assert sample == (place, epoch, window)
        digest.update(f"\n{data.fingerprints[sample.source]} {epoch} {window}".encode())
    assert chain_digest("before", data.sample_ids(100, 1024), data.fingerprints) == digest.hexdigest()


def test_digest_tells_samples_order_and_past_apart():
    a, b = SampleId(0, 0, 5), SampleId(1, 0, 5)
    digests = {
        chain_digest("", [a, b], ["x", "y"]),
        chain_digest("", [b, a], ["x", "y"]),
        chain_digest("", [a], ["x", "y"]),
        chain_digest("", [a, b], ["x", "z"]),
        chain_digest("0", [a, b], ["x", "y"]),
        chain_digest("", [SampleId(0, 1, 5), b], ["x", "y"]),
        chain_digest("", [SampleId(0, 0, 6), b], ["x", "y"]),
    }
    assert len(digests) == 7 and all(len(d) == 32 for d in digests)
    assert chain_digest("", [a, b], ["x", "y"]) == chain_digest("", [SampleId(1, 0, 5), SampleId(0, 0, 5)], ["y", "x"])


def test_megatron_order_ends_and_says_what_it_needs(sources):
    weights, _ = sources
    data = TrainData(weights, SEQ, 1, "megatron", 30)
    data.tokens(29)
    with pytest.raises(IndexError):
        data.tokens(30)
    with pytest.raises(ConfigError, match="E272"):
        TrainData(weights, SEQ, 1, "megatron", None)
    with pytest.raises(ConfigError, match="E273"):
        describe_samples(data, 29, 2)
    with pytest.raises(ConfigError, match="E273"):
        describe_samples(data, -1, 2)


def test_megatron_mix_stays_within_the_samples_built(tmp_path):
    prefixes = {str(tmp_path / str(k)): weight for k, weight in enumerate([1.0, 1.0, 3.0, 0.01])}
    for prefix in prefixes:
        write_dataset(prefix, [171])  # one sample an epoch, so none is built to spare
    for n in range(1, 60):
        data = TrainData(prefixes, 170, 1, "megatron", n)
        assert all(len(data.tokens(i)) == 171 for i in range(n))


def test_describe_samples(sources):
    weights, _ = sources
    data = TrainData(weights, SEQ, 1)
    for described in describe_samples(data, 7, 5):
        i = described["sample"]
        assert list(described) == ["sample", "source", "epoch", "window", "pieces"]
        assert [tuple(p.values()) for p in described["pieces"]] == data.locate(i)
        assert described["source"] == list(weights)[data.sample_id(i).source]


def test_sources_that_cannot_be_trained_on(tmp_path, adapter):
    write_dataset(tmp_path / "empty", [0, 0])
    adapter.write(str(tmp_path / "float"), [[[1.0, 2.0]]], np.float64)
    for name, number in (("empty", 45), ("float", 33), ("missing", 30)):
        with pytest.raises(DataError) as caught:
            TrainData({str(tmp_path / name): 1.0}, SEQ, 1)
        assert caught.value.number == number and name in str(caught.value)


@pytest.mark.parametrize("tokens", [2, 16, 17, 18, 32, 33, 34, 100])
def test_validation_reads_each_target_once(tmp_path, tokens):
    documents = write_dataset(tmp_path / "v", [tokens - 1, 0, 1])
    flat = [t for document in documents for t in document]
    data = ValidData("v", tmp_path / "v", SEQ)
    targets = []
    for j in range(len(data)):
        batch = data.read([j])
        window, loss_mask = batch.windows[0], batch.loss_weights[0]
        assert window.shape == (SEQ + 1,) and window.dtype == np.int64
        assert loss_mask.shape == (SEQ,) and loss_mask.dtype == np.float32
        real = int(loss_mask.sum())
        assert loss_mask[:real].all() and real > 0 and (real == SEQ or j == len(data) - 1)
        assert window[: real + 1].tolist() == flat[j * SEQ : j * SEQ + real + 1] and not window[real + 1 :].any()
        targets += window[1:][loss_mask == 1].tolist()
    assert targets == flat[1:]
    whole = data.read(range(len(data)))
    assert whole.documents is None
    for j in range(len(data)):
        one = data.read([j])
        assert np.array_equal(one.windows[0], whole.windows[j])
        assert np.array_equal(one.loss_weights[0], whole.loss_weights[j])
    assert len(ValidData("v", tmp_path / "v", SEQ, 1)) == 1
    with pytest.raises(IndexError):
        data.read([0, len(data)])


@pytest.mark.parametrize("seed", range(6))
def test_documents_of_validation_windows(tmp_path, adapter, seed):
    """Against a mark on each token; documents of several sequences, of none, and the padding at the end."""
    rng = np.random.default_rng(seed)
    documents = [[[7] * int(rng.integers(0, 12)) for _ in range(rng.integers(0, 4))] for _ in range(30)]
    adapter.write(str(tmp_path / "v"), documents, np.int32)
    marks = [i for i, document in enumerate(documents) for sequence in document for _ in sequence]
    data = ValidData("v", tmp_path / "v", SEQ, document_mask=True)
    expected = []
    for j in range(len(data)):
        window = (marks[j * SEQ : (j + 1) * SEQ] + [-1] * SEQ)[:SEQ]
        expected.append([len(list(group)) for _, group in itertools.groupby(window)])
        assert data.read([j]).documents.tolist() == [0, *np.cumsum(expected[-1])]
    several = data.read([2, 0, len(data) - 1]).documents
    assert several.dtype == np.int32
    assert several.tolist() == [0, *np.cumsum([*expected[2], *expected[0], *expected[-1]])]


def test_validation_set_without_a_target(tmp_path):
    for tokens in (0, 1):
        write_dataset(tmp_path / "v", [tokens])
        with pytest.raises(DataError, match="E345"):
            ValidData("v", tmp_path / "v", SEQ)


def test_tokenizer_check(tmp_path):
    record = TokenizerRecord("a" * 32, 300, path="made/with.model")
    write_dataset(tmp_path / "d", [50, 50], vocab_size=300, tokenizer=record)
    data = TrainData({str(tmp_path / "d"): 1.0}, SEQ, 1).sources[0]
    largest = data.max_token_id()
    assert check_tokenizer(data, "a" * 32, 300) is None
    with pytest.raises(RefusedError) as refused:
        check_tokenizer(data, "b" * 32, 300, "other.model of 300 ids")
    for part in (
        "E510",
        "made/with.model of 300 ids",
        "other.model of 300 ids",
        str(tmp_path / "d"),
        "a" * 32,
        "b" * 32,
        "tokenizer.path",
    ):
        assert part in str(refused.value)
    with pytest.raises(DataError, match=f"E341.*token id {largest}"):
        check_tokenizer(data, "a" * 32, largest)
    path_of(tmp_path / "d", ".meta.json").unlink()
    foreign = TrainData({str(tmp_path / "d"): 1.0}, SEQ, 1).sources[0]
    note = check_tokenizer(foreign, "b" * 32, largest + 1)
    assert note is not None and str(tmp_path / "d") in note
    with pytest.raises(DataError, match="E341"):
        check_tokenizer(foreign, "b" * 32, largest)


def test_the_order_of_naming_and_the_paths_do_not_matter(tmp_path: Path) -> None:
    """The same contents with the same weights give the same samples, however and wherever they are named."""
    rng = np.random.default_rng(3)
    for name in ("a", "b", "c"):
        tokens = rng.integers(0, 50, 400)
        for folder in ("here", "there"):
            with IndexedWriter(tmp_path / folder / f"{folder}-{name}", vocab_size=50) as writer:
                writer.add(tokens, [100, 300])
    weights = {"a": 1.0, "b": 2.0, "c": 2.0}  # equal weights make ties
    here = TrainData({str(tmp_path / "here" / f"here-{n}"): w for n, w in weights.items()}, 16, seed=1)
    backwards = reversed(weights.items())
    there = TrainData({str(tmp_path / "there" / f"there-{n}"): w for n, w in backwards}, 16, seed=1)
    for i in range(200):
        assert np.array_equal(here.tokens(i), there.tokens(i))


def test_more_sources_than_open_files(tmp_path: Path) -> None:
    """Datasets, and the indices that are kept of them, hold no descriptor: 300 of them under a limit of 100 more."""
    prefixes = {}
    for number in range(300):
        with IndexedWriter(tmp_path / f"d{number}", vocab_size=100) as writer:
            writer.add(np.full(40, number % 100), [40])
        prefixes[tmp_path / f"d{number}"] = 1.0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        data = TrainData(prefixes, 16, 1)
        assert sorted(set(data.read(0, 600).sources.tolist())) == list(range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- files that change under a run ----------------------------------------------------------------------------------


def _write_id(prefix: str, token: int, token_id: int) -> None:
    """Into .bin, as damage would."""
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * token)
        file.write(np.array([token_id], np.uint16).tobytes())


@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_an_id_beyond_the_vocabulary_is_named_with_its_document(sources, order, backend):
    """Under tensor parallelism such an id would be looked up as zeros and trained on in silence."""
    weights, documents = sources
    prefix = list(weights)[1]
    place = next(i for i, document in enumerate(documents[prefix]) if i > 20 and len(document) > 7)
    token = sum(map(len, documents[prefix][:place])) + 5
    _write_id(prefix, token, 60_000)
    path_of(prefix, ".meta.json").unlink()  # whose fingerprint sees all of so small a file
    data = TrainData(weights, SEQ, 1, order, 400, vocab_size=50_000)
    message = (
        rf"E341.*{prefix}.bin: token id 60000 \(token 5 of document {place}, token.*below the vocabulary's size 50000"
    )
    with pytest.raises(DataError, match=message):
        for first in range(0, 400, 8):
            data.read(first, 8)
    valid = ValidData("en", prefix, SEQ, vocab_size=50_000)
    with pytest.raises(DataError, match=message):
        valid.read(range(len(valid)))


def test_a_negative_id_is_refused_too(tmp_path):
    with IndexedWriter(tmp_path / "d", None) as writer:
        writer.add(np.arange(100, dtype=np.int64), np.array([60, 40], np.int64))
    with open(tmp_path / "d.bin", "r+b") as file:
        file.seek(4 * 61)
        file.write(np.array([-3], np.int32).tobytes())
    (tmp_path / "d.meta.json").unlink()
    data = TrainData({tmp_path / "d": 1}, SEQ, 1, vocab_size=100)
    with pytest.raises(DataError, match=r"token id -3 \(token 1 of document 1,"):
        data.read(0, 8)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("order", ["independent", "megatron"])
def test_a_file_that_is_cut_or_overwritten_under_a_run_is_named(sources, order, suffix, backend):
    weights, _ = sources
    prefix = next(iter(weights))
    path = path_of(prefix, f".{suffix}")
    content = path.read_bytes()

    def read_all(data):
        for first in range(0, 400, 8):
            data.read(first, 8)

    for change in (lambda: os.truncate(path, 0), lambda: path.open("r+b").write(bytes(len(content)))):
        path.write_bytes(content)
        os.utime(path, ns=(1, 1))
        data, valid = TrainData(weights, SEQ, 1, order, 400), ValidData("zh", prefix, SEQ)
        read_all(data)
        change()
        with pytest.raises(DataError, match=f"E350.*{path}"):
            read_all(data)
        with pytest.raises(DataError, match=f"E350.*{path}"):
            valid.read([0])


def test_an_index_that_is_overwritten_under_a_run_is_named_and_none_is_kept_of_a_changed_dataset(sources, monkeypatch):
    weights, _ = sources
    monkeypatch.setattr(IndexStore.__init__, "__defaults__", (lambda text: None, 1, 1.0))  # the smallest are kept too
    prefix = next(iter(weights))
    data = TrainData({prefix: 1}, SEQ, 1)
    data.read(0, 8)
    (kept,) = Path(f"{prefix}.index").glob("*.index")
    data = TrainData({prefix: 1}, SEQ, 1)
    data.read(0, 8)
    with open(kept, "r+b") as file:
        file.write(b"HMRINDEX")
    with pytest.raises(DataError, match=f"E350.*{kept}"):
        data.read(8, 8)
    kept.unlink()
    data = TrainData({prefix: 1}, SEQ, 1)
    path_of(prefix, ".idx").open("r+b").write(b"MMIDIDX")
    with pytest.raises(DataError, match=f"E350.*{prefix}.idx"):
        data.read(0, 8)
    assert not list(Path(f"{prefix}.index").glob("*.index"))
