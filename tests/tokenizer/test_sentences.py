"""Sentences hold the whole text and are cut where it costs least; their sample is a choice by content."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from megatron_hammer.tokenizer.sentences import HashSample, split_sentences


@given(st.text(st.sampled_from("ab 中。\n😀é\t\0\u2581\u2585"), max_size=400), st.integers(64, 120))
def test_sentences_hold_the_whole_text(text: str, limit: int) -> None:
    sentences = list(split_sentences(text, limit))
    assert all(0 < len(s) <= limit for s in sentences)
    joined = b"".join(sentences).decode()  # each is whole UTF-8, or this fails
    assert all(s.decode() for s in sentences)
    assert joined == text.translate(dict.fromkeys(map(ord, "\t\0\u2581\u2585")))


def test_sentences_are_cut_where_words_begin() -> None:
    sentences = list(split_sentences("word    another " * 50, 100))
    assert len(sentences) > 5
    assert all(s.startswith((b" ", b"word")) and not s.endswith(b" ") for s in sentences[:-1])
    assert next(split_sentences("一句话。" * 30, 100)).decode().endswith("。")


def test_sample_is_a_choice_by_content() -> None:
    generator = random.Random(3)
    sentences = [generator.randbytes(generator.randint(1, 200)).hex().encode() for _ in range(400)]
    sentences += sentences[:100]  # repeated ones stay or go together
    chosen = []
    for _ in range(4):
        generator.shuffle(sentences)
        sample = HashSample(20_000)
        for sentence in sentences:
            sample.add(sentence)
        assert sample.kept_bytes == sum(map(len, sample.sentences)) <= 20_000 < sample.seen_bytes
        chosen.append(sample.sentences)
    assert chosen[0] == chosen[1] == chosen[2] == chosen[3]
    assert sample.kept_bytes > 18_000
