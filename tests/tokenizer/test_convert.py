"""The Hugging Face folder: equal ids and texts through AutoTokenizer, and a proof that turns red when it should."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.tokenizer import convert, definition
from megatron_hammer.tokenizer.convert import convert_tokenizer, publish_tokenizer
from megatron_hammer.tokenizer.definition import derive_merges
from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from tests.tokenizer.faults import plant
from tests.tokenizer.test_load import byte_level_backend, write_folder
from tests.tokenizer.texts import handmade_model, model_proto, real_model, training_texts, write_model


def auto(folder: Path, **arguments: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), **arguments)


def test_folder_is_equal_by_default_and_beside_a_llama_config(
    with_symbols: SentencePieceTokenizer, tmp_path: Path
) -> None:
    convert_tokenizer(with_symbols, tmp_path)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert load_tokenizer(tmp_path).fingerprint == with_symbols.fingerprint
    reference = sentencepiece.SentencePieceProcessor(model_file=str(with_symbols.path))
    texts = [*FIXED_TEXTS, *(text[:2000] for text in training_texts())]
    for config in (None, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1}):
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        tokenizer = auto(tmp_path)
        assert len(tokenizer) == with_symbols.vocab_size
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
        for text in texts:
            ids = reference.encode(text)
            assert tokenizer(text)["input_ids"] == [1, *ids]
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
            assert tokenizer.decode([1, *ids, 2], skip_special_tokens=True) == reference.decode(ids)
        assert tokenizer(texts, add_special_tokens=False)["input_ids"] == reference.encode(texts)
        batch = tokenizer(texts, padding=True)["input_ids"]
        assert len({len(ids) for ids in batch}) == 1 and min(batch, key=lambda ids: -ids.count(0))[-1] == 0


def test_text_cannot_spell_special_tokens_by_default(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    convert_tokenizer(plain, tmp_path)
    x = plain.encode("x")
    assert 1 not in auto(tmp_path)("<s>x", add_special_tokens=False)["input_ids"]
    assert auto(tmp_path)("<s>x", split_special_tokens=False)["input_ids"] == [1, 1, *x]
    assert auto(tmp_path, add_bos_token=False)("x")["input_ids"] == x


@pytest.mark.parametrize("begin, prefix", [(None, False), (True, True), (False, False)], ids=str)
def test_all_readers_begin_prompts_as_documents_began(begin: bool | None, prefix: bool, tmp_path: Path) -> None:
    """transformers and those around it read the tokenizer.json, llama.cpp and Ollama the settings beside it."""
    proto = handmade_model([("ab", -1.0), ("a", -2.0), ("b", -3.0), ("\u2581", -4.0)], dummy_prefix=prefix)
    tokenizer = load_tokenizer(write_model(proto, tmp_path / "m.model"))
    (tmp_path / "out").mkdir()
    convert_tokenizer(tokenizer, tmp_path / "out", begin, max_length=77)
    expected = tokenizer.encode("ab") if begin is False else [1, *tokenizer.encode("ab")]
    loaded = auto(tmp_path / "out")
    assert loaded("ab")["input_ids"] == expected and loaded.model_max_length == 77
    assert Backend.from_file(str(tmp_path / "out" / "tokenizer.json")).encode("ab").ids == expected
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is (begin is not False) and settings["add_eos_token"] is False
    assert settings["add_prefix_space"] is prefix and settings["pad_token"] == loaded.pad_token == "<unk>"
    gguf = pytest.importorskip("gguf", reason="llama.cpp's reader")
    special = gguf.vocab.SpecialVocab(tmp_path / "out", n_vocab=tokenizer.vocab_size)
    assert {"bos": begin is not False, "eos": False}.items() <= special.add_special_token.items()
    assert special.special_token_ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}


@pytest.mark.parametrize("begin", [None, True, False], ids=str)
@pytest.mark.parametrize("processor", [
    None, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    {"type": "RobertaProcessing", "sep": ["<|endoftext|>", 0], "cls": ["<|im_start|>", 1], "trim_offsets": True,
     "add_prefix_space": False},
], ids=["none", "bytes", "roberta"])  # fmt: skip
def test_a_given_definition_begins_prompts_as_documents_began(
    processor: dict[str, Any] | None, begin: bool | None, tmp_path: Path
) -> None:
    source = write_folder(tmp_path / "a", byte_level_backend(), config={"bos_token_id": 1, "eos_token_id": 0})
    definition = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(definition | {"post_processor": processor}))
    tokenizer = load_tokenizer(source)
    (tmp_path / "b").mkdir()
    convert_tokenizer(tokenizer, tmp_path / "b", begin)
    x = tokenizer.encode("x y")
    roberta = begin is None and processor is not None and processor["type"].startswith("Roberta")
    expected = [1, *x, 0] if roberta else [1, *x] if begin else x
    assert auto(tmp_path / "b")("x y")["input_ids"] == expected
    settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (expected[0] == 1, expected[-1] == 0)
    assert settings["add_prefix_space"] is False and settings["pad_token"] == "<|endoftext|>"
    assert load_tokenizer(tmp_path / "b").fingerprint == tokenizer.fingerprint


def test_saved_again_by_transformers(with_symbols: SentencePieceTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    convert_tokenizer(with_symbols, tmp_path / "a")
    auto(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = auto(tmp_path / "b")
    for text in FIXED_TEXTS:
        assert again(text)["input_ids"] == [1, *with_symbols.encode(text)]


@pytest.mark.parametrize("name", ["llama2-7b", "internlm-7b", "hammerllm"])
def test_real_models(name: str, converted: Callable[[str], Path]) -> None:
    tokenizer = load_tokenizer(real_model(f"{name}.model"))
    backend = Backend.from_file(str(converted(name) / "tokenizer.json"))
    backend.encode_special_tokens = True
    texts = training_texts()
    assert [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)] == tokenizer.encode_batch(texts)


# ---- the derivation ----


def random_model(generator: random.Random, scores: int | None) -> Any:
    """A few pieces over three letters; each its own score, or one of a few (merged vocabularies have many equals)."""
    pieces = list("abc")
    for _ in range(generator.randint(3, 14)):
        piece = generator.choice(pieces) + generator.choice(pieces)
        if piece not in pieces and len(piece) <= 5:
            pieces.append(piece)
    long = [piece for piece in pieces if len(piece) > 1]
    generator.shuffle(long)
    scored = [
        (piece, float(-index if scores is None else -generator.randint(0, scores))) for index, piece in enumerate(long)
    ]
    symbols = ("cab", "ba") if generator.random() < 0.3 else ()
    letters = [(letter, -1000.0 - ord(letter)) for letter in "abc"]
    return handmade_model([p for p in scored if p[0] not in symbols] + letters, symbols)


ALL_SHORT_TEXTS = ["".join(t) for n in range(1, 8) for t in itertools.product("abc", repeat=n)]


def differing_texts(proto: Any) -> list[str]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    merges, _ = derive_merges(proto, Path("m"))
    backend = Backend.from_str(json.dumps(definition.build_definition(proto, merges)))
    found = backend.encode_batch_fast(ALL_SHORT_TEXTS, add_special_tokens=False)
    expected = processor.encode(ALL_SHORT_TEXTS)
    return [t for t, a, b in zip(ALL_SHORT_TEXTS, expected, found) if a != b.ids]


def test_distinct_scores_are_always_exact() -> None:
    """On every text of up to seven letters, for vocabularies whose ids, scores and lengths have no order in common."""
    for seed in range(50):
        assert differing_texts(random_model(random.Random(seed), None)) == [], seed


def test_equal_scores_are_exact_wherever_one_order_can_do_it() -> None:
    """Some random vocabularies with equals cannot be written as ranks (ab and ba in "aba" and "bab"): most can."""
    differing = sum(bool(differing_texts(random_model(random.Random(seed), 6))) for seed in range(50))
    assert differing <= 5, differing  # ranks in the order of ids, without the demands: 14


def test_runs_of_equal_pieces_grow_from_the_left(tmp_path: Path) -> None:
    """Llama 2's runs of spaces all have the same score: the rule (b)."""
    runs = [("\u2581" * n, -5.0) for n in range(2, 9)]
    proto = handmade_model([*runs, ("\u2581", -6.0), ("x", -7.0)])
    convert_tokenizer(load_tokenizer(write_model(proto, tmp_path / "m.model")), tmp_path)


def test_one_merge_a_piece(plain: SentencePieceTokenizer) -> None:
    merges, _ = derive_merges(model_proto(plain.path), plain.path)
    made = [a + b for a, b in merges]
    assert len(set(made)) == len(made)


def test_dummy_prefix_and_unused_characters(tmp_path: Path) -> None:
    pieces = [
        ("\u2581a", -1.0),
        ("ab", -2.0),
        ("a", -3.0),
        ("b", -4.0),
        ("\u2581", -5.0),
        ("\u00e9", -6.0),
        ("<", -7.0),
    ]
    proto = handmade_model(pieces, dummy_prefix=True)
    proto.pieces[-2].type = proto.SentencePiece.UNUSED
    proto.pieces.add(piece="<unused_264>", score=-8.0)  # the name that the unused one would get
    tokenizer = load_tokenizer(write_model(proto, tmp_path / "m.model"))
    assert tokenizer.encode("\u00e9") == [263, 3 + 0xC3, 3 + 0xA9]
    convert_tokenizer(tokenizer, tmp_path)
    assert auto(tmp_path)("\u00e9 ab")["input_ids"][1:] == tokenizer.encode("\u00e9 ab")


# ---- what has no tokenizer.json ----


def spoil(kind: str, proto: Any) -> None:
    match kind:
        case "is a word model":
            proto.trainer_spec.model_type = proto.trainer_spec.WORD
        case "normalises characters":
            spec = model_proto(real_model("llama_zh_128k.model")).normalizer_spec
            proto.normalizer_spec.CopyFrom(spec)
        case "has user-defined symbols and removes extra spaces":
            proto.normalizer_spec.remove_extra_whitespaces = True
            proto.pieces.add(piece="<sym>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
        case "does not escape spaces":
            proto.normalizer_spec.escape_whitespaces = False
        case "puts a space at the end of every text":
            proto.trainer_spec.treat_whitespace_as_suffix = proto.normalizer_spec.add_dummy_prefix = True
        case "both a dummy prefix and user-defined symbols":
            proto.normalizer_spec.add_dummy_prefix = True
            proto.pieces.add(piece="<sym>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
        case "merges into the unused piece 'ab'":
            proto.pieces[259].type = proto.SentencePiece.UNUSED
        case "merges the character 'b', which has no piece":
            proto.pieces[261].piece = "z"
        case "differ on the text":
            proto.pieces.add(piece="ba", score=-1.0)  # "aba" and "bab" demand two orders


@pytest.mark.parametrize(
    "rule",
    [
        "is a word model", "normalises characters", "has user-defined symbols and removes extra spaces",
        "does not escape spaces", "puts a space at the end of every text",
        "both a dummy prefix and user-defined symbols", "merges into the unused piece 'ab'",
        "merges the character 'b', which has no piece", "differ on the text",
    ],
)  # fmt: skip
def test_what_cannot_be_expressed_is_written_with_the_model(rule: str, tmp_path: Path) -> None:
    proto = handmade_model([("ab", -1.0), ("a", -2.0), ("b", -3.0)])
    spoil(rule, proto)
    tokenizer = load_tokenizer(write_model(proto, tmp_path / "m.model"))
    (tmp_path / "out").mkdir()
    assert rule in convert_tokenizer(tokenizer, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "spiece.model", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    assert auto(tmp_path / "out")("bab aba")["input_ids"] == [1, *tokenizer.encode("bab aba")]


@pytest.mark.parametrize(
    "fault", ["merges by id", "prefix", "symbols dropped", "NUL", "wrong decoder", "specials match", "bos"]
)
def test_the_proof_sees_planted_faults(
    fault: str, with_symbols: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the stock conversion's mistakes, and some others, planted into what is written."""
    build = definition.build_definition

    def planted(proto: Any, merges: list[tuple[str, str]]) -> dict[str, Any]:
        definition = build(proto, merges)
        plant(fault, definition)
        return definition

    def planted_settings(settings: dict[str, Any]) -> bytes:
        if "split_special_tokens" in settings:
            settings["split_special_tokens"] = fault != "specials match"
        return json.dumps(settings).encode()

    monkeypatch.setattr(definition, "build_definition", planted)
    if fault == "bos":  # planted, and then not set right
        monkeypatch.setattr(convert, "begin_with", lambda *_: None)
    monkeypatch.setattr(convert, "dump_json", planted_settings)
    monkeypatch.setattr(convert, "model_obstacle", lambda *_: "the model takes no refused file's place")
    with pytest.raises(RefusedError, match=r"E501.*differ on the text"):
        convert_tokenizer(with_symbols, tmp_path)


# ---- a given tokenizer.json ----


def test_given_definition_is_copied_and_proved(tmp_path: Path) -> None:
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "auto_map": {"AutoTokenizer": ["x.Y", None]},
        "eos_token": "<|endoftext|>",
    }
    source = write_folder(tmp_path / "a", byte_level_backend(), tokenizer_config=config, config={"bos_token_id": 1})
    (source / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(source)
    (tmp_path / "b").mkdir()
    convert_tokenizer(tokenizer, tmp_path / "b")
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (tmp_path / "b/chat_template.jinja").is_file()
    assert load_tokenizer(tmp_path / "b").fingerprint == tokenizer.fingerprint
    loaded = auto(tmp_path / "b")
    assert (loaded.bos_token, loaded.eos_token) == ("<|im_start|>", "<|endoftext|>")
    assert loaded("a<|endoftext|>")["input_ids"][-1] == 0  # its owner's default is kept


def test_roles_that_a_tokenizer_lacks_stay_empty_in_a_folder_of_qwen2(tmp_path: Path) -> None:
    """transformers reads it with a class that has an unk of its own where none is named."""
    source = write_folder(tmp_path / "a", byte_level_backend(), tokenizer_config={"eos_token": "<|endoftext|>"})
    tokenizer = load_tokenizer(source)
    (tmp_path / "b").mkdir()
    convert_tokenizer(tokenizer, tmp_path / "b")
    (tmp_path / "b/config.json").write_text('{"model_type": "qwen2"}')
    loaded = auto(tmp_path / "b")
    assert type(loaded).__name__ == "Qwen2Tokenizer" and len(loaded) == tokenizer.vocab_size
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (None, 0, None)


def test_a_given_definition_may_hold_its_eos_as_an_ordinary_token(tmp_path: Path) -> None:
    """transformers makes it special; by default a text matches it there as it does here."""
    source = write_folder(tmp_path / "a", byte_level_backend())
    definition = json.loads((source / "tokenizer.json").read_text())
    for token in definition["added_tokens"]:
        token["special"] = token["content"] != "<|endoftext|>"
    (source / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(source)
    (tmp_path / "b").mkdir()
    assert convert_tokenizer(tokenizer, tmp_path / "b") == "" and tokenizer.encode("<|endoftext|>") == [0]
    for text in ("a<|endoftext|> b", "<|endoftext|><|endoftext|>"):
        assert auto(tmp_path / "b")(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_given_definition_that_transformers_reads_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(write_folder(tmp_path / "a", byte_level_backend()))
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(tokenizer, "encode", lambda text: [5])
    with pytest.raises(RefusedError, match="E502"):
        convert_tokenizer(tokenizer, tmp_path / "b")


def test_of_a_model_with_byte_fallback_nothing_is_parsed_to_know_that_it_can_be_exported(
    with_symbols: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "parse_model", lambda *_: pytest.fail("the loaded tokenizer knows"))
    assert with_symbols.has_byte_fallback and convert.export_note(with_symbols) == ""


def test_conversion_is_published_whole_or_not_at_all(
    with_symbols: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    for name, rule in (("full", "is not empty"), ("full/mine.txt", "is a file")):
        with pytest.raises(RefusedError, match=f"E506.*{rule}"):
            publish_tokenizer(with_symbols.path, tmp_path / name)
    model = write_model(handmade_model([("ab", -1.0), ("a", -2.0), ("b", -3.0)]), tmp_path / "m.model")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "model_obstacle", lambda *_: "cannot be read")
        patch.setattr(definition, "json_obstacle", lambda *_: "is of another world")
        with pytest.raises(RefusedError, match=r"E501.*is of another world, and cannot be read"):
            publish_tokenizer(model, tmp_path / "refused")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "m.model"]
    assert (tmp_path / "full" / "mine.txt").read_text() == "kept"

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(convert, "prove_conversion", lambda *_, **__: (tmp_path / "empty" / "late.txt").write_text("x"))
    with pytest.raises(OSError):  # filled while we worked: a rename does not replace it
        publish_tokenizer(with_symbols.path, tmp_path / "empty")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["late.txt"]
    (tmp_path / "empty" / "late.txt").unlink()
    monkeypatch.setattr(convert, "prove_conversion", lambda *_, **__: None)
    publish_tokenizer(with_symbols.path, tmp_path / "empty")
    assert load_tokenizer(tmp_path / "empty").fingerprint == with_symbols.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "m.model"]
