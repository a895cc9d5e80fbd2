"""The table of sources: datasets by their index, text by a tokenizer, both the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError, DataError, RefusedError
from megatron_hammer.dataset.format import TokenizerRecord, path_of
from megatron_hammer.dataset.look.count import count_tokens
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.train import train_tokenizer
from tests.tokenizer.texts import Texts, training_texts

TEXTS = ["一些文字 and words", "", "def f(x):\n    return x\n", "emoji \U0001f600", "", "another line"]
TEXT_BYTES = sum(len(text.encode()) for text in TEXTS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(Texts(training_texts()), tmp_path_factory.mktemp("count"), 1000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def make_dataset(prefix: Path, tokenizer: SentencePieceTokenizer, bos: bool) -> Path:
    record = TokenizerRecord(tokenizer.fingerprint, tokenizer.vocab_size)
    with IndexedWriter(prefix, tokenizer.vocab_size, tokenizer=record) as writer:
        writer.add(*tokenizer.encode_documents(TEXTS, first=tokenizer.bos_id if bos else None))
    return prefix


def test_text_and_dataset_agree(tmp_path: Path, source: Path, tokenizer: SentencePieceTokenizer) -> None:
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    plain = make_dataset(tmp_path / "plain", tokenizer, False)
    marked = make_dataset(tmp_path / "marked", tokenizer, True)
    table = count_tokens([("text", source), ("plain", plain), ("marked", marked)], tokenizer.path, threads=2)
    assert [(r.documents, r.lines, r.text_bytes, r.tokens) for r in table.rows] == [
        (4, 6, TEXT_BYTES, tokens), (4, 6, TEXT_BYTES, tokens), (4, 6, TEXT_BYTES, tokens + 4),
    ]  # fmt: skip
    assert (table.total.lines, table.total.tokens) == (18, 3 * tokens + 4)
    assert sum(table.share(row) or 0 for row in table.rows) == pytest.approx(1)
    assert table.tokenizers == [tokenizer.fingerprint] and table.shares_of == "tokens"
    again = json.loads(json.dumps(table.to_json()))
    assert again["sources"][0]["bytes_per_token"] == TEXT_BYTES / tokens and again["total"]["share"] == 1
    lines = str(table).splitlines()
    assert len(lines) == 5 and len(set(map(len, lines))) == 1
    assert lines[1].split() == ["text", "4", "6", str(TEXT_BYTES), str(tokens), f"{TEXT_BYTES / tokens:.3f}",
                                f"{tokens / (3 * tokens + 4):.2%}"]  # fmt: skip


def test_without_a_tokenizer_what_is_not_known_is_said(tmp_path: Path, source: Path, tokenizer: SentencePieceTokenizer
                                                       ) -> None:  # fmt: skip
    prefix = make_dataset(tmp_path / "p", tokenizer, False)
    table = count_tokens([("p", prefix), ("a", source)])
    assert [(r.text_bytes, r.tokens) for r in table.rows] == [(None, table.rows[0].tokens), (TEXT_BYTES, None)]
    assert table.total.tokens is None and table.total.text_bytes is None and table.total.lines == 12
    assert [cell == "-" for cell in str(table).splitlines()[1].split()] == [False] * 3 + [True, False, True, True]
    assert count_tokens([("a", source)]).shares_of == "text_bytes"


def test_a_dataset_is_counted_without_its_tokens(tmp_path: Path, tokenizer: SentencePieceTokenizer) -> None:
    prefix = make_dataset(tmp_path / "p", tokenizer, False)
    before = count_tokens([("p", prefix)]).to_json()
    bin_path = path_of(prefix, ".bin")
    bin_path.write_bytes(bytes(bin_path.stat().st_size))
    assert count_tokens([("p", prefix)]).to_json() == before
    path_of(prefix, ".meta.json").unlink()
    assert count_tokens([("p", prefix)]).to_json() == before | {"tokenizers": []}


def test_equal_names_add_up_and_patterns_work(tmp_path: Path, source: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(source.read_bytes())
    table = count_tokens([("x", source), ("x", tmp_path / "b.jsonl"), ("y", str(tmp_path / "*.jsonl"))])
    assert [(r.name, r.lines, r.text_bytes) for r in table.rows] == [("x", 12, 2 * TEXT_BYTES)] * 1 + [
        ("y", 12, 2 * TEXT_BYTES)
    ]


def test_refusals(tmp_path: Path, source: Path, tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(ConfigError, match="E289"):
        count_tokens([])
    with pytest.raises(ConfigError, match="E289"):
        count_tokens([("a", source)], threads=0)
    with pytest.raises(DataError, match="E301"):
        count_tokens([("a", tmp_path / "absent")])
    (tmp_path / "bad.jsonl").write_text('{"text": "x"}\n{}\n')
    with pytest.raises(DataError, match=r"E307\].*bad.jsonl:2 "):
        count_tokens([("a", tmp_path / "bad.jsonl")])
    prefix = make_dataset(tmp_path / "p", tokenizer, False)
    other = train_tokenizer(Texts(training_texts()), tmp_path / "other.model", 900)
    with pytest.raises(RefusedError, match="E510"):
        count_tokens([("p", prefix)], other.path)
    with IndexedWriter(tmp_path / "q", 1000) as writer:
        writer.add(np.array([5, 950]), np.array([2]))
    count_tokens([("q", tmp_path / "q")], tokenizer.path)
    with pytest.raises(DataError, match=r"E366\].*5 to 950 must be in \[0, 899\]"):
        count_tokens([("q", tmp_path / "q")], other.path)


def test_the_program(tmp_path: Path, source: Path, tokenizer: SentencePieceTokenizer) -> None:
    program = Path(__file__).parents[3] / "tools" / "count_tokens.py"
    prefix = make_dataset(tmp_path / "p", tokenizer, False)
    arguments = [f"zh={prefix}", str(source), "--tokenizer", str(tokenizer.path)]
    done = subprocess.run([sys.executable, str(program), *arguments, "--json"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    table = json.loads(done.stdout)
    assert [row["name"] for row in table["sources"]] == ["zh", "a.jsonl"]
    assert table["sources"][0] | {"name": ""} == table["sources"][1] | {"name": ""}
