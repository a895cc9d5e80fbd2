"""Text search against the spelt-out bytes of every document, for both kinds of tokenizers."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.dataset.look import find
from megatron_hammer.dataset.look.find import TextSearch, describe_match, format_match
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.spelling import Speller
from tests.dataset.inspected import (  # noqa: F401  the fixtures
    HARD,
    WORDS,
    random_texts,
    tokenizer,
    tokenizers,
    write_documents,
    write_texts,
)
from tests.tokenizer.texts import real_model


def places(documents, content, wanted):
    """(document, token) in which an occurrence of the bytes begins, by spelling everything out."""
    found = set()
    for number, ids in enumerate(documents):
        spelt = b"".join(content[i] if content[i] else b"\xff" for i in ids)  # no text has this byte
        owner = np.repeat(np.arange(len(ids)), [max(len(content[i]), 1) for i in ids])
        at = spelt.find(wanted)
        while at >= 0:
            found.add((number, int(owner[at])))
            at = spelt.find(wanted, at + 1)
    return sorted(found)


@pytest.mark.parametrize("at_once", [None, 7])
def test_every_place_and_no_other(tmp_path, tokenizer, at_once, monkeypatch):  # noqa: F811
    if at_once is not None:
        monkeypatch.setattr(find, "_TOKENS_AT_ONCE", at_once)
        monkeypatch.setattr(find, "HASH_BLOCK_BYTES", 4096)
    texts = [*random_texts(120, seed=5), "", "a" * 300, "ab" * 200, "\U0001f600" * 50]
    documents = write_texts(tmp_path / "d", texts, tokenizer)
    dataset, speller = IndexedDataset(tmp_path / "d"), Speller(tokenizer)
    rng = random.Random(6)
    wanted = [*WORDS, *HARD, "a", "aa", "ab" * 40, "ba" * 150, "a" * 299, "aaab", "nowhere at all", texts[3] + texts[4]]
    wanted += [text[a : a + rng.randrange(1, 90)] for text in texts if text for a in [rng.randrange(len(text))]]
    some = 0
    for text in wanted:
        if at_once is not None and len(text) == 1:
            continue
        expected = places(documents, speller.pieces.content, text.replace("\u2581", " ").encode())
        found = list(TextSearch(text.replace("\u2581", " "), speller).matches(dataset))
        assert [(match.document, match.offset) for match in found] == expected, text
        some += len(found)
        for match in found[:20]:
            ids = documents[match.document][match.offset : match.offset + match.length]
            spelt = b"".join(speller.pieces.content[i] for i in ids)
            assert text.replace("\u2581", " ").encode() in spelt
    assert some > 500


def test_special_ids_and_documents_end_a_match(tmp_path, tokenizers):  # noqa: F811
    spm = tokenizers["sentencepiece"]
    a, b = spm.encode("model"), spm.encode("world")
    write_documents(tmp_path / "d", [a + b, a, b, [*a, spm.eos_id, *b], [*a, 10**6, *b]], dtype=np.int32)
    dataset = IndexedDataset(tmp_path / "d")
    found = TextSearch("modelworld", Speller(spm)).matches(dataset)
    assert [(match.document, match.offset, match.length) for match in found] == [(0, 0, len(a + b))]


def test_what_is_shown_of_a_match(tmp_path, tokenizers):  # noqa: F811
    spm = tokenizers["sentencepiece"]
    write_texts(tmp_path / "d", ["x", "text\nthe world 你好 model"], spm, sources={"a.jsonl": 1, "b.jsonl": 1})
    dataset, speller = IndexedDataset(tmp_path / "d"), Speller(spm)
    (match,) = TextSearch("orld 你", speller).matches(dataset)
    facts = describe_match(dataset, match, speller)
    assert facts["document"] == 1 and facts["source"] == {"path": "b.jsonl", "document": 0}
    assert facts["before"] + facts["match"] + facts["after"] == "text\nthe world 你好 model<eos>"
    line = format_match(facts)
    assert line.startswith("document 1 (b.jsonl, document 0), token ") and "\n" not in line and "<<" in line
    with pytest.raises(ConfigError, match="E294"):
        TextSearch("", speller)


@pytest.mark.parametrize("name", ["hammerllm.model", "llama2-7b.model"])
def test_real_models(tmp_path, name):
    """105,789 pieces; and one with a dummy prefix, where a text begins behind a space that it has not."""
    real = load_tokenizer(real_model(name))
    texts = random_texts(60, seed=11)
    documents = write_texts(tmp_path / "d", texts, real)
    dataset, speller = IndexedDataset(tmp_path / "d"), Speller(real)
    for wanted in [texts[5], texts[7][3:-2], "你好", "world", "\ufffd", "ld世"]:
        expected = places(documents, speller.pieces.content, wanted.replace("\u2581", " ").encode())
        found = TextSearch(wanted.replace("\u2581", " "), speller).matches(dataset)
        assert [(match.document, match.offset) for match in found] == expected != []
