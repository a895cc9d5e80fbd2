"""Joined datasets: as one writer would have written them, as Megatron-LM joins them, refused where they do not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.dataset import reader
from megatron_hammer.dataset import writer as writer_module
from megatron_hammer.dataset.format import SourceRecord, TokenizerRecord, path_of
from megatron_hammer.dataset.make import merge
from megatron_hammer.dataset.make.merge import merge_datasets
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from tests.dataset.written import write_dataset

TOOL = Path(__file__).parents[3] / "tools" / "merge_datasets.py"


def files(prefix, suffixes=(".bin", ".idx")):
    return {suffix: path_of(prefix, suffix).read_bytes() for suffix in suffixes}


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_the_result_is_what_one_writer_writes(tmp_path, monkeypatch, chunk):
    for module in (reader, writer_module):
        monkeypatch.setattr(module, "_CHUNK", chunk)  # several rounds
    monkeypatch.setattr(writer_module, "HASH_BLOCK_BYTES", 50)
    lengths = [[5, 0, 7], [0], [1, 2, 0], [9]]
    parts = [write_dataset(tmp_path / str(k), part, seed=k) for k, part in enumerate(lengths)]
    with IndexedWriter(tmp_path / "all", 50_000) as writer:
        for part, documents in zip(lengths, parts):
            writer.add(np.array([t for document in documents for t in document], np.int64), np.array(part))
    summary = merge_datasets([tmp_path / str(k) for k in range(4)], tmp_path / "m")
    assert (summary.datasets, summary.documents, summary.tokens) == (4, 8, 24) and summary.notes == []
    assert files(tmp_path / "m") == files(tmp_path / "all")
    ours, whole = IndexedDataset(tmp_path / "m"), IndexedDataset(tmp_path / "all")
    assert ours.fingerprint == whole.fingerprint and ours.max_token_id() == whole.max_token_id()
    assert ours.header.block_hashes == whole.header.block_hashes and ours.header.idx_hash == whole.header.idx_hash


@pytest.mark.parametrize("headers", [True, False])
def test_documents_of_several_sequences_with_and_without_headers(tmp_path, adapter, headers):
    rng = np.random.default_rng(0)
    parts = [
        [[rng.integers(0, 9000, rng.integers(0, 5)).tolist() for _ in range(k % 4)] for k in range(20)]
        for _ in range(3)
    ]
    for k, documents in enumerate(parts):
        adapter.write(str(tmp_path / str(k)), documents, np.int32)
        if not headers:
            path_of(tmp_path / str(k), ".meta.json").unlink(missing_ok=True)
    adapter.write(str(tmp_path / "all"), [document for part in parts for document in part], np.int32)
    merge_datasets([tmp_path / str(k) for k in range(3)], tmp_path / "m")
    assert files(tmp_path / "m") == files(tmp_path / "all")
    merged = IndexedDataset(tmp_path / "m")
    assert merged.max_token_id() == merged._scanned_max_token_id and merged.header.max_token_id is not None


def test_megatron_joins_them_to_the_same_bytes(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for k in range(3):
        write_dataset(tmp_path / str(k), np.random.default_rng(k).integers(0, 30, 100), seed=k, vocab_size=70_000)
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for k in range(3):
        builder.add_index(str(tmp_path / str(k)))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merge_datasets([tmp_path / str(k) for k in range(3)], tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize("together", [5, 1 << 22])
def test_token_types(tmp_path, adapter, monkeypatch, together):
    monkeypatch.setattr(merge, "_TOKENS_TOGETHER", together)
    small = write_dataset(tmp_path / "small", [4, 0, 9, 3], vocab_size=300)
    large = write_dataset(tmp_path / "large", [2, 6], vocab_size=70_000, seed=1)
    with pytest.raises(DataError, match=r"E356.*large.*int32.*small.*uint16.*--dtype"):
        merge_datasets([tmp_path / "small", tmp_path / "large"], tmp_path / "m")
    merge_datasets([tmp_path / "small", tmp_path / "large"], tmp_path / "m", np.int32)
    merged = IndexedDataset(tmp_path / "m")
    assert merged.dtype == np.int32 and merged.num_documents == 6
    assert merged.document_lengths.tolist() == [4, 0, 9, 3, 2, 6]
    assert merged.tokens.tolist() == [t for document in small + large for t in document]
    with pytest.raises(DataError, match="E341"):  # an id that the smaller type does not hold
        merge_datasets([tmp_path / "small", tmp_path / "large"], tmp_path / "n", "uint16")
    adapter.write(str(tmp_path / "float"), [[[1.5]]], np.float32)
    with pytest.raises(DataError, match="E356"):
        merge_datasets([tmp_path / "small", tmp_path / "float"], tmp_path / "n", "float32")
    assert not list(tmp_path.glob("n.*"))


def test_tokenizers(tmp_path):
    one = TokenizerRecord("a" * 32, 300, eos_id=2, path="one.model")
    other = TokenizerRecord("b" * 32, 300)
    for name, record in (("a", one), ("b", one), ("c", other), ("d", None)):
        with IndexedWriter(tmp_path / name, 300, tokenizer=record, options={"json_key": "text"}) as writer:
            writer.add(np.array([1, 2]), np.array([2]))
            writer.sources.append(SourceRecord(f"{name}.jsonl", 10, 1))
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "m")
    header = IndexedDataset(tmp_path / "m").header
    assert header.tokenizer == one and [source.path for source in header.sources] == ["a.jsonl", "b.jsonl"]
    assert header.options == {"json_key": "text", "merged": [str(tmp_path / "a"), str(tmp_path / "b")]}
    with pytest.raises(RefusedError, match=r"E536.*an unnamed .*bbbb.*one\.model of 300 ids .*aaaa"):
        merge_datasets([tmp_path / "d", tmp_path / "a", tmp_path / "c"], tmp_path / "n")
    summary = merge_datasets([tmp_path / "a", tmp_path / "d"], tmp_path / "n")
    assert IndexedDataset(tmp_path / "n").header.tokenizer is None and str(tmp_path / "d") in summary.notes[0]


def test_the_output_is_no_input_and_appears_whole(tmp_path):
    write_dataset(tmp_path / "a", [3])
    write_dataset(tmp_path / "m", [4])
    before = files(tmp_path / "m", (".bin", ".idx", ".meta.json"))
    with pytest.raises(ConfigError, match="E284"):
        merge_datasets([tmp_path / "a", tmp_path / "m"], tmp_path / "x" / ".." / "m")
    with pytest.raises(DataError, match="E330"):
        merge_datasets([tmp_path / "a", tmp_path / "missing"], tmp_path / "m")
    assert files(tmp_path / "m", (".bin", ".idx", ".meta.json")) == before
    notes = merge_datasets([tmp_path / "a", tmp_path / "m", tmp_path / "a"], tmp_path / "twice").notes
    assert any("a is named 2 times, and its documents are in the result as often" in note for note in notes)
    for suffix in (".bin", ".idx", ".meta.json"):
        path_of(tmp_path / "twice", suffix).unlink()
    assert len(list(tmp_path.iterdir())) == 6


def test_a_dataset_that_is_cut_while_it_is_read(tmp_path, monkeypatch):
    write_dataset(tmp_path / "a", [300])
    opened = IndexedDataset(tmp_path / "a")
    (tmp_path / "a.bin").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"E338.*shorter"), IndexedWriter(tmp_path / "m", dtype=opened.dtype) as writer:
        writer.append(opened)
    assert not list(tmp_path.glob("m.*"))


def test_the_program(tmp_path):
    for name in "ab":
        write_dataset(tmp_path / name, [3, 4], tokenizer=TokenizerRecord(name * 32, 50_000) if name == "a" else None)
    done = subprocess.run(
        [sys.executable, TOOL, "a", "b", "--output", "m"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == "m: 2 datasets, 4 documents, 14 tokens\n"
    assert done.stderr.startswith("b: not known")
    done = subprocess.run(
        [sys.executable, TOOL, "a", "b", "--output", "a"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("error[E284]")
