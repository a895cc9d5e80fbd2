"""What the data tests share: small random datasets, and both backends of the index builder."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_hammer.data import index
from megatron_hammer.data.indexed_writer import IndexedWriter

TESTS = Path(__file__).parent.parent


def write_dataset(prefix, lengths, vocab_size=50_000, seed=0, **kwargs):
    """One sequence a document (length 0: none), random ids. Returns the list of documents."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(0, vocab_size, n).tolist() for n in lengths]
    with IndexedWriter(prefix, vocab_size, **kwargs) as writer:
        writer.add(np.concatenate([np.empty(0, np.int64), *documents]).astype(np.int64), np.asarray(lengths))
    return documents


@pytest.fixture(scope="session")
def adapter():
    """``tests/adapter_megatron.py``, loaded by path as an outside program would."""
    spec = importlib.util.spec_from_file_location("adapter_megatron", TESTS / "adapter_megatron.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def compiled():
    """The compiled index builder; a test of it must not pass without it."""
    if index._compiled is None:
        pytest.skip("the compiled index builder is not installed (HAMMER_NO_EXTENSIONS=1?)")
    return index._compiled


@pytest.fixture
def twin(monkeypatch):
    """A function that calls another one on the NumPy backend."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(index, "_compiled", None)
            return function(*args, **kwargs)

    return call


@pytest.fixture(params=["C++", "NumPy"])
def backend(request, monkeypatch):
    """Run a test once on each backend."""
    if request.param == "NumPy":
        monkeypatch.setattr(index, "_compiled", None)
    elif index._compiled is None:
        pytest.skip("the compiled index builder is not installed")
    return request.param


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
