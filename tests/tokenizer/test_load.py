"""Both kinds of tokenizer behind one face: ids, bytes of pieces, special ids, fingerprints, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from megatron_hammer.base.errors import DataError
from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from tests.tokenizer.texts import any_text, handmade_model, model_proto, real_model, training_texts, write_model

# ---- sentencepiece ----


@pytest.fixture(scope="module", params=["plain", "with_symbols"])
def trained(request: pytest.FixtureRequest) -> SentencePieceTokenizer:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def reference(plain: SentencePieceTokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(plain.path))


@given(text=any_text())
@settings(max_examples=300, deadline=None)
def test_ids_are_sentencepiece_s_and_decode_back(plain: SentencePieceTokenizer, reference: Any, text: str) -> None:
    ids = plain.encode(text)
    assert ids == reference.encode(text)
    assert not {plain.bos_id, plain.eos_id, plain.unk_id} & set(ids)  # text cannot inject them
    assert plain.decode(ids) == text.replace("\u2581", " ")
    assert plain.decode(np.array([plain.bos_id, *ids, plain.eos_id])) == text.replace("\u2581", " ")
    if "\u2581" not in text:
        assert plain.piece_bytes()[ids].sum() == len(text.encode())


def test_batches_equal_single_texts(trained: SentencePieceTokenizer) -> None:
    texts = list(FIXED_TEXTS) * 3
    single = [trained.encode(text) for text in texts]
    assert trained.encode_batch(texts) == single
    assert trained.encode_batch(texts, threads=2) == single
    assert trained.encode_batch([]) == []


def test_special_ids_and_size(trained: SentencePieceTokenizer) -> None:
    assert (trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id) == (0, 1, 2, None)
    assert trained.vocab_size == len(model_proto(trained.path).pieces)
    lengths = trained.piece_bytes()
    assert lengths.dtype == np.int32 and lengths.shape == (trained.vocab_size,)
    assert lengths[:3].tolist() == [0, 0, 0] and (lengths[3:] > 0).all()


def test_piece_bytes_of_a_dummy_prefix_add_one(tmp_path: Path) -> None:
    pieces = [("\u2581a", -1.0), ("a", -2.0), ("\u2581", -3.0), ("\u4e2d", -4.0)]
    tokenizer = load_tokenizer(write_model(handmade_model(pieces, dummy_prefix=True), tmp_path / "m.model"))
    for text in ("a", " a", "中a\n", "é"):
        assert tokenizer.piece_bytes()[tokenizer.encode(text)].sum() == len(text.encode()) + 1
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_fingerprint_is_of_content(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.model"
    shutil.copy(plain.path, copy)
    proto = model_proto(plain.path)
    proto.trainer_spec.input.append("/some/other/corpus.txt")  # does not decide ids
    metadata = write_model(proto, tmp_path / "metadata.model")
    assert load_tokenizer(copy).fingerprint == load_tokenizer(metadata).fingerprint == plain.fingerprint
    assert len(plain.fingerprint) == 32 and int(plain.fingerprint, 16) >= 0

    def changed(change: Any) -> str:
        proto = model_proto(plain.path)
        change(proto)
        return load_tokenizer(write_model(proto, tmp_path / "changed.model")).fingerprint

    def swap(proto: Any) -> None:
        a, b = proto.pieces[400], proto.pieces[401]
        a.piece, b.piece = b.piece, a.piece

    fingerprints = [
        plain.fingerprint,
        changed(swap),
        changed(lambda proto: setattr(proto.pieces[400], "score", -0.5)),
        changed(lambda proto: setattr(proto.pieces[400], "type", 4)),
        changed(lambda proto: setattr(proto.normalizer_spec, "add_dummy_prefix", True)),
        changed(lambda proto: setattr(proto.trainer_spec, "eos_piece", "<s>")),
        changed(lambda proto: proto.pieces.pop()),
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_folder_with_both_uses_the_model(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    plain.save_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, SentencePieceTokenizer)
    assert loaded.fingerprint == plain.fingerprint
    assert loaded.path.read_bytes() == plain.path.read_bytes()


def test_named_errors(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    whole = plain.path.read_bytes()
    cases: list[tuple[str, bytes | None, str]] = [
        ("none.model", None, "E310.*does not exist"),
        ("empty.model", b"", "E312.*not a whole sentencepiece model"),
        ("text.model", b"hello, this is no model\n", "E312"),
        *((f"cut{n}.model", whole[: len(whole) * n // 7], "E312") for n in range(1, 7)),
        ("short.model", whole[:-1], "E312"),
        ("list.json", b"[]", "E313.*describes no tokenizer"),
        ("config.json", b'{"model_type": "llama"}', "E313"),
        ("broken.json", b'{"model": ', "E313.*not valid JSON"),
        ("latin.json", b'{"model": "\xe9"}', "E313"),
        ("unknown.json", b'{"model": {"type": "Magic", "vocab": {}}}', "E313"),
        ("empty.json", b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}', "E313.*empty"),
    ]
    for name, content, pattern in cases:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=pattern) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="E311"):
        load_tokenizer(tmp_path / "folder")


def test_half_a_surrogate_pair_is_named(plain: SentencePieceTokenizer, byte_level: HuggingFaceTokenizer) -> None:
    for tokenizer in (plain, byte_level):
        for call in (
            lambda t=tokenizer: t.encode("ab\ud800"),
            lambda t=tokenizer: t.encode_batch(["x", "ab\ud800"], 2),
        ):
            with pytest.raises(DataError, match=r"E314.*surrogate pair at character 2"):
                call()


def test_real_models(capfd: pytest.CaptureFixture[str]) -> None:
    expected = {"llama2-7b.model": 32_000, "internlm-7b.model": 103_168, "hammerllm.model": 105_789}
    for name, size in expected.items():
        tokenizer = load_tokenizer(real_model(name))
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (size, 1, 2, None)
    assert tokenizer.encode("a\0b") == [264, 3, 260]  # hammerllm: its NUL piece 354 is never emitted
    assert tokenizer.piece_bytes()[tokenizer.encode("今天天气很好\n\n  x")].sum() == len("今天天气很好\n\n  x".encode())
    assert capfd.readouterr().err == ""  # the library's warnings stay inside


# ---- tokenizers ----


def write_folder(folder: Path, backend: Backend, **files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        training_texts()[:20],
        trainers.BpeTrainer(
            vocab_size=1500,
            special_tokens=["<|endoftext|>", "<|im_start|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    backend = byte_level_backend()
    backend.enable_truncation(5)  # a setting of whoever saved it: must not cut documents
    backend.enable_padding()
    loaded = load_tokenizer(write_folder(tmp_path_factory.mktemp("bl"), backend))
    assert isinstance(loaded, HuggingFaceTokenizer)
    return loaded


@given(any_text())
@settings(max_examples=200, deadline=None)
def test_byte_level_ids(byte_level: HuggingFaceTokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert not {0, 1} & set(ids)  # the special tokens, whatever the text spells
    assert byte_level.decode(ids) == text
    assert byte_level.piece_bytes()[ids].sum() == len(text.encode())
    assert byte_level.encode_batch([text, text], threads=2) == [ids, ids] == byte_level.encode_batch([text] * 2)


def test_non_special_added_tokens_match_and_special_ones_do_not(byte_level: HuggingFaceTokenizer) -> None:
    ids = byte_level.encode("a<tool>b<|endoftext|>")
    assert byte_level.vocab_size - 1 in ids and 0 not in ids
    assert byte_level.decode([0, *ids, 0]) == "a<tool>b<|endoftext|>"
    assert byte_level.piece_bytes()[[0, 1, byte_level.vocab_size - 1]].tolist() == [0, 0, 6]


def test_piece_bytes_of_byte_fallback_and_metaspace(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "\u2581a": 2, "\u4e2d": 3, "<0x41>": 4, "a": 5, "\u2581": 6}
    for decoder in (
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
    ):
        backend = Backend(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Replace(Regex(" "), "\u2581")
        backend.decoder = decoder
        backend.add_special_tokens(["<s>"])
        loaded = load_tokenizer(write_folder(tmp_path, backend))
        assert loaded.piece_bytes().tolist() == [0, 0, 2, 3, 1, 1, 1]
        assert (loaded.bos_id, loaded.eos_id, loaded.unk_id) == (1, None, 0)


def test_piece_bytes_of_wordpiece(tmp_path: Path) -> None:
    backend = Backend(models.WordPiece({"[UNK]": 0, "ab": 1, "##cd": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    assert load_tokenizer(write_folder(tmp_path, backend)).piece_bytes().tolist() == [0, 2, 2]


def test_where_special_ids_come_from(tmp_path: Path) -> None:
    backend = byte_level_backend()
    cases: list[tuple[dict[str, Any], tuple[int | None, ...]]] = [
        ({}, (None, 0)),  # well-known: <|endoftext|> ends a document
        ({"config": {"bos_token_id": 7, "eos_token_id": 8}}, (7, 8)),
        ({"config": {"bos_token_id": 7}, "generation_config": {"eos_token_id": [1, 9]}}, (7, 1)),
        ({"config": {"eos_token_id": 7}, "special_tokens_map": {"eos_token": {"content": "<|im_start|>"}}}, (None, 1)),
        (
            {"special_tokens_map": {"eos_token": "<|im_start|>"}, "tokenizer_config": {"eos_token": "<tool>"}},
            (None, 1500),
        ),
        ({"tokenizer_config": {"bos_token": None, "eos_token": "no such token"}}, (None, 0)),
        ({"config": {"bos_token_id": 1_000_000}}, (None, 0)),
    ]
    fingerprints = []
    for number, (files, expected) in enumerate(cases):
        loaded = load_tokenizer(write_folder(tmp_path / str(number), backend, **files))
        eos = loaded.vocab_size - 1 if expected[1] == 1500 else expected[1]
        assert (loaded.bos_id, loaded.eos_id) == (expected[0], eos), files
        fingerprints.append(loaded.fingerprint)

        saved = tmp_path / f"saved{number}"
        saved.mkdir()
        loaded.save_files(saved)  # what was found beside the file must not get lost
        assert load_tokenizer(saved).fingerprint == loaded.fingerprint
    assert fingerprints[0] == fingerprints[5] == fingerprints[6] and len(set(fingerprints)) == 5


def test_fingerprint_of_a_definition(tmp_path: Path) -> None:
    backend = byte_level_backend()
    first = load_tokenizer(write_folder(tmp_path / "a", backend))
    definition = json.loads((tmp_path / "a/tokenizer.json").read_text())

    def changed(**parts: Any) -> str:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(definition | parts, indent=7))
        return load_tokenizer(path).fingerprint

    model = definition["model"]
    old_style = model | {"merges": [" ".join(pair) for pair in model["merges"]]}
    assert changed() == changed(truncation=None, padding=None) == changed(model=old_style) == first.fingerprint
    assert changed(model=model | {"merges": model["merges"][:-1]}) != first.fingerprint
    assert changed(normalizer={"type": "NFC"}) != first.fingerprint


def test_damaged_configuration_beside_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level_backend())
    for content in ("{", "[]"):
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(DataError, match=r"E313.*tokenizer_config\.json"):
            load_tokenizer(folder)


def test_dropout_is_refused(tmp_path: Path) -> None:
    """Two runs of preprocessing would differ."""
    folder = write_folder(tmp_path, byte_level_backend())
    definition = json.loads((folder / "tokenizer.json").read_text())
    for dropout, refused in ((0.1, True), (1.0, True), (0.0, False), (None, False)):
        definition["model"]["dropout"] = dropout
        (folder / "tokenizer.json").write_text(json.dumps(definition))
        if refused:
            with pytest.raises(DataError, match=rf"E313.*tokenizer.json has BPE dropout \(model.dropout={dropout}\)"):
                load_tokenizer(folder)
        else:
            load_tokenizer(folder)
