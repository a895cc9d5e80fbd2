"""A small real tokenizer, trained once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory) -> Path:
    """A sentencepiece BPE model in HammerLLM's manner: byte fallback, no dummy prefix, every space kept."""
    import sentencepiece

    from megatron_hammer.huggingface.certificate import TEXTS

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("\n".join(TEXTS.values()) * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=700, model_type="bpe",
        character_coverage=0.99, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", allow_whitespace_only_pieces=True, split_digits=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.fixture
def tokenizer(tokenizer_model):
    from megatron_hammer.tokenizer.load import load_tokenizer

    return load_tokenizer(tokenizer_model)
