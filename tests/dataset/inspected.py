"""Small tokenizers of both kinds and datasets of real text, for the tests of what looks into datasets."""

from __future__ import annotations

import random

import numpy as np
import pytest

from megatron_hammer.dataset.format import SourceRecord, TokenizerRecord
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.tokenizer.load import load_tokenizer

WORDS = ["model", "world", "世界", "你好", "return", "x", "line", "text", " is ", ",", "\n", " the", " of", "12", "。"]
HARD = [
    "\ufffd",
    "\uff01",
    "\uffe5\ufffd",
    "\uffbf\ufffd\ufffd",
    "\U0001f600",
    "é",
    "и",
    "\u2581",
    "\0",
    "ß",
    "カ",
    "한",
]


def random_texts(count, seed=0, longest=60):
    rng = random.Random(seed)
    return ["".join(rng.choices(WORDS * 3 + HARD, k=rng.randrange(1, longest))) for _ in range(count)]


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """kind -> tokenizer: sentencepiece with byte fallback (unk 0, bos 1, eos 2), byte-level BPE (eos 0, no bos)."""
    import sentencepiece
    import tokenizers

    folder = tmp_path_factory.mktemp("inspected")
    rng = random.Random(1)
    lines = ["".join(rng.choices(WORDS, k=20)).replace("\n", " ") for _ in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "t"), vocab_size=450, model_type="bpe",
        byte_fallback=True, add_dummy_prefix=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    backend = tokenizers.ByteLevelBPETokenizer()
    fullwidth = "".join(map(chr, range(0xFFE0, 0xFFE7))) * 60  # EF BF xx: a piece of U+FFFD's first two bytes
    backend.train_from_iterator([*lines, fullwidth], vocab_size=450, special_tokens=["<|endoftext|>"],
                                show_progress=False)  # fmt: skip
    assert backend.token_to_id("\u00ef\u00bf") is not None
    backend.save(str(folder / "tokenizer.json"))
    return {
        "sentencepiece": load_tokenizer(folder / "t.model"),
        "byte-level": load_tokenizer(folder / "tokenizer.json"),
    }


@pytest.fixture(params=["sentencepiece", "byte-level"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def record_of(tokenizer):
    return TokenizerRecord(
        tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id,
        tokenizer.unk_id,
    )  # fmt: skip


def write_documents(prefix, documents, tokenizer=None, sources=None, options=None, **kwargs):
    """Lists of ids, one sequence each, and none for an empty list; a header that says who made them."""
    flat = np.array([token for ids in documents for token in ids], np.int64)
    record = None if tokenizer is None else record_of(tokenizer)
    with IndexedWriter(prefix, tokenizer=record, options=options, **kwargs) as writer:
        writer.add(flat, np.array([len(ids) for ids in documents]))
        writer.sources += [SourceRecord(name, 1, count) for name, count in (sources or {}).items()]


def write_texts(prefix, texts, tokenizer, bos=False, eod=True, **kwargs):
    """Texts as the preprocessing tool writes them; returns the ids of each document."""
    documents = []
    for text in texts:
        ids = tokenizer.encode(text)
        first = [tokenizer.bos_id] if bos and ids else []
        documents.append(first + ids + ([tokenizer.eos_id] if eod and ids else []))
    options = {"json_key": "text", "append_eod": eod, "prepend_bos": bos}
    write_documents(prefix, documents, tokenizer, options=options, vocab_size=tokenizer.vocab_size, **kwargs)
    return documents
