"""A small tokenizer for everything that makes datasets of text."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Path of a small sentencepiece model with byte fallback: unk 0, bos 1, eos 2."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(0)
    words = ["model", "world", "世界", "你好", "return", "x", "line", "text", " is ", ","]
    text = "\n".join("".join(rng.choices(words, k=20)) for _ in range(300))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "t"), vocab_size=400, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "t.model"
