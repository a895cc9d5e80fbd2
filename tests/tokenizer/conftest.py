"""Tokenizers for all tests here: small ones as the quick start trains it, with user-defined symbols, of unigram; and
the real ones as Hugging Face folders.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_hammer.tokenizer.convert import convert_tokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.train import train_tokenizer
from tests.tokenizer.texts import SYMBOLS, Texts, real_model, training_texts


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


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a real model -> its folder for transformers, made (and proved) at the first call; to be read only."""

    @cache
    def convert(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        convert_tokenizer(load_tokenizer(real_model(f"{name}.model")), folder)
        return folder

    return convert


@pytest.fixture(scope="session")
def converted_plain(plain: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("converted")
    convert_tokenizer(plain, folder)
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(training_texts(), trainer)
    path = tmp_path_factory.mktemp("byte_level") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(path)


@pytest.fixture(params=["plain", "with_symbols", "converted_plain", "byte_level"])
def any_kind(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
