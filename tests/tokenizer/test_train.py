"""Training: what the model is like, that it depends on the text alone, and how it refuses."""

from __future__ import annotations

import hashlib
import json
import random
import re
import sys
import time
from pathlib import Path

import pytest

from megatron_hammer.base import progress
from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.required_characters import read_characters
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.train import train_tokenizer
from tests.progress_lines import run_quietly
from tests.tokenizer.texts import REPOSITORY, SYMBOLS, Texts, model_proto, training_texts


def test_recipe_and_manifest(plain: SentencePieceTokenizer) -> None:
    proto = model_proto(plain.path)
    assert [piece.piece for piece in proto.pieces[:4]] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert proto.normalizer_spec.name == "identity" and not proto.normalizer_spec.precompiled_charsmap
    assert not proto.normalizer_spec.add_dummy_prefix and not proto.normalizer_spec.remove_extra_whitespaces
    assert proto.trainer_spec.byte_fallback and proto.trainer_spec.split_digits
    assert proto.trainer_spec.allow_whitespace_only_pieces
    manifest = json.loads((plain.path.parent / "tokenizer.manifest.json").read_text())
    assert manifest["fingerprint"] == plain.fingerprint
    assert manifest["sha256"] == hashlib.sha256(plain.path.read_bytes()).hexdigest()
    assert manifest["inputs"] == Texts(training_texts()).describe()
    assert manifest["sampled_bytes"] == manifest["text_bytes"] > 300_000
    assert sorted(p.name for p in plain.path.parent.iterdir()) == ["tokenizer.manifest.json", "tokenizer.model"]


def test_line_breaks_and_indentation_are_learned(plain: SentencePieceTokenizer) -> None:
    pieces = [piece.piece for piece in model_proto(plain.path).pieces]
    assert "\n" in pieces and "\n\n" in pieces and "):\n" in pieces
    assert "\u2581" * 8 in pieces
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces if piece[:3] != "<0x")
    assert len(plain.encode("\t")) == 1  # the byte piece


def test_depends_on_text_alone(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    texts = training_texts()
    random.Random(5).shuffle(texts)
    other = train_tokenizer(Texts(texts), tmp_path, 3000, threads=4)
    assert other.path.read_bytes() == plain.path.read_bytes()


def test_depends_on_no_process(tmp_path: Path) -> None:
    """Two fresh interpreters with other hash seeds, through the program."""
    lines = [json.dumps({"content": text}) for text in training_texts()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[::2]))
    (tmp_path / "b.jsonl").write_text("\n".join(lines[1::2]))
    tool = str(REPOSITORY / "tools/train_tokenizer.py")
    for seed, inputs, output in (("1", "ab", "x/t.model"), ("2", "ba", "y")):
        files = [str(tmp_path / f"{name}.jsonl") for name in inputs]
        command = [sys.executable, tool, "--input", *files, "--json-key", "content", "--output", str(tmp_path / output),
                   "--vocab-size", "2000", "--max-sentence-bytes", "2000"]  # fmt: skip
        environment = {"PYTHONPATH": str(REPOSITORY), "PYTHONHASHSEED": seed}
        done = run_quietly(command, env=environment)
        assert done.returncode == 0, done.stderr
        assert "2,000 pieces" in done.stdout and done.stderr.count("\n") == 1  # no chatter of the library
    assert (tmp_path / "x/t.model").read_bytes() == (tmp_path / "y/tokenizer.model").read_bytes()
    assert (tmp_path / "x/t.manifest.json").is_file()


def test_user_defined_symbols(with_symbols: SentencePieceTokenizer) -> None:
    proto = model_proto(with_symbols.path)
    found = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    assert found == [symbol.replace(" ", "\u2581") for symbol in SYMBOLS]
    for symbol in SYMBOLS:  # a literal string, spaces included, is one piece
        assert with_symbols.decode(with_symbols.encode(f"x{symbol}y")) == f"x{symbol}y"
        assert len(with_symbols.encode(f"x{symbol}y")) == 3
    assert with_symbols.vocab_size == 2500


def test_unigram_has_the_recipe(unigram: SentencePieceTokenizer) -> None:
    proto = model_proto(unigram.path)
    assert proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM and unigram.vocab_size == 1600
    assert [piece.piece for piece in proto.pieces[:3]] == ["<unk>", "<s>", "</s>"]
    assert proto.trainer_spec.byte_fallback and proto.trainer_spec.split_digits
    assert proto.normalizer_spec.name == "identity" and not proto.normalizer_spec.add_dummy_prefix
    pieces = [piece.piece for piece in proto.pieces]
    assert "\n" in pieces and "\u2581" * 8 in pieces and len(unigram.encode("\t")) == 1
    assert len(unigram.encode("龘靐")) == 2 < len(unigram.encode("齉"))
    found = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    assert found == [symbol.replace(" ", "\u2581") for symbol in SYMBOLS]
    for text in (*training_texts()[:20], "emoji 😀\0\t ▁龘", *SYMBOLS):
        assert unigram.decode(unigram.encode(text)) == text.replace("\u2581", " ")
    manifest = json.loads((unigram.path.parent / "tokenizer.manifest.json").read_text())
    assert manifest["settings"]["model_type"] == "unigram" and manifest["fingerprint"] == unigram.fingerprint


def test_unigram_depends_on_text_alone(unigram: SentencePieceTokenizer, tmp_path: Path) -> None:
    """sentencepiece itself gives other scores for another number of threads."""
    texts = training_texts()
    random.Random(6).shuffle(texts)
    settings = {"model_type": "unigram", "user_defined_symbols": SYMBOLS, "required_characters": "龘靐"}
    other = train_tokenizer(Texts(texts), tmp_path, 1600, threads=3, **settings)
    assert other.path.read_bytes() == unigram.path.read_bytes()


def test_training_says_that_it_is_at_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    lines: list[str] = []

    class Slow(Texts):
        def __iter__(self):
            for text in self.texts[:30]:
                time.sleep(0.002)
                yield text

    train_tokenizer(Slow(training_texts()), tmp_path, 1500, report=lines.append)
    reading = [line for line in lines if re.fullmatch(r"reading text: 0\.\d\d GB, \d+ MB/s", line)]
    at_work = [line for line in lines if re.fullmatch(r"training: \d+ s so far", line)]
    phase = [line for line in lines if re.match(r"training 1,500 bpe pieces on [\d.]+ [KMG]?B", line)]
    assert reading and at_work and len(phase) == 1 and len(lines) == len(reading) + len(at_work) + 1
    assert lines.index(phase[0]) < lines.index(at_work[0])
    count = len(lines)
    time.sleep(0.05)
    assert len(lines) == count  # it stops with the training


def test_required_characters(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("龘 靐\n龘\r\n", encoding="utf-8")
    characters = read_characters(tmp_path / "c.txt")
    assert characters == "龘靐"
    tokenizer = train_tokenizer(Texts(training_texts()), tmp_path, 2500, required_characters=characters)
    assert len(tokenizer.encode("龘靐")) == 2 < len(tokenizer.encode("齉"))


def test_a_blank_comes_back_although_the_text_had_none(tmp_path: Path) -> None:
    """Chinese alone: sentencepiece reads a blank that has no piece back as its own sign for one, U+2581."""
    tokenizer = train_tokenizer(Texts(["每天晚上，许多人都会看一眼第二天的天气。"]), tmp_path, 300, allow_fewer=True)
    assert tokenizer.decode(tokenizer.encode("def main 今天")) == "def main 今天"


def test_reserved_characters_do_not_lose_their_text(tmp_path: Path) -> None:
    """The trainer would drop every sentence with a tab, U+2585 or NUL in it."""
    sentence = "zygote quixotic\tkumquat\u2585zephyr\0 \u2581 wombat\n"
    tokenizer = train_tokenizer(Texts([sentence * 500]), tmp_path, 300)
    assert len(tokenizer.encode("zygote quixotic")) < 15
    assert tokenizer.decode(tokenizer.encode(sentence)) == sentence.replace("\u2581", " ")


@pytest.mark.parametrize(
    "settings, code, words",
    [
        ({"vocab_size": 500_000}, "E260", r"more than this text can fill: it has \d+ pieces; use at most \d+"),
        ({"vocab_size": 500}, "E260", r"cannot hold the \d+ .* pieces of this text; use more than \d+"),
        ({"vocab_size": 100}, "E260", "leaves no room beside 259"),
        ({"model_type": "word"}, "E262", "is neither bpe nor unigram"),
        ({"vocab_size": 500_000, "model_type": "unigram"}, "E260", r"it has \d+ pieces; use at most \d+"),
        ({"vocab_size": 0}, "E262", "must be from 1"),
        ({"character_coverage": 0.5}, "E262", "must be from 0.98 to 1.0"),
        ({"character_coverage": 99.95}, "E262", "write 0.9995: it is a share, no percentage"),
        ({"max_sentence_bytes": 70_000}, "E262", "must be from 64 to 65535"),
        ({"user_defined_symbols": ["a", "a"]}, "E261", "occurs twice"),
        ({"user_defined_symbols": ["<s>"]}, "E261", "control or byte piece"),
        ({"user_defined_symbols": ["<0x41>"]}, "E261", "control or byte piece"),
        ({"user_defined_symbols": ["a\0"]}, "E261", "NUL"),
    ],
)
def test_refusals(tmp_path: Path, settings: dict, code: str, words: str) -> None:
    settings = {"vocab_size": 2000} | settings
    with pytest.raises(ConfigError, match=f"{code}.*{words}") as caught:
        train_tokenizer(Texts(training_texts()), tmp_path / "out", settings.pop("vocab_size"), **settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_largest_vocabulary_that_fits(tmp_path: Path) -> None:
    """The number in the message is right."""
    texts = Texts([text[:3000] for text in training_texts()[:5]])
    with pytest.raises(ConfigError) as caught:
        train_tokenizer(texts, tmp_path, 100_000)
    most = int(caught.value.remedy.split()[3].rstrip(","))
    asked, allowed = tmp_path / "asked.model", tmp_path / "allowed.model"
    assert train_tokenizer(texts, asked, most).vocab_size == most
    train_tokenizer(texts, allowed, 100_000, allow_fewer=True)
    assert allowed.read_bytes() == asked.read_bytes()


def test_no_text_and_a_failing_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"E315.*no text"):
        train_tokenizer(Texts(["", "\t\0"]), tmp_path / "out", 1000)

    class Failing(Texts):
        def __iter__(self):
            yield "some text"
            raise DataError(4, "f.jsonl:2", "is not valid JSON", "mend it")

    with pytest.raises(DataError, match="E304"):
        train_tokenizer(Failing([]), tmp_path / "out", 1000)
    assert not (tmp_path / "out").exists()


def test_sampled_training(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(Texts(training_texts()), tmp_path, 1500, sample_bytes=100_000, max_sentence_bytes=1000)
    manifest = json.loads((tmp_path / "tokenizer.manifest.json").read_text())
    assert 90_000 < manifest["sampled_bytes"] <= 100_000 < manifest["text_bytes"]
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
