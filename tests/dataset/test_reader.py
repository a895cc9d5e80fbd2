"""The files: golden bytes, round trips, damage of every kind, and publishing whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_hammer.base.errors import DataError
from megatron_hammer.dataset import reader
from megatron_hammer.dataset import writer as writer_module
from megatron_hammer.dataset.format import DatasetHeader, SourceRecord, TokenizerRecord, dtype_for, path_of
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from tests.dataset.written import write_dataset

# Documents [1 2 3], [], [65499] as uint16, written out by hand from the description of the format.
GOLDEN_BIN = bytes.fromhex("0100 0200 0300 dbff")
GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX\0\0
    "0100000000000000 08"  # version 1, dtype code 8
    "0200000000000000 0400000000000000"  # 2 sequences, 3 + 1 document boundaries
    "03000000 01000000"  # lengths
    "0000000000000000 0600000000000000"  # byte offsets
    "0000000000000000 0100000000000000 0100000000000000 0200000000000000"  # documents
)


@pytest.fixture
def golden(tmp_path):
    prefix = tmp_path / "golden"
    with IndexedWriter(prefix, vocab_size=65_500, dtype=np.uint16) as writer:
        writer.add(np.array([1, 2, 3, 65_499]), np.array([3, 0, 1]))
    return prefix


def files(prefix):
    return {suffix: path_of(prefix, suffix).read_bytes() for suffix in (".bin", ".idx", ".meta.json")}


def test_golden_bytes(golden):
    assert files(golden)[".bin"] == GOLDEN_BIN
    assert files(golden)[".idx"] == GOLDEN_IDX


def test_reading_golden_bytes_without_a_header(tmp_path):
    (tmp_path / "g.bin").write_bytes(GOLDEN_BIN)
    (tmp_path / "g.idx").write_bytes(GOLDEN_IDX)
    dataset = IndexedDataset(tmp_path / "g")
    assert dataset.header is None and dataset.dtype == np.uint16
    assert (dataset.num_tokens, dataset.num_sequences, dataset.num_documents) == (4, 2, 3)
    assert dataset.lengths.tolist() == [3, 1] and dataset.pointers.tolist() == [0, 6]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2]
    assert dataset.read(0).tolist() == [1, 2, 3] and dataset.read(1).tolist() == [65_499]
    assert dataset.read(0, 1).tolist() == [2, 3] and dataset.read(0, 1, 1).tolist() == [2]
    assert dataset.document_lengths.tolist() == [3, 0, 1]
    assert dataset.first_sequences(np.array([0, 2])).tolist() == [0, 1] and dataset.document_of(1) == (2, 0)
    assert dataset.max_token_id() == 65_499
    with pytest.raises(AssertionError):
        dataset.read(0, 2, 2)


def test_dtype_follows_megatrons_threshold():
    assert dtype_for(65_499) == np.uint16
    assert dtype_for(65_500) == np.int32 and dtype_for(None) == np.int32


@pytest.mark.parametrize("vocab_size", [300, 105_789])
def test_round_trip_in_batches(tmp_path, vocab_size):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, rng.integers(0, 50)) for _ in range(500)]
    with IndexedWriter(tmp_path / "d", vocab_size) as writer:
        for first in range(0, 500, 77):
            batch = documents[first : first + 77]
            writer.add(np.concatenate(batch), np.array([len(d) for d in batch]))
        writer.add(np.empty(0, np.int32), np.empty(0, np.int64))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.num_documents == 500 and dataset.document_lengths.tolist() == [len(d) for d in documents]
    filled = [d.tolist() for d in documents if len(d)]
    assert [dataset.read(k).tolist() for k in range(dataset.num_sequences)] == filled
    assert dataset.max_token_id() == max(map(max, filled)) == dataset._scanned_max_token_id
    one_go = write_all(tmp_path / "once", documents, vocab_size)
    assert files(tmp_path / "d") == files(one_go)  # batches leave no trace, the header included
    assert not list(tmp_path.glob("*tmp*"))


def write_all(prefix, documents, vocab_size):
    with IndexedWriter(prefix, vocab_size) as writer:
        writer.add(np.concatenate(documents), np.array([len(d) for d in documents]))
    return prefix


def test_documents_of_several_sequences(tmp_path):
    with IndexedWriter(tmp_path / "d", 100) as writer:
        writer.add(np.arange(9), np.array([2, 3, 0, 4]), np.array([2, 0, 2]))
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset.document_indices.tolist() == [0, 2, 2, 4]
    assert dataset.document_lengths.tolist() == [5, 0, 4] and dataset.document_lengths.dtype == np.int64
    assert [dataset.document_of(s) for s in (0, 1, 3)] == [(0, 0), (0, 2), (2, 0)]
    assert dataset.first_sequences(np.array([0, 2])).tolist() == [0, 2]


def test_an_empty_dataset_can_be_read(tmp_path):
    with IndexedWriter(tmp_path / "d", 100):
        pass
    dataset = IndexedDataset(tmp_path / "d")
    assert (dataset.num_tokens, dataset.num_documents, dataset.max_token_id()) == (0, 0, -1)
    assert len(dataset.fingerprint) == 32


def test_many_chunks(tmp_path, monkeypatch):
    for module in (reader, writer_module):
        monkeypatch.setattr(module, "_CHUNK", 7)  # pointers, checks and copies in several rounds
    monkeypatch.setattr(writer_module, "HASH_BLOCK_BYTES", 50)
    lengths = np.random.default_rng(0).integers(0, 9, 100)
    documents = write_dataset(tmp_path / "d", lengths)
    dataset = IndexedDataset(tmp_path / "d")
    assert [dataset.read(k).tolist() for k in range(dataset.num_sequences)] == [d for d in documents if d]
    import xxhash

    content = (tmp_path / "d.bin").read_bytes()
    blocks = [content[k : k + 50] for k in range(0, len(content), 50)]
    assert list(dataset.header.block_hashes) == [xxhash.xxh3_128_hexdigest(block) for block in blocks]
    assert dataset.header.idx_hash == xxhash.xxh3_128_hexdigest((tmp_path / "d.idx").read_bytes())

    monkeypatch.setattr(writer_module, "_BYTES_AT_ONCE", 40)  # the system is asked to write out part by part
    parts: list[tuple[int, int]] = []
    monkeypatch.setattr(writer_module, "begin_to_write_out", lambda _, first, count: parts.append((first, count)))
    with IndexedWriter(tmp_path / "e", 50_000) as writer:
        for document in documents:
            writer.add(np.array(document, np.int64), np.array([len(document)]))
    assert (tmp_path / "e.bin").read_bytes() == content
    ends = np.cumsum([count for _, count in parts]).tolist()
    assert [first for first, _ in parts] == [0, *ends[:-1]] and len(content) - 40 < ends[-1] <= len(content)
    assert all(40 <= count < 40 + 2 * lengths.max() for _, count in parts)


def test_header_round_trip(golden):
    text = files(golden)[".meta.json"].decode()
    header = DatasetHeader.from_json(text)
    assert header.to_json() == text
    record = TokenizerRecord("f" * 32, 65_500, bos_id=1, eos_id=2)
    full = DatasetHeader(**{**vars(header), "tokenizer": record, "sources": (SourceRecord("a", 3, 4),)})
    assert DatasetHeader.from_json(full.to_json()) == full


def test_fingerprint_is_of_the_content(tmp_path):
    write_dataset(tmp_path / "a", [5, 6, 7])
    write_dataset(tmp_path / "b", [5, 6, 7], tokenizer=TokenizerRecord("x", 50_000))
    write_dataset(tmp_path / "c", [5, 7, 6])
    write_dataset(tmp_path / "d", [5, 6, 7], seed=1)
    prints = [IndexedDataset(tmp_path / name).fingerprint for name in "abcd"]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    (tmp_path / "a.meta.json").unlink()  # losing the header must not change the order of samples
    assert IndexedDataset(tmp_path / "a").fingerprint == prints[0]


def raises(number, function, *args, **kwargs):
    with pytest.raises(DataError) as caught:
        function(*args, **kwargs)
    assert caught.value.number == number, caught.value
    return str(caught.value)


def test_missing_and_strange_files(golden, tmp_path):
    assert "prefix" in raises(30, IndexedDataset, tmp_path / "nothing")
    assert "prefix" in raises(30, IndexedDataset, f"{golden}.idx")
    (tmp_path / "golden.bin").unlink()
    raises(30, IndexedDataset, golden)
    (tmp_path / "golden.bin").mkdir()
    raises(30, IndexedDataset, golden)
    os.mkfifo(tmp_path / "fifo.idx")
    raises(30, IndexedDataset, tmp_path / "fifo")  # and does not wait for a writer


def patch_file(path, at, data):
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("number", "at", "data"),
    [
        (31, 0, b"X"),
        (32, 9, b"\2"),
        (33, 17, b"\0"),
        (33, 17, b"\x09"),
        (34, 18, b"\3"),  # sequences
        (34, 18, b"\xff" * 8),
        (34, 26, b"\xff" * 8),  # document boundaries
        (35, 34, struct.pack("<i", -1)),
        (35, 34, struct.pack("<i", -(2**31))),
        (36, 34, struct.pack("<i", 2)),  # then the second sequence begins elsewhere
        (36, 42, struct.pack("<q", -2)),
        (36, 50, struct.pack("<q", 2**62)),
        (38, 38, struct.pack("<i", 2**31 - 1)),  # the last length: only .bin can tell
        (37, 58, struct.pack("<q", 1)),
        (37, 66, struct.pack("<q", 3)),
        (37, 66, struct.pack("<q", -1)),
        (37, 82, struct.pack("<q", 3)),
    ],
)
def test_damaged_index(golden, number, at, data):
    path_of(golden, ".meta.json").unlink()
    patch_file(path_of(golden, ".idx"), at, data)
    assert "golden" in raises(number, IndexedDataset, golden)


@pytest.mark.parametrize("size", [0, 8, 33, 34, 40, 89])
def test_cut_index(golden, size):
    os.truncate(f"{golden}.idx", size)
    raises(31 if size < 34 else 34, IndexedDataset, golden)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_cut_tokens(golden, size):
    os.truncate(f"{golden}.bin", size)
    raises(38, IndexedDataset, golden)


MUTANTS = int(os.environ.get("HAMMER_MUTANTS", "400"))


@settings(
    deadline=None,
    max_examples=MUTANTS,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_fuzzed_index_gives_a_dataset_or_a_data_error(tmp_path, data):
    content = bytearray(GOLDEN_IDX)
    kind = data.draw(st.sampled_from(["bytes", "cut", "grow", "random"]))
    if kind == "bytes":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content))) :]
    elif kind == "grow":
        content += data.draw(st.binary(max_size=40))
    else:
        content[9:] = data.draw(st.binary(max_size=120))
    (tmp_path / "f.idx").write_bytes(content)
    (tmp_path / "f.bin").write_bytes(GOLDEN_BIN)
    try:
        dataset = IndexedDataset(tmp_path / "f")
    except DataError:
        return
    assert sum(len(dataset.read(k)) for k in range(dataset.num_sequences)) == dataset.num_tokens
    assert dataset.document_lengths.sum() == dataset.num_tokens


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": 3},
        {"version": None},
        {"tokens": "4"},
        {"tokens": -4},
        {"tokens": True},
        {"block_hashes": [1]},
        {"sources": ["a"]},
        {"sources": [{"path": "a"}]},
        {"tokenizer": {}},
        {"tokenizer": []},
        {"options": None},
        {"dtype": None},
    ],
)
def test_malformed_header(golden, change):
    path = path_of(golden, ".meta.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "meta.json" in raises(39, IndexedDataset, golden)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", "\xff"])
def test_header_that_is_no_json_object(golden, text):
    path_of(golden, ".meta.json").write_text(text, encoding="latin-1")
    raises(39, IndexedDataset, golden)


def test_header_of_other_files(golden, tmp_path):
    path = path_of(golden, ".meta.json")
    for name, value in (("tokens", 5), ("documents", 2), ("dtype", "int32"), ("bin_bytes", 9)):
        original = path.read_text()
        path.write_text(json.dumps(json.loads(original) | {name: value}))
        assert name in raises(40, IndexedDataset, golden)
        path.write_text(original)
    patch_file(path_of(golden, ".bin"), 0, b"\7")  # same sizes, other content
    raises(40, lambda: IndexedDataset(golden).fingerprint)


def test_negative_and_floating_tokens(tmp_path, adapter):
    adapter.write(str(tmp_path / "n"), [[[1, -2, 3]]], np.int32)
    assert "token 1 is -2" in raises(41, IndexedDataset(tmp_path / "n").max_token_id)
    adapter.write(str(tmp_path / "f"), [[[1.5]]], np.float32)
    raises(33, IndexedDataset(tmp_path / "f").max_token_id)


# ---- writing ----


@pytest.mark.parametrize("ids", [[100], [-1], [65_536], [70_000], [2**40]])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, ids):
    with IndexedWriter(tmp_path / "d", 100) as writer:
        writer.add(np.array([1, 2]), np.array([1, 1]))
        message = raises(41, writer.add, np.array([5, *ids]), np.array([1, 1]))
        assert f"{ids[0]} in document 3" in message and "[0, 99]" in message


def test_a_sequence_beyond_the_format_is_refused(tmp_path, monkeypatch):
    with IndexedWriter(tmp_path / "d", 100) as writer:
        huge = np.broadcast_to(np.uint8(1), 2**31)  # one byte of memory
        raises(46, writer.add, huge, np.array([2**31]))


def test_failure_leaves_the_old_dataset(tmp_path):
    write_dataset(tmp_path / "d", [3, 4])
    before = files(tmp_path / "d")
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "d", 50_000) as writer:
        writer.add(np.arange(10), np.array([10]))
        assert files(tmp_path / "d") == before
        raise RuntimeError
    assert files(tmp_path / "d") == before and len(list(tmp_path.iterdir())) == 3


def test_failing_disk_leaves_the_old_dataset(tmp_path, monkeypatch):
    write_dataset(tmp_path / "d", [3, 4])
    before = files(tmp_path / "d")

    def fail(_):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), IndexedWriter(tmp_path / "d", 50_000) as writer:
        writer.add(np.arange(10), np.array([10]))
        monkeypatch.setattr(os, "fsync", fail)
    assert files(tmp_path / "d") == before and len(list(tmp_path.iterdir())) == 3


def test_publishing_order(tmp_path, monkeypatch):
    """At every step: no index, or an index that belongs to the tokens beside it."""
    write_dataset(tmp_path / "d", [3, 4])
    steps = []

    def look(name, function):
        def wrapper(*args, **kwargs):
            result = function(*args, **kwargs)
            if (tmp_path / "d.idx").exists():
                dataset = IndexedDataset(tmp_path / "d")
                assert dataset.fingerprint and dataset.header is not None
            steps.append((name, sorted(p.name for p in tmp_path.iterdir())))
            return result

        return wrapper

    with IndexedWriter(tmp_path / "d", 50_000) as writer:
        writer.add(np.arange(10), np.array([10]))
        monkeypatch.setattr(os, "replace", look("replace", os.replace))
        monkeypatch.setattr(type(tmp_path), "unlink", look("unlink", type(tmp_path).unlink))
    assert [name for name, _ in steps] == ["unlink", "replace", "replace", "unlink", "replace"]
    assert steps[-1][1] == ["d.bin", "d.idx", "d.meta.json"]
    assert "d.idx" not in steps[0][1] and "d.bin.tmp" in steps[0][1]
    monkeypatch.undo()
    assert IndexedDataset(tmp_path / "d").num_tokens == 10


def test_two_writers_of_one_dataset(tmp_path):
    with IndexedWriter(tmp_path / "d", 100) as writer:
        assert "another process" in raises(42, IndexedWriter, tmp_path / "d", 100)
        writer.add(np.array([1]), np.array([1]))
    assert IndexedDataset(tmp_path / "d").num_tokens == 1
    write_dataset(tmp_path / "d", [2])  # and again, once the first is done


KILLED = """
import sys, time, numpy as np
from megatron_hammer.dataset.writer import IndexedWriter
with IndexedWriter(sys.argv[1], 100) as writer:
    for _ in range(10**6):
        writer.add(np.ones(1000, np.int64), np.array([1000]))
        print("x", flush=True)
"""


def test_killed_writer_leaves_the_old_dataset_and_no_lock(tmp_path):
    write_dataset(tmp_path / "d", [3, 4])
    before = files(tmp_path / "d")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "d")], stdout=subprocess.PIPE)
    process.stdout.read(100)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert files(tmp_path / "d") == before
    write_dataset(tmp_path / "d", [7])  # overwrites what the killed one left
    assert IndexedDataset(tmp_path / "d").num_tokens == 7 and len(list(tmp_path.iterdir())) == 3


def test_memory_does_not_grow_with_the_number_of_documents(tmp_path):
    import tracemalloc

    lengths, tokens = np.full(20_000, 4), np.ones(80_000, np.int64)
    with IndexedWriter(tmp_path / "d", 100) as writer:
        writer.add(tokens, lengths)
        tracemalloc.start()
        started = time.monotonic()
        for _ in range(20):
            writer.add(tokens, lengths)
        current, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert current < 200_000 and peak < 4_000_000, (current, peak)  # 400,000 documents in lists: 40 MB
        assert time.monotonic() - started < 10
    assert IndexedDataset(tmp_path / "d").num_documents == 420_000


def test_a_missing_dataset_names_what_is_meant(tmp_path: Path) -> None:
    for name in ("zh_text_document", "en_text_document"):
        for suffix in (".bin", ".idx"):
            (tmp_path / f"{name}{suffix}").touch()
    (tmp_path / "zh.jsonl").touch()
    for named, cure in (
        ("zh", "did you mean {}/zh_text_document?"),
        ("zh_text_documnet", "did you mean {}/zh_text_document?"),
        ("zh_text_document.bin", "name the prefix without the suffix: {}/zh_text_document"),
        ("zh_text_document.idx", "name the prefix without the suffix: {}/zh_text_document"),
        ("zh.jsonl", "{0}/zh.jsonl is no dataset: make one with tools/preprocess_data.py --input {0}/zh.jsonl"),
        ("", "is a folder: name datasets in it, such as {0}/en_text_document, {0}/zh_text_document"),
        ("qqqqqqqqq", "give the prefix P of P.bin and P.idx"),
    ):
        with pytest.raises(DataError) as error:
            IndexedDataset(tmp_path / named if named else tmp_path)
        assert cure.format(tmp_path) in str(error.value), named
