"""Small tokenizers for all tests here: as the quick start trains it, with user-defined symbols, and of unigram."""

from __future__ import annotations

import pytest

from megatron_hammer.tokenizer.load import SentencePieceTokenizer
from megatron_hammer.tokenizer.train import train_tokenizer
from tests.tokenizer.texts import SYMBOLS, Texts, training_texts


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(Texts(training_texts()), tmp_path_factory.mktemp("plain"), 3000)


@pytest.fixture(scope="session")
def with_symbols(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    folder = tmp_path_factory.mktemp("symbols")
    return train_tokenizer(Texts(training_texts()), folder / "s.model", 2500, user_defined_symbols=SYMBOLS)


@pytest.fixture(scope="session")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(
        Texts(training_texts()), tmp_path_factory.mktemp("unigram"), 1600,
        model_type="unigram", user_defined_symbols=SYMBOLS, required_characters="龘靐",
    )  # fmt: skip
