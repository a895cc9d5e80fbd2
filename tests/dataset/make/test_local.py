"""Text to dataset, through the tools: same bytes for any number of workers, and nothing half done on bad input."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus import file_blocks, long
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.dataset.writer import IndexedWriter
from tests.dataset.built import build_datasets

REPOSITORY = Path(__file__).parents[3]
TEXTS = ["a b", "", "世界, 你好", "x" * 5000, "", "line\nline\t\u2581", "</s> is text", "\U0001f600" * 9, " "]


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def no_marks(tokenizer, tmp_path_factory):
    """A tokenizer without bos and eos."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("no_marks") / "t"
    sentencepiece.SentencePieceTrainer.train(
        input=str(tokenizer.parent / "corpus.txt"), model_prefix=str(prefix), vocab_size=100, bos_id=-1, eos_id=-1,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


@pytest.fixture(autouse=True)
def no_threads_left():
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def documents_of(prefix):
    dataset = IndexedDataset(prefix)
    starts = np.concatenate([[0], np.cumsum(dataset.document_lengths)])
    return [dataset.tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("append_eod", [True, False])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_documents_are_those_of_the_text(tmp_path, tokenizer, append_eod, prepend_bos):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(tokenizer))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    (summary,) = build_datasets([source], ["text"], tokenizer, tmp_path / "p", append_eod, prepend_bos, 2)
    expected = []
    for text in TEXTS:
        ids = processor.encode(text)
        expected.append([1] * prepend_bos + ids + [2] * append_eod if ids else [])  # an empty text gets neither
    assert documents_of(tmp_path / "p_text_document") == expected
    assert (summary.documents, summary.empty_documents, summary.tokens) == (9, 2, sum(map(len, expected)))
    header = IndexedDataset(tmp_path / "p_text_document").header
    options = {"json_key": "text", "append_eod": append_eod, "prepend_bos": prepend_bos, "on_error": "stop"}
    assert header.options == options
    assert (header.tokenizer.vocab_size, header.tokenizer.eos_id) == (processor.get_piece_size(), 2)
    assert [(s.path, s.bytes, s.documents) for s in header.sources] == [(str(source), source.stat().st_size, 9)]


def test_the_manifest_and_its_former_version(tmp_path, tokenizer):
    import xxhash

    sources = [write_jsonl(tmp_path / f"{k}.jsonl", [{"text": t} for t in TEXTS[k:]]) for k in range(2)]
    with open(sources[1], "ab") as file:
        file.write(b"{\n\n[]\n[]\n")
    build_datasets(sources, ["text"], tokenizer, tmp_path / "p", True, on_error="skip")
    path = tmp_path / "p_text_document.meta.json"
    tree = json.loads(path.read_text())
    lengths = IndexedDataset(tmp_path / "p_text_document").document_lengths
    for k, source in enumerate(tree["sources"]):
        assert source == {
            "path": str(sources[k]),
            "bytes": sources[k].stat().st_size,
            "documents": 9 - k,
            "tokens": int(lengths[9 * k : 9 + 8 * k].sum()),
            "xxh3": xxhash.xxh3_128_hexdigest(sources[k].read_bytes()),
            "rejected": {"E304": 1, "E305": 1, "E306": 2} if k else {},
        }
    assert tree["version"] == 2
    tree["version"] = 1
    for source in tree["sources"]:
        for name in ("tokens", "xxh3", "rejected"):
            del source[name]
    path.write_text(json.dumps(tree))
    old = IndexedDataset(tmp_path / "p_text_document").header.sources
    assert [(s.documents, s.tokens, s.xxh3, s.rejected) for s in old] == [(9, None, None, {}), (8, None, None, {})]


def test_same_bytes_for_any_number_of_workers_and_any_batches(tmp_path, tokenizer, monkeypatch):
    rng = random.Random(1)
    records = [{"text": "".join(rng.choices(TEXTS, k=rng.randint(0, 5)))} for _ in range(300)]
    sources = [write_jsonl(tmp_path / f"{k}.jsonl", records[k::3]) for k in range(3)]
    seen = set()
    for workers, batch in ((1, 1 << 22), (2, 1 << 22), (4, 1 << 22), (2, 3000), (1, 1)):
        monkeypatch.setattr(file_blocks, "BLOCK_BYTES", batch)
        prefix = tmp_path / f"out{workers}-{batch}"
        build_datasets(sources, ["text"], tokenizer, prefix, True, True, workers)
        seen.add(tuple(Path(f"{prefix}_text_document{s}").read_bytes() for s in (".bin", ".idx", ".meta.json")))
    assert len(seen) == 1
    assert [s.documents for s in IndexedDataset(f"{prefix}_text_document").header.sources] == [100, 100, 100]


def test_several_keys_and_compressed_input(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for k in range(5):
            file.write(json.dumps({"title": f"x{k}", "body": "line " * k}) + "\n")
    summaries = build_datasets([path], ["title", "body"], tokenizer, tmp_path / "p", True)
    assert [s.prefix.name for s in summaries] == ["p_title_document", "p_body_document"]
    assert [s.empty_documents for s in summaries] == [0, 1]
    assert len(documents_of(tmp_path / "p_body_document")) == 5


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_long_documents_are_written_in_pieces(tmp_path, tokenizer, dummy_prefix, monkeypatch):
    """Same bytes as in one piece, bad ones included; also where the encoder cannot cut a text."""
    import sentencepiece

    if dummy_prefix:
        sentencepiece.SentencePieceTrainer.train(
            input=str(tokenizer.parent / "corpus.txt"), model_prefix=str(tmp_path / "prefix"), vocab_size=100,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        tokenizer = tmp_path / "prefix.model"
    rng = random.Random(4)
    records = [{"text": "".join(rng.choices(TEXTS, k=rng.randint(0, 9))), "n": "z" * 9} for _ in range(60)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    with open(source, "ab") as file:
        file.write(b'{"text": "' + b"y" * 9000 + b'\\ud800"}\n' + b'{"text": [' + b"1, " * 3000 + b"1]}\n")
    (tmp_path / "b.txt").write_text("".join(TEXTS) * 3, encoding="utf-8")
    inputs = [source, tmp_path / "b.txt"]

    def made(name):
        build_datasets(inputs, ["text", "n"], tokenizer, tmp_path / name, True, True, 2, "quarantine")
        return [
            (tmp_path / f"{name}_{key}_document{s}").read_bytes() for key in ("n", "text") for s in (".bin", ".idx")
        ]

    whole = made("whole")
    monkeypatch.setattr(file_blocks, "BLOCK_BYTES", 500)
    monkeypatch.setattr(long, "LONG_BYTES", 1000)
    monkeypatch.setattr(long, "_LONG_STRING", 700)
    monkeypatch.setattr(long, "_PIECE_BYTES", 333)
    parts = []
    add_part = IndexedWriter.add_part
    monkeypatch.setattr(IndexedWriter, "add_part", lambda self, ids: (parts.append(len(ids)), add_part(self, ids)))
    assert made("long") == whole
    assert max(parts) > 1 and len(parts) > 60
    assert documents_of(tmp_path / "long_text_document")[-1][-1] == 2
    rejected = (tmp_path / "long_text_document.rejected.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["cause"] for line in rejected] == ["E308", "E307"]


BAD = [
    (b'{"text": "a"}\n{"text": "b"', 4, ":2 (byte"),
    (b'{"text": "a"}\n\n{"text": "b"}\n', 5, ":2 (byte"),
    (b'{"text": "a"}\n{"other": "b"}\n', 7, ":2 (byte"),
    (b'{"text": "a"}\n["b"]\n', 6, ":2 (byte"),
    (b'{"text": null}\n', 7, ":1 (byte"),
    (b'{"text": "\xff"}\n', 3, ":1 (byte"),
    (b'{"text": "\\ud800"}\n', 8, ":1 (byte"),
    (b'\xef\xbb\xbf{"text": "a"}\n', 3, ":1 (byte"),
    (b"", 2, " "),
    (b'{"text": ""}\n', 43, "text"),
]


@pytest.mark.parametrize(("content", "number", "where"), BAD)
def test_bad_input_keeps_the_old_output(tmp_path, tokenizer, content, number, where):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "x line"}])
    build_datasets([good], ["text"], tokenizer, tmp_path / "p", True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "bad.jsonl").write_bytes(content)
    inputs = [tmp_path / "bad.jsonl"] if number == 43 else [good, tmp_path / "bad.jsonl"]
    with pytest.raises(DataError) as caught:
        build_datasets(inputs, ["text"], tokenizer, tmp_path / "p", True)
    assert caught.value.number == number and where in str(caught.value) and "bad.jsonl" in str(caught.value)
    (tmp_path / "bad.jsonl").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_second_key_publishes_neither(tmp_path, tokenizer):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x", "title": 3}])
    with pytest.raises(DataError, match="E307"):
        build_datasets([source], ["text", "title"], tokenizer, tmp_path / "p", True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_options(tmp_path, tokenizer, no_marks):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    for arguments, number, word in (
        ((no_marks, tmp_path / "p", True, False), 70, "--append-eod"),
        ((no_marks, tmp_path / "p", False, True), 70, "--prepend-bos"),
        ((tokenizer, tmp_path / "p", True, False, 0), 75, "--workers"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_datasets([source], ["text"], *arguments)
        assert caught.value.number == number and word in str(caught.value)
    for options, number, word in (
        ({"on_error": "ignore"}, 77, "--on-error=ignore"),
        ({"text_documents": "word"}, 77, "--text-documents=word"),
        ({"shard_bytes": 0}, 78, "--shard-mb=0"),
    ):
        with pytest.raises(ConfigError) as caught:
            build_datasets([source], ["text"], tokenizer, tmp_path / "p", True, **options)
        assert caught.value.number == number and word in str(caught.value)
    with pytest.raises(ConfigError, match="E274"):
        build_datasets([source], ["text", "text"], tokenizer, tmp_path / "p", True)
    with pytest.raises(DataError, match=r"E301.*missing\.jsonl"):
        build_datasets([source, tmp_path / "missing.jsonl"], ["text"], tokenizer, tmp_path / "p", True)
    with pytest.raises(DataError, match="E310"):
        build_datasets([source], ["text"], tmp_path / "no.model", tmp_path / "p", True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# ---- the tools, as a user calls them ----


def call(tool, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=60)


def test_preprocess_then_inspect(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])
    done = call("preprocess_data.py", "--input", "a.jsonl", "--json-keys", "text", "--tokenizer-model", tokenizer,
                "--output-prefix", "out/p", "--append-eod", "--prepend-bos", "--workers", 2, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and "9 documents (2 empty)" in done.stdout
    stats = call("inspect_dataset.py", "stats", "out/p_text_document", "--json", cwd=tmp_path)
    facts = json.loads(stats.stdout)
    assert facts["documents"] == 9 and facts["sequences"] == 7 and facts["tokenizer"]["eos_id"] == 2
    table = call("inspect_dataset.py", "stats", "out/p_text_document", cwd=tmp_path)
    assert table.returncode == 0 and f"{facts['tokens']:,}" in table.stdout

    model = {"hidden_size": 8, "ffn_hidden_size": 8, "num_layers": 1, "num_attention_heads": 1}
    config = {"model": model, "data": {"train": "out/p_text_document", "seq_length": 32}, "train": {"seed": 5}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))  # JSON is YAML
    listed = call("inspect_dataset.py", "order", "c.yaml", "data.seq_length=16", "--start", 40, "--count", 3, "--json",
                  "train.seed=6", cwd=tmp_path)  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    from megatron_hammer.sampling.samples import TrainData, describe_samples

    data = TrainData({str(tmp_path / "out/p_text_document"): 1.0}, 16, 6)
    expected = describe_samples(data, 40, 3)
    found = json.loads(listed.stdout)
    assert [s.pop("source") for s in found] == ["out/p_text_document"] * 3
    assert found == [{k: v for k, v in s.items() if k != "source"} for s in expected]
    table = call("inspect_dataset.py", "order", "c.yaml", "data.order=megatron", "--count", 2, cwd=tmp_path)
    assert table.returncode == 0 and len(table.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("tool", "arguments", "code", "words"),
    [
        ("preprocess_data.py", ["--input", "bad.jsonl", "--tokenizer-model", "T", "--append-eod", "--output-prefix",
         "p"], "E304", "bad.jsonl:1"),
        ("preprocess_data.py", ["--input", "a.jsonl", "--output-prefix", "p"], "E201", "--tokenizer-model"),
        ("inspect_dataset.py", ["stats", "nothing"], "E330", "nothing.idx"),
        ("inspect_dataset.py", ["stats", "nothing", "--a=b"], "E201", "--a=b"),
        ("inspect_dataset.py", ["order", "c.yaml"], "E273", "data.train"),
        ("inspect_dataset.py", ["order", "c.yaml", "--bogus"], "E201", "--bogus"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(tmp_path, tokenizer, tool, arguments, code, words):
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "c.yaml").write_text(
        "model: {hidden_size: 8, ffn_hidden_size: 8, num_layers: 1, num_attention_heads: 1}"
    )
    done = call(tool, *[str(tokenizer) if a == "T" else a for a in arguments], cwd=tmp_path)
    assert done.returncode == int(code[1]) and done.stdout == ""
    assert done.stderr.startswith(f"error[{code}]: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "c.yaml"]


@pytest.mark.parametrize("tool", ["preprocess_data.py", "inspect_dataset.py"])
def test_help_is_quick_and_light(tool, tmp_path):
    script = (
        "import os, runpy, sys; sys.argv = [sys.argv[1], '--help']; sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0, stop.code\n"
        "heavy = {'numpy', 'torch', 'transformers', 'sentencepiece', 'tokenizers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", script, str(REPOSITORY / "tools" / tool)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_data_modules_import_without_torch():
    script = (
        "import sys\n"
        "from megatron_hammer.dataset.make import local, merge\n"
        "from megatron_hammer.sampling import blend, index_builder, loader, order, samples\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
