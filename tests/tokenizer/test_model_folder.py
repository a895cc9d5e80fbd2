"""Every kind of sentencepiece model has an exact form: which one, and that transformers gives the same ids with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.tokenizer import conversion_proof
from megatron_hammer.tokenizer.convert import convert_tokenizer, export_note, form_line
from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS
from megatron_hammer.tokenizer.lab.fuzz import fuzz_texts
from megatron_hammer.tokenizer.lab.verify import compare_tokenizers
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.model_folder import WITH_BOS, WITHOUT_BOS, form_of_folder, text_of
from tests.tokenizer.texts import model_proto, write_model

SYMBOLS = ["a b", "  ", "\t\t", "<x y>", "\u2581q", "<br>", "e"]
PREFIX, EXTRA, SUFFIX = (
    {"add_dummy_prefix": True},
    {"remove_extra_whitespaces": True},
    {"treat_whitespace_as_suffix": True},
)
LOOSE = {"byte_fallback": False}
JSON, UNIGRAM, NORMAL = "", "is a unigram model", "normalises characters"

# name: (what sets it apart from BPE with byte fallback that leaves text as it is, why it has no tokenizer.json)
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (PREFIX | {"split_digits": True}, JSON),
    "no fallback": (LOOSE, JSON),
    "no fallback, prefix": (LOOSE | PREFIX | EXTRA, JSON),
    "extra spaces": (EXTRA, JSON),
    "extra spaces, prefix": (EXTRA | PREFIX, JSON),
    "suffix": (SUFFIX, JSON),
    "suffix, prefix": (SUFFIX | PREFIX, "puts a space at the end"),
    "suffix, prefix, extra spaces": (SUFFIX | PREFIX | EXTRA, "puts a space at the end"),
    "only spaces": ({"allow_whitespace_only_pieces": True}, JSON),
    "across words": ({"split_by_whitespace": False, "split_by_number": False, "split_by_unicode_script": False}, JSON),
    "symbols": ({"user_defined_symbols": SYMBOLS}, JSON),
    "symbols, prefix": ({"user_defined_symbols": SYMBOLS} | PREFIX, "both a dummy prefix and user-defined"),
    "symbols, extra spaces": ({"user_defined_symbols": SYMBOLS} | EXTRA, "symbols and removes extra spaces"),
    "controls": ({"control_symbols": ["<mask>", "[SEP]", "ab"]}, JSON),
    "controls, unigram": ({"control_symbols": ["<mask>", "[SEP]", "ab"], "model_type": "unigram"}, UNIGRAM),
    "one-character controls": ({"control_symbols": ["\u9f98", "Q"], "unk_piece": "?"}, JSON),
    "one-character controls, no fallback": ({"control_symbols": ["\u9f98", "Q"]} | LOOSE, JSON),
    "nmt_nfkc": ({"normalization_rule_name": "nmt_nfkc"} | PREFIX | EXTRA, NORMAL),
    "nfkc": ({"normalization_rule_name": "nfkc"} | PREFIX, NORMAL),
    "nfkc_cf": ({"normalization_rule_name": "nfkc_cf"}, NORMAL),
    "nmt_nfkc_cf": ({"normalization_rule_name": "nmt_nfkc_cf"} | EXTRA, NORMAL),
    "own rules": ({"normalization_rule_tsv": "rules.tsv"}, NORMAL),
    "moved ids": ({"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2}, JSON),
    "moved ids, unigram": ({"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2, "model_type": "unigram"}, UNIGRAM),
    "no bos": ({"bos_id": -1}, JSON),
    "no bos, unigram": ({"bos_id": -1, "model_type": "unigram"}, UNIGRAM),
    "neither bos nor eos": ({"bos_id": -1, "eos_id": -1, "pad_id": 1, "model_type": "unigram"}, UNIGRAM),
    "other names": ({"unk_piece": "[UNK]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "pad_id": 3}, JSON),
    "other names, unigram": ({"unk_piece": "[UNK]", "bos_piece": "[CLS]", "model_type": "unigram"}, UNIGRAM),
    "unigram": ({"model_type": "unigram"}, UNIGRAM),
    "unigram, no fallback": ({"model_type": "unigram"} | LOOSE, UNIGRAM),
    "unigram, symbols": ({"model_type": "unigram", "user_defined_symbols": SYMBOLS} | PREFIX | EXTRA, UNIGRAM),
    "unigram, default": ({"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"} | PREFIX | EXTRA, UNIGRAM),
    "char": ({"model_type": "char"} | LOOSE, JSON),
    "char, fallback": ({"model_type": "char"}, JSON),
    "char, symbols": ({"model_type": "char", "user_defined_symbols": ["<br>", "ab"]} | LOOSE, JSON),
    "char, default": ({"model_type": "char", "normalization_rule_name": "nmt_nfkc"} | LOOSE | PREFIX | EXTRA, NORMAL),
    "word": ({"model_type": "word"} | LOOSE | PREFIX | EXTRA, "is a word model"),
    "word, fallback": ({"model_type": "word"}, "is a word model"),
}  # fmt: skip
SENTENCES = [
    "The lighthouse keeper kept three notebooks: one for the weather, one for passing ships, 17 March 1893.",
    "清晨六点三十分，江边的渡口还罩着一层薄雾。老船工把缆绳在木桩上绕了两圈，抬头看看天色。",
    "def f(x):  return [a b for a in  range(12)]  # <br> <x y>\tabc ab\t\tqe quite  e",
]


def train(folder: Path, **settings: Any) -> Path:
    (folder / "rules.tsv").write_text("41 42\t44\n61\t\n20AC\t45 55 52\n2581\t5F\n")
    if "normalization_rule_tsv" in settings:
        settings["normalization_rule_tsv"] = str(folder / settings["normalization_rule_tsv"])
    defaults = {"vocab_size": 400, "model_type": "bpe", "character_coverage": 0.98, "byte_fallback": True,
                "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False,
                "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "m"), **(defaults | settings)
    )
    return folder / "m.model"


@pytest.fixture(autouse=True)
def short_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_proof, "_RANDOM_NOISE", 200)
    for name in ("_RANDOM_JOINS", "_RANDOM_JOINS_OF_A_MODEL"):
        monkeypatch.setattr(conversion_proof, name, 300)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_an_exact_form(kind: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    settings, reason = KINDS[kind]
    tokenizer = load_tokenizer(train(tmp_path, **settings))
    assert export_note(tokenizer) == ""
    out = tmp_path / "out"
    out.mkdir()
    why = convert_tokenizer(tokenizer, out, max_length=99)
    assert reason in why and bool(reason) == bool(why)
    assert form_of_folder(out)["form"] == ("sentencepiece" if why else "tokenizer.json")
    assert (why or "tokenizer.json") in form_line(why)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    (out / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    loaded = AutoTokenizer.from_pretrained(str(out))
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    names = [reference.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    texts = [*fuzz_texts(150, 7, names, SYMBOLS), *names]
    for text, expected in zip(texts, reference.encode(texts)):
        assert loaded(text, add_special_tokens=False, verbose=False)["input_ids"] == expected, text
        assert loaded(text, verbose=False)["input_ids"] == [*before, *expected], text
    assert len(loaded) == tokenizer.vocab_size and loaded.model_max_length == 99
    for role in ("bos", "eos", "unk"):
        assert getattr(loaded, f"{role}_token_id") == getattr(tokenizer, f"{role}_id")
    assert loaded(["a", "a b c"], padding=True)["input_ids"] and loaded.pad_token_id < tokenizer.vocab_size
    assert load_tokenizer(out).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("begin", [True, False, None], ids=str)
def test_prompts_begin_as_documents_began(begin: bool | None, tmp_path: Path) -> None:
    """By the class: one of the two puts bos in front, the other is known to transformers 4 too."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(train(tmp_path, model_type="unigram", control_symbols=["<mask>"]))
    (tmp_path / "out").mkdir()
    convert_tokenizer(tokenizer, tmp_path / "out", begin)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    begins = begin is not False
    assert settings["tokenizer_class"] == (WITH_BOS if begins else WITHOUT_BOS)
    assert (settings["add_bos_token"], settings["add_eos_token"], settings["add_prefix_space"]) == (
        begins,
        False,
        False,
    )
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    x = tokenizer.encode("x <mask></s>")
    assert loaded("x <mask></s>")["input_ids"] == ([1, *x] if begins else x)
    assert loaded("<mask>", split_special_tokens=False, add_special_tokens=False)["input_ids"] == [3]
    assert "<mask>" not in loaded.decode([3, *x], skip_special_tokens=True)[:6]
    lines = tokenizer.encode("  两行\n\U0001f600 ")  # bytes, and spaces at both ends
    assert loaded.decode(lines) != text_of(loaded, [1, *lines, 2]) == tokenizer.decode(lines) == "  两行\n\U0001f600 "
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(str(tmp_path / "again"))
    for text in FIXED_TEXTS:
        assert again(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_the_folder_is_compared_like_any_other(tmp_path: Path) -> None:
    path = train(tmp_path, model_type="unigram", normalization_rule_name="nmt_nfkc")
    (tmp_path / "out").mkdir()
    convert_tokenizer(load_tokenizer(path), tmp_path / "out")
    comparison = compare_tokenizers(path, tmp_path / "out", fuzz=300)
    assert comparison.error() is None and comparison.texts == 300


def test_a_text_that_could_spell_a_control_piece_is_refused_and_said_beforehand(tmp_path: Path) -> None:
    """transformers finds ids by the name of the piece, and an unknown word is its own name."""
    tokenizer = load_tokenizer(train(tmp_path, model_type="word", byte_fallback=False))
    assert "could spell that control piece" in export_note(tokenizer)
    (tmp_path / "out").mkdir()
    proto = model_proto(train(tmp_path, control_symbols=["\u9f98\u9f98"], byte_fallback=False))
    merged = next(piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) == 2)
    merged.type = merged.UNUSED  # merged and taken apart again: no list of merges can say so
    unused = load_tokenizer(write_model(proto, tmp_path / "unused.model"))
    assert "into the unused piece" in export_note(unused) and "characters of '\u9f98\u9f98'" in export_note(unused)
    with pytest.raises(RefusedError, match=r"E501.*is a word model, and has no piece for the characters of '<s>'"):
        convert_tokenizer(tokenizer, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_proof_sees_planted_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_hammer.tokenizer import model_folder

    tokenizer = load_tokenizer(train(tmp_path, model_type="unigram"))
    dump = model_folder.dump_json
    for fault in (
        {"split_special_tokens": False},
        {"special_tokens_pattern": "none"},
        {"sp_model_kwargs": {"add_eos": True}},
    ):
        out = tmp_path / str(fault)
        out.mkdir()
        monkeypatch.setattr(model_folder, "dump_json", lambda settings, fault=fault: dump(settings | fault))
        with pytest.raises(RefusedError, match=r"E502.*differ on the text"):
            convert_tokenizer(tokenizer, out)
