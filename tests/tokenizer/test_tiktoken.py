"""tiktoken's vocabularies: ids by its own rule, what is assumed, conversion, damaged files.

Against the library itself: in a venv with ``tiktoken``, ``Encoding("x", pat_str=P, special_tokens={},
mergeable_ranks=load_tiktoken_bpe(F)).encode_ordinary(text)`` for each of ``PATTERNS``; 120,210 texts with qwen.tiktoken
gave equal ids.
"""

from __future__ import annotations

import base64
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.dataset.make.job import prepare_job, remarks
from megatron_hammer.tokenizer.convert import publish_tokenizer
from megatron_hammer.tokenizer.lab.analyze import measure_coverage
from megatron_hammer.tokenizer.lab.arguments import load_named
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.tiktoken_backend import PATTERNS, TiktokenTokenizer
from tests.tokenizer.texts import any_text, training_texts


@cache
def pieces() -> dict[bytes, int]:
    """Bytes, then the pairs that stand side by side most often in some texts, and two pieces that no merge comes to."""
    found = [bytes([byte]) for byte in range(256)]
    words = [[bytes([byte]) for byte in word.encode()] for text in training_texts()[:20] for word in text[:200].split()]
    for _ in range(200):
        counts = Counter(left + right for word in words for left, right in pairwise(word))
        best = max(sorted(counts.keys() - set(found)), key=counts.__getitem__)
        found.append(best)
        words = [joined(word, {best: 0}) for word in words]
    return {piece: rank for rank, piece in enumerate([*found, "鑫鹈鹕".encode(), b" hello"])}


def joined(parts: list[bytes], ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's rule inside a word: the lowest rank first, the leftmost of equal ones."""
    while len(parts) > 1:
        found = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        at = found.index(min(found))
        if found[at] == len(ranks):
            break
        parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
    return parts


def write(path: Path) -> Path:
    path.write_bytes(b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in pieces().items()))
    return path


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> TiktokenTokenizer:
    tokenizer = load_tokenizer(write(tmp_path_factory.mktemp("tiktoken") / "qwen.tiktoken"))
    assert isinstance(tokenizer, TiktokenTokenizer)
    return tokenizer


@given(text=any_text())
@settings(max_examples=150, deadline=None)
def test_ids_are_tiktoken_s(qwen: TiktokenTokenizer, text: str) -> None:
    import regex

    expected = []
    for word in regex.findall(PATTERNS["qwen"], text):
        spelt = word.encode()
        parts = [spelt] if spelt in pieces() else joined([bytes([byte]) for byte in spelt], pieces())
        expected += [pieces()[part] for part in parts]
    assert qwen.encode(text) == expected
    assert qwen.decode(expected) == text
    assert qwen.piece_bytes()[expected].sum() == len(text.encode())


def test_the_way_of_cutting_is_assumed_by_name_said_and_given(tmp_path: Path) -> None:
    """Llama 3's file is called tokenizer.model: what it is says its first line."""
    assumed = {}
    for name in ("qwen.tiktoken", "o200k_base.tiktoken", "p50k_base.tiktoken", "tokenizer.model", "other.bpe"):
        tokenizer = load_tokenizer(write(tmp_path / name))
        assert isinstance(tokenizer, TiktokenTokenizer)
        assert f"assumed is {tokenizer.pattern}'s way" in tokenizer.assumption
        assumed[name] = tokenizer.pattern
    assert list(assumed.values()) == ["qwen", "o200k", "gpt2", "cl100k", "cl100k"]
    named = load_named([str(tmp_path / "qwen.tiktoken")], "o200k")["qwen"]
    assert named.assumption == "" and "o200k" in named.encoder
    words = load_tokenizer(tmp_path / "qwen.tiktoken", r"\S+|\s+")
    assert words.encode(" hello") != named.encode(" hello") == [len(pieces()) - 1]
    with pytest.raises(ConfigError, match=r"E299.*pattern '\(' is neither gpt2, .*give one of these names"):
        load_tokenizer(tmp_path / "qwen.tiktoken", "(")


def test_the_folder_of_a_model_that_has_only_this_file(tmp_path: Path, qwen: TiktokenTokenizer) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(write(tmp_path / "qwen.tiktoken").parent).fingerprint == qwen.fingerprint


def test_a_pattern_for_another_tokenizer_is_refused(qwen: TiktokenTokenizer, tmp_path: Path) -> None:
    qwen.save_files(tmp_path)
    for refused in (
        lambda: load_named([str(tmp_path)], "qwen"),
        lambda: load_tokenizer(tmp_path, special_tokens=["<eod>"]),
    ):
        with pytest.raises(ConfigError, match=r"E299.*is for tiktoken vocabularies, .*leave it out"):
            refused()


def test_coverage_and_an_exact_folder_with_special_tokens(tmp_path: Path, qwen: TiktokenTokenizer) -> None:
    whole = [content.decode() for content in pieces() if len(content) == 3 and content[0] >= 0xE4]
    covered = measure_coverage(qwen, [(character, 1) for character in [*whole, "鑫"]])
    assert (covered.levels[1].covered, covered.levels[1].characters) == (len(whole), len(whole) + 1)
    publish_tokenizer(qwen.path, tmp_path / "folder", special_tokens=["<|endoftext|>", "<|im_start|>"])
    folder = load_tokenizer(tmp_path / "folder")
    assert (folder.eos_id, folder.vocab_size) == (len(pieces()), len(pieces()) + 2)
    assert folder.encode("中文 hello 123<|endoftext|>") == qwen.encode("中文 hello 123<|endoftext|>")


def test_preprocessing_says_what_is_assumed_and_where_an_end_of_document_comes_from(
    tmp_path: Path, qwen: TiktokenTokenizer
) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert any(
        "assumed is qwen's way" in remark
        for remark in remarks(prepare_job([tmp_path / "a.txt"], ["text"], qwen.path, False))
    )
    with pytest.raises(ConfigError, match=r"E270.*convert_tokenizer\.py .*--special-tokens '<\|endoftext\|>'"):
        prepare_job([tmp_path / "a.txt"], ["text"], qwen.path, True)


@pytest.mark.parametrize(
    ("end", "rule"),
    [(b"IQ\n", "line 459 that is no piece"), (b"IQ== 9999\n", "came before"), (b"5L2g5aW9 3\n", "the same rank")],
)
def test_a_damaged_vocabulary_is_named(tmp_path: Path, end: bytes, rule: str) -> None:
    path = write(tmp_path / "x.tiktoken")
    path.write_bytes(path.read_bytes() + end)
    with pytest.raises(DataError, match=rf"E312.*x\.tiktoken.*{rule}"):
        load_tokenizer(path)
    (tmp_path / "half.tiktoken").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match=r"E312.*no piece for 254 of the 256 bytes"):
        load_tokenizer(tmp_path / "half.tiktoken")
