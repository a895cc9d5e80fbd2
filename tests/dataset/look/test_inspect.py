"""Statistics and documents as people see them, and the tool that prints them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, RefusedError
from megatron_hammer.dataset.look import inspect, places
from megatron_hammer.dataset.look.inspect import (
    describe_dataset,
    describe_document,
    describe_lengths,
    format_document,
    format_stats,
)
from megatron_hammer.dataset.look.matching import load_matching
from megatron_hammer.dataset.look.places import document_of_token, document_spans, document_starts
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.tokenizer.spelling import Speller
from tests.dataset.inspected import (  # noqa: F401  the fixtures
    random_texts,
    tokenizer,
    tokenizers,
    write_documents,
    write_texts,
)
from tests.dataset.written import write_dataset

REPOSITORY = Path(__file__).parents[3]


def write_sequences(prefix):
    """Documents of 0 to 3 sequences; returns their lengths."""
    rng = np.random.default_rng(0)
    sequences = rng.integers(0, 4, 200)
    lengths = rng.integers(1, 30, int(sequences.sum()))
    with IndexedWriter(prefix, 100) as writer:
        writer.add(rng.integers(0, 100, int(lengths.sum())), lengths, sequences)
    ends = np.append(0, np.cumsum(lengths))[np.append(0, np.cumsum(sequences))]
    return np.diff(ends)


def test_where_documents_lie(tmp_path):
    lengths = write_sequences(tmp_path / "d")
    dataset = IndexedDataset(tmp_path / "d")
    starts = np.append(0, np.cumsum(lengths))
    assert np.array_equal(document_starts(dataset, 0, 200), starts)
    assert np.array_equal(document_starts(dataset, 150, 50), starts[150:])
    some = np.array([199, 3, 3, 0])
    begin, end = document_spans(dataset, some)
    assert np.array_equal(begin, starts[some]) and np.array_equal(end, starts[some + 1])
    owner = np.repeat(np.arange(200), lengths)
    for token in range(len(owner)):
        assert document_of_token(dataset, token) == (owner[token], token - starts[owner[token]])


@pytest.mark.parametrize("counted", [1 << 20, 8])
def test_lengths_are_exact(tmp_path, monkeypatch, counted):
    """As NumPy sees them all at once; with few counted one by one and few documents at a time too."""
    monkeypatch.setattr(inspect, "_COUNTED_LENGTH", counted)
    monkeypatch.setattr(places.iterate_starts, "__defaults__", (7,))
    lengths = write_sequences(tmp_path / "d")
    found = describe_lengths(IndexedDataset(tmp_path / "d"))
    assert found["mean"] == pytest.approx(lengths.mean()) and found["empty"] == (lengths == 0).sum()
    assert found["median"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert found["p99"] == np.quantile(lengths, 0.99, method="inverted_cdf")
    assert found["longest"] == lengths.max()
    for first, last, count in found["histogram"]:
        assert count == ((first <= lengths) & (lengths <= last)).sum()
    assert sum(count for *_, count in found["histogram"]) == 200


def test_tokens_of_each_source(tmp_path, tokenizers):  # noqa: F811
    documents = [[5] * n for n in (3, 0, 4, 1, 1, 9)]
    write_documents(tmp_path / "d", documents, tokenizers["sentencepiece"], {"a.jsonl": 3, "none": 0, "b.jsonl": 3})
    facts = describe_dataset(IndexedDataset(tmp_path / "d"))
    assert [source["tokens"] for source in facts["sources"]] == [7, 0, 11]
    text = format_stats(facts)
    assert "median 1, p99 9, longest 9, empty 1" in text and "path b.jsonl" in text and "tokens 11" in text
    histogram = [line.split() for line in text.splitlines()[-5:]]
    assert histogram == [["0", "#" * 20, "1"], ["1", "#" * 40, "2"], ["2-3", "#" * 20, "1"], ["4-7", "#" * 20, "1"],
                         ["8-15", "#" * 20, "1"]]  # fmt: skip
    write_documents(tmp_path / "d", [], None)
    assert "longest 0" in format_stats(describe_dataset(IndexedDataset(tmp_path / "d")))


def test_documents_as_text(tmp_path, tokenizer):  # noqa: F811
    texts = random_texts(30, seed=8)
    documents = write_texts(tmp_path / "d", texts, tokenizer, sources={"a.jsonl": 10, "b.jsonl": 20})
    dataset, speller = IndexedDataset(tmp_path / "d"), Speller(tokenizer)
    for number, (text, ids) in enumerate(zip(texts, documents)):
        facts = describe_document(dataset, number, (0, 10**6), speller)
        assert facts["text"] == text.replace("\u2581", " " if tokenizer.kind == "sentencepiece" else "\u2581") + "<eos>"
        assert facts["ids"] == ids and facts["tokens"] == len(ids) and facts["special"] == {"eos": 1}
        source = ("a.jsonl", number) if number < 10 else ("b.jsonl", number - 10)
        assert facts["source"] == {"path": source[0], "document": source[1]}
        marked = describe_document(dataset, number, (2, 5), speller, pieces=True)
        assert marked["ids"] == ids[2:5] and marked["text"].count("\u2502") == max(0, len(ids[2:5]) - 1)
    without = describe_document(dataset, 3, (0, 4), None)
    assert without["text"] is None and without["ids"] == documents[3][:4]
    shown = format_document("d", without)
    assert f"{len(documents[3]) - 4:,} more tokens; --tokens 4:" in shown and "text" not in shown
    for number, span in ((-1, (0, 4)), (30, (0, 4)), (0, (4, 4))):
        with pytest.raises(ConfigError, match="E295"):
            describe_document(dataset, number, span, speller)


def test_another_tokenizer_is_refused(tmp_path, tokenizers):  # noqa: F811
    spm, byte_level = tokenizers["sentencepiece"], tokenizers["byte-level"]
    write_texts(tmp_path / "d", ["one"], spm)
    assert load_matching(IndexedDataset(tmp_path / "d"), spm.path).fingerprint == spm.fingerprint
    with pytest.raises(RefusedError, match="E510"):
        load_matching(IndexedDataset(tmp_path / "d"), byte_level.path)


# ---- the tool, as a user calls it ----


def call(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "tools" / "inspect_dataset.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60)


@pytest.fixture
def folder(tmp_path, tokenizers):  # noqa: F811
    texts = random_texts(40, seed=9)
    write_texts(tmp_path / "d", [*texts, "the world model"], tokenizers["sentencepiece"])
    write_dataset(tmp_path / "foreign", [30, 4])
    model = {"hidden_size": 8, "ffn_hidden_size": 8, "num_layers": 1, "num_attention_heads": 1}
    config = {"model": model, "data": {"train": {"d": 2, "foreign": 1}, "seq_length": 16, "weights": "epochs"},
              "train": {"num_steps": 5, "global_batch_size": 4}}  # fmt: skip
    (tmp_path / "c.yaml").write_text(json.dumps(config))  # JSON is YAML
    (tmp_path / "h.jsonl").write_text('{"text": "the world model"}\n{"text": "something else"}\n')
    return tmp_path


def test_stats_show_and_find(folder, tokenizers):  # noqa: F811
    spm = tokenizers["sentencepiece"].path
    stats = call(folder, "stats", "d", "foreign", "--json")
    lines = [json.loads(line) for line in stats.stdout.splitlines()]
    assert [line["documents"] for line in lines] == [41, 2] and lines[1]["lengths"]["longest"] == 30
    shown = call(folder, "show", "d", 40, 0, "--tokenizer", spm)
    assert shown.returncode == 0 and "the world model<eos>" in shown.stdout and "document 0 of d" in shown.stdout
    ids = call(folder, "show", "d", 40, "--tokens", "0:2", "--json")
    assert len(json.loads(ids.stdout)["ids"]) == 2
    found = call(folder, "find", "d", "the world mod", "--tokenizer", spm)
    assert found.stdout.startswith("document 40, token 0: >>the world mod") and "\n1 found: " in found.stdout
    three = call(folder, "find", "d", "o", "--tokenizer", spm, "--limit", 3, "--json")
    assert len([json.loads(line) for line in three.stdout.splitlines()]) == 3


def test_verify_ends_with_its_verdict(folder, tokenizers):  # noqa: F811
    spm = tokenizers["sentencepiece"].path
    sound = call(folder, "verify", "d", "--tokenizer", spm)
    assert sound.returncode == 0 and sound.stdout.endswith("d: sound\n") and sound.stderr == ""
    assert "scripts         Han" in sound.stdout
    tainted = call(folder, "verify", "d", "--tokenizer", spm, "--held-out", "h.jsonl", "--json")
    report = json.loads(tainted.stdout)
    assert tainted.returncode == 5 and tainted.stderr.startswith("error[E538]") and report["sound"] is False
    assert report["held_out"]["h.jsonl"]["documents_found"] == 1
    content = bytearray((folder / "d.bin").read_bytes())
    content[5] ^= 1
    (folder / "d.bin").write_bytes(content)
    damaged = call(folder, "verify", "d", "--held-out", "d")
    assert damaged.returncode == 3 and damaged.stderr.startswith("error[E370]") and damaged.stderr.count("\n") == 1
    assert "PROBLEM: d.bin: block 0" in damaged.stdout and "PROBLEM: 41 of the 41 documents" in damaged.stdout


def test_order_by_step_and_by_document_and_the_plan(folder):
    step = json.loads(call(folder, "order", "c.yaml", "--step", 3, "--json").stdout)
    assert [sample["sample"] for sample in step] == [8, 9, 10, 11]
    piece = step[1]["pieces"][0]
    asked = f"{step[1]['source']}:{piece['document']}"
    reads = json.loads(call(folder, "order", "c.yaml", "--document", asked, "--json").stdout)
    assert {"step": 3, "sample": 9} in [{key: read[key] for key in ("step", "sample")} for read in reads]
    table = call(folder, "order", "c.yaml", "--document", asked, "--step", 3)
    assert table.returncode == 0 and "of the samples 8 to 11" in table.stdout
    plan = call(folder, "plan", "c.yaml", "train.num_steps=50")
    assert plan.returncode == 0 and plan.stdout.startswith("plan of 50 steps") and "weight (epochs)" in plan.stdout
    assert json.loads(call(folder, "plan", "c.yaml", "--json").stdout)["tokens"] == 5 * 4 * 16
    refused = call(folder, "plan", "c.yaml", "data.max_epochs=0.001")
    assert refused.returncode == 2 and refused.stderr.startswith("error[E293]")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["show", "d", "99"], "E295"),
        (["show", "d", "0", "--tokens", "5"], "E201"),
        (["show", "d", "0", "--pieces"], "E201"),
        (["find", "d", "x"], "E201"),
        (["find", "foreign", "", "--tokenizer", "T"], "E294"),
        (["find", "d", "x", "--tokenizer", "T", "--limit", "0"], "E201"),
        (["order", "c.yaml", "--step", "0"], "E273"),
        (["order", "c.yaml", "--step", "1", "--count", "2"], "E201"),
        (["order", "c.yaml", "--document", "d"], "E201"),
        (["order", "c.yaml", "--document", "e:1"], "E296"),
        (["verify", "d", "--held-out", "h.jsonl"], "E294"),
    ],
)
def test_mistakes_are_one_line(folder, tokenizers, arguments, code):  # noqa: F811
    done = call(folder, *[str(tokenizers["sentencepiece"].path) if a == "T" else a for a in arguments])
    assert done.stderr.startswith(f"error[{code}]: ") and done.stderr.count("\n") == 1 and done.stdout == ""
    assert done.returncode == int(code[1])
