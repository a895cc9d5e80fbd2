"""The compiled encoder against sentencepiece, id by id: trained, hand-made and real models, texts made to break it.

Random texts are fresh in every run; a failure prints the seed.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pybind11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb

from megatron_hammer.base.errors import DataError
from megatron_hammer.tokenizer import encode as fast
from megatron_hammer.tokenizer import sentencepiece_backend
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.lab.fuzz import fuzz_texts
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, load_processor
from tests.tokenizer.texts import REPOSITORY, any_text, handmade_model, model_proto, real_model, write_model

SOURCES = REPOSITORY / "csrc/tokenizer"
KINDS = pb.ModelProto.SentencePiece
compiled = pytest.mark.skipif(fast.COMPILED is None, reason=fast.NOT_COMPILED)

# Scores tie and beat longer pieces; pieces hold newlines, runs of spaces, wide characters beside ASCII, and each other.
TIES = [
    *((a + b, -1.0) for a in "abc" for b in "abc"),
    *((text, -2.0) for text in ("aab", "abb", "ab\u2581", "\u2581a", "\u2581\u2581", "\u2581\u2581\u2581\u2581")),
    *((text, -0.5) for text in ("\n\u2581\u2581\n", "\n\n", "\u2581\u2581\n", "\u4e2d\u6587", "\u6587a", "a\u4e2d")),
    *((text, -3.0) for text in ("\u4e2d\u6587a", "abcabc", "\u2581ab", "\U00020000\u4e2d", "\u00e9\u00e8", "\r\n")),
    *((text, -9.0) for text in "abc\u2581\n\u4e2d\u00e9\U00020000"),
]
SYMBOLS = ("ca", "cab", "7", "\u4e2d\u4e2d", "\u2581x", "b c", "<br>", "<b", "\u6587", "\U00020000")


def proto_of(name: str, plain: SentencePieceTokenizer, with_symbols: SentencePieceTokenizer) -> Any:
    """Small models by name: what is unusual about each."""
    match name:
        case "plain":
            return model_proto(plain.path)
        case "symbols":
            return model_proto(with_symbols.path)
        case "ties":
            return handmade_model(TIES)
        case "ties and symbols":
            return handmade_model([piece for piece in TIES if piece[0] not in SYMBOLS], SYMBOLS)
        case "no piece for a space":
            return handmade_model([("ab", -1.0), ("a", -2.0), ("\u4e2d", -3.0)])
        case "a newline's spaces go on to anything":
            return handmade_model([*TIES, ("\n\u2581", -0.1)])
        case "two spaces behind a newline end a piece":
            return handmade_model([*TIES, ("\n\u2581\u2581", -0.1)])
        case "NUL":
            return handmade_model([*TIES, ("\0", -0.2)])
        case "positive scores":
            return handmade_model([(text, -score) for text, score in TIES])
    proto = proto_of(name.split(", ")[0], plain, with_symbols)
    proto.normalizer_spec.add_dummy_prefix = "prefix" in name
    proto.normalizer_spec.remove_extra_whitespaces = "spaces removed" in name
    if "spaces removed" in name:  # with a space in a symbol, sentencepiece does it
        for piece in proto.pieces:
            if piece.type == KINDS.USER_DEFINED and " " in piece.piece:
                piece.type = KINDS.NORMAL
    return proto


MODELS = [
    "plain", "symbols", "ties", "ties and symbols", "no piece for a space", "a newline's spaces go on to anything",
    "two spaces behind a newline end a piece", "NUL", "positive scores", "plain, prefix", "ties and symbols, prefix",
    "ties, spaces removed", "symbols, prefix, spaces removed", "ties and symbols, prefix, spaces removed",
    "no piece for a space, prefix, spaces removed",
]  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest,
    plain: SentencePieceTokenizer,
    with_symbols: SentencePieceTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> SentencePieceTokenizer:
    proto = proto_of(request.param, plain, with_symbols)
    return SentencePieceTokenizer(write_model(proto, tmp_path_factory.mktemp("model") / "m.model"))


def reference_ids(tokenizer: SentencePieceTokenizer, texts: list[str]) -> list[list[int]]:
    return load_processor(tokenizer.model_bytes, tokenizer.path).encode(texts, num_threads=2)


def assert_equal_ids(tokenizer: SentencePieceTokenizer, texts: list[str], remark: str = "") -> None:
    expected = reference_ids(tokenizer, texts)
    found = tokenizer.encode_batch(texts, threads=2)
    for text, ours, theirs in zip(texts, found, expected):
        assert ours == theirs, f"{text!r} {remark}"
    ids, lengths = tokenizer.encode_documents(texts, threads=2)
    assert lengths.tolist() == [len(x) for x in expected]
    assert ids.tolist() == [i for x in expected for i in x]


def random_texts(tokenizer: SentencePieceTokenizer, count: int, seed: int) -> list[str]:
    """Of the fuzz corpus, with the model's own pieces and symbols."""
    proto = model_proto(tokenizer.path)
    pieces = [piece.piece.replace("\u2581", " ") for piece in proto.pieces if piece.piece]
    symbols = [piece.piece for piece in proto.pieces if piece.type == KINDS.USER_DEFINED]
    return list(fuzz_texts(count, seed, pieces, symbols, ("<s>", "</s>", "<unk>")))


# ---- ids ----


@compiled
def test_every_model_is_encoded_by_us(model: SentencePieceTokenizer) -> None:
    assert model.encoder.startswith("C++")


def test_fresh_random_texts(model: SentencePieceTokenizer) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    assert_equal_ids(model, random_texts(model, 2500, seed), f"seed {seed}")


def competing_text() -> st.SearchStrategy[str]:
    """Texts in which many pieces of the hand-made models lie over each other."""
    fragments = st.sampled_from(
        ["a", "b", "c", "ab", "ca", "cab", " ", "  ", "   ", "\u2581", "\n", "\n ", "\n  ", "\r\n", "\u4e2d", "\u6587",
         "\u4e2d\u4e2d", "\U00020000", "\u00e9", "e\u0301", "7", " x", "b c", "<b", "<br", "<br>", "\0", "\U0001f600",
         "\u9f98", "\u3400", "<s>"]
    )  # fmt: skip
    return st.lists(fragments, max_size=40).map("".join)


@given(texts=st.lists(st.one_of(any_text(), competing_text()), max_size=6))
@settings(max_examples=60, deadline=None)
def test_hard_texts(model: SentencePieceTokenizer, texts: list[str]) -> None:
    assert_equal_ids(model, texts)


def test_long_segments(model: SentencePieceTokenizer) -> None:
    """Beyond each limit: the short cache, the long one, the scan for the best pair, and far beyond."""
    generator = random.Random(5)
    texts = []
    for length in (14, 15, 16, 37, 38, 39, 63, 64, 65, 66, 300, 5000):
        texts += [character * length for character in "a \n\u4e2d\u00e9\0"]
        texts += ["".join(generator.choices(alphabet, k=length)) for alphabet in ("ab", "abc ", "\u4e2d\u6587a", " \n")]
    assert_equal_ids(model, texts)


def test_segments_that_share_a_place_in_a_cache(tmp_path: Path) -> None:
    """Hundreds of pairs of them, alike in length and first bytes, of few enough ids to be remembered."""
    generator = random.Random(9)
    pairs = [a + b for a in "abcde" for b in "abcde"]
    pieces = [*((a + b, -2.0) for a in pairs for b in pairs), *((pair, -1.0) for pair in pairs)]
    pieces += [(letter, -9.0) for letter in "abcde"]
    tokenizer = SentencePieceTokenizer(write_model(handmade_model(pieces), tmp_path / "m.model"))
    for length in (6, 12):  # of 14 bytes and 4 ids, of 20 bytes and 5 ids
        words = ["abcdabcd" + "".join(generator.choices("abcde", k=length)) for _ in range(8000)]
        assert_equal_ids(tokenizer, ["x".join(words), "x".join(reversed(words))])


@pytest.mark.parametrize("name", ["hammerllm", "internlm-7b", "llama2-7b"])
def test_real_models(name: str) -> None:
    tokenizer = SentencePieceTokenizer(real_model(f"{name}.model"))
    seed = int.from_bytes(os.urandom(4), "little")
    assert_equal_ids(tokenizer, random_texts(tokenizer, 10_000, seed), f"seed {seed}")
    sources = [path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("**/*.py"))[:60]]
    sources += [path.read_text(encoding="utf-8") for path in sorted(REPOSITORY.glob("*.md"))]
    assert_equal_ids(tokenizer, sources)
    assert fast.COMPILED is None or tokenizer.encoder.startswith("C++")


# ---- documents ----


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("first, last", [(None, None), (1, None), (None, 2), (1, 2), (0, 0)])
def test_marks_around_documents(
    with_symbols: SentencePieceTokenizer, first: int | None, last: int | None, threads: int
) -> None:
    texts = ["", "a<br>b", "中文\u2581", "", "", " ", "\U0001f600" * 3, "\u00e9", "x" * 70_000, ""]
    ids, lengths = with_symbols.encode_documents(texts, threads, first, last)
    assert ids.dtype == np.int32 and lengths.dtype == np.int64 and ids.flags.owndata | (ids.base is not None)
    expected_ids, expected_lengths = Tokenizer.encode_documents(with_symbols, texts, threads, first, last)
    assert ids.tolist() == expected_ids.tolist() and lengths.tolist() == expected_lengths.tolist()
    assert lengths[0] == 0


@pytest.mark.parametrize("texts", [[], [""], ["", ""], ("a", "b")])
def test_few_documents(plain: SentencePieceTokenizer, texts: Sequence[str]) -> None:
    ids, lengths = plain.encode_documents(texts, 2, 1, 2)
    assert len(lengths) == len(texts) and lengths.sum() == len(ids) == (6 if texts == ("a", "b") else 0)


def test_marks_where_spaces_are_all_there_is(tmp_path: Path) -> None:
    proto = proto_of("ties, prefix, spaces removed", None, None)  # type: ignore[arg-type]  # needs neither
    tokenizer = SentencePieceTokenizer(write_model(proto, tmp_path / "m.model"))
    ids, lengths = tokenizer.encode_documents(["   ", "\u2581 ", " a "], 1, 1, 2)
    assert lengths.tolist() == [0, 0, len(ids)] and ids[0] == 1 and ids[-1] == 2


@pytest.mark.parametrize(
    "unit",
    [
        "The quick brown fox, <br> jumps --- over 77 lazy dogs.\n    return x\n",
        "\u4e2d\u6587abc \n",
        "ab\U00020000c\n  ",
    ],
)
def test_a_huge_document_is_divided_exactly(model: SentencePieceTokenizer, unit: str) -> None:
    """Longer than three parts of 2^18 characters: cut among threads, at places that change nothing."""
    generator = random.Random(7)
    text = "".join(
        unit if generator.random() < 0.9 else generator.choice(" abc7\n<") for _ in range(900_000 // len(unit))
    )
    expected = np.array(reference_ids(model, [text])[0])
    for threads in (1, 2):
        ids, lengths = model.encode_documents(["a", text, "b"], threads, 1, 2)
        first, length = lengths[0], lengths[1]
        assert length == len(expected) + 2
        assert np.array_equal(ids[first + 1 : first + length - 1], expected)


@compiled
def test_a_text_that_comes_in_pieces(model: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids do not depend on how it is handed over; only the first part can have a dummy prefix."""
    monkeypatch.setattr(sentencepiece_backend, "_CUT_CHARACTERS", 4)  # cuts are looked for at almost every place
    seed = random.SystemRandom().randrange(1 << 32)
    rng = random.Random(seed)
    pieces = [piece.piece.replace("\u2581", " ") for piece in model_proto(model.path).pieces if piece.piece]
    cut = 0
    for _ in range(40):
        text = "".join(rng.choice([*rng.choices(pieces, k=3), " ", "x", "\n  "]) for _ in range(rng.randrange(60)))
        places = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(5)))
        handed = [text[a:b] for a, b in zip([0, *places], [*places, len(text)])]
        parts = list(model.encode_pieces(handed, threads=2))
        cut += len(parts) > 1
        assert np.concatenate(parts).tolist() == reference_ids(model, [text])[0], f"{handed!r} (seed {seed})"
    proto = model_proto(model.path).normalizer_spec
    assert (cut > 0) != proto.remove_extra_whitespaces, "nothing was ever cut, or where spaces depend on what is before"


@pytest.mark.parametrize("offset", range(4))
def test_a_huge_document_is_not_divided_inside_a_symbol(offset: int, tmp_path: Path) -> None:
    """The characters of <br> join in no piece, yet a cut between them would lose the symbol."""
    tokenizer = SentencePieceTokenizer(write_model(handmade_model(TIES, ("<br>",)), tmp_path / "m.model"))
    text = "x" * offset + "<br>" * 250_000 + "abc" * 10
    ids, _ = tokenizer.encode_documents([text], 2)
    assert ids.tolist() == reference_ids(tokenizer, [text])[0]


def test_a_huge_document_without_a_cut(tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(write_model(handmade_model(TIES), tmp_path / "m.model"))
    text = "abcab" * 150_000
    ids, _ = tokenizer.encode_documents([text], 2)
    assert ids.tolist() == reference_ids(tokenizer, [text])[0]


def test_several_python_threads_share_an_encoder(with_symbols: SentencePieceTokenizer) -> None:
    texts = random_texts(with_symbols, 1500, 3)
    expected = reference_ids(with_symbols, texts)
    found: list[Any] = [None] * 4

    def encode(number: int) -> None:
        found[number] = [with_symbols.encode_batch(texts, threads=2) for _ in range(3)]

    threads = [threading.Thread(target=encode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[expected] * 3] * 4


@compiled
def test_memory_stays_bounded_over_new_words(plain: SentencePieceTokenizer) -> None:
    """Millions of different segments: the caches replace, they do not grow."""
    generator = random.Random(11)

    def words() -> str:
        return " ".join("".join(generator.choices("abcdefghijkl", k=9)) for _ in range(100_000))

    def resident_mb() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    plain.encode_documents([words()], 1)
    before = resident_mb()
    for _ in range(6):
        plain.encode_documents([words()], 1)
    assert resident_mb() - before < 15


def test_half_a_surrogate_pair(model: SentencePieceTokenizer) -> None:
    for text in ("ab\ud800", "\udfff", "\U0001f600\ud83d"):
        for call in (
            lambda text=text: model.encode(text),
            lambda text=text: model.encode_batch(["x" * 40_000, text], 2),
            lambda text=text: model.encode_documents(["x" * 40_000, text, "y"], 2, 1, 2),
        ):
            with pytest.raises(DataError, match=r"E314.*surrogate pair at character"):
                call()
    assert model.encode("ab") == reference_ids(model, ["ab"])[0]  # and it goes on


@compiled
def test_other_types_are_refused(plain: SentencePieceTokenizer) -> None:
    for wrong in (b"bytes", 1, None):
        with pytest.raises(TypeError):
            plain.encode_documents(["a", wrong], 1)  # type: ignore[list-item]


# ---- what is not for us ----


def spoil(reason: str, proto: Any) -> None:
    match reason:
        case "a unigram model":
            proto.trainer_spec.model_type = pb.TrainerSpec.UNIGRAM
        case "a word model":
            proto.trainer_spec.model_type = pb.TrainerSpec.WORD
        case "a character model":
            proto.trainer_spec.model_type = pb.TrainerSpec.CHAR
        case "no byte fallback":
            del proto.pieces[3:259]
            proto.trainer_spec.byte_fallback = False
        case "spaces as suffixes":
            proto.trainer_spec.treat_whitespace_as_suffix = True
        case "keeps plain spaces":
            proto.normalizer_spec.escape_whitespaces = False
        case "unused pieces":
            proto.pieces[-1].type = KINDS.UNUSED
        case "a score is not a number":
            proto.pieces[-1].score = float("nan")
        case "0 and -0":
            proto.pieces[-1].score, proto.pieces[-2].score = 0.0, -0.0
        case "a space that the model would remove":
            proto.normalizer_spec.remove_extra_whitespaces = True
            proto.pieces.add(piece="x y", score=0, type=KINDS.USER_DEFINED)
        case _:
            raise ValueError(reason)


@compiled
@pytest.mark.parametrize(
    "reason",
    ["a unigram model", "a word model", "a character model", "no byte fallback", "spaces as suffixes",
     "keeps plain spaces", "unused pieces", "a score is not a number", "0 and -0",
     "a space that the model would remove"],
)  # fmt: skip
def test_other_models_go_to_sentencepiece_and_say_so(reason: str, tmp_path: Path) -> None:
    proto = handmade_model(TIES)
    spoil(reason, proto)
    tokenizer = SentencePieceTokenizer(write_model(proto, tmp_path / "m.model"))
    assert tokenizer.encoder.startswith("sentencepiece (") and reason in tokenizer.encoder
    assert_equal_ids(tokenizer, random_texts(tokenizer, 200, 1))


def test_normalising_models_go_to_sentencepiece(plain: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer = SentencePieceTokenizer(real_model("llama_zh_128k.model"))
    assert fast.COMPILED is None or "normalises" in tokenizer.encoder
    assert tokenizer.encode("ｆｕｌｌ　width") == reference_ids(tokenizer, ["full width"])[0]


def test_without_the_compiled_module(
    model: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, plain: SentencePieceTokenizer
) -> None:
    monkeypatch.setattr(fast, "COMPILED", None)
    other = SentencePieceTokenizer(model.path)
    assert other.encoder == f"sentencepiece ({fast.NOT_COMPILED})"
    assert other.fingerprint == model.fingerprint
    assert other.vocab_size == model.vocab_size
    assert (other.bos_id, other.eos_id, other.unk_id, other.pad_id) == (
        model.bos_id, model.eos_id, model.unk_id, model.pad_id,
    )  # fmt: skip
    assert np.array_equal(other.piece_bytes(), model.piece_bytes())
    texts = random_texts(model, 300, 2)
    for ours, theirs in zip(model.encode_documents(texts, 2, 1, 2), other.encode_documents(texts, 2, 1, 2)):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    with pytest.raises(DataError, match="E314"):
        other.encode_documents(["\ud800"])


@compiled
def test_special_ids_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names(**changes: str) -> Any:
        proto = handmade_model(TIES)
        for field, value in changes.items():
            setattr(proto.trainer_spec, field, value)
        return proto

    unnamed = names(unk_piece="nowhere")  # the unknown piece is found without a name
    controls = names(pad_piece="</s>", bos_piece="a", eos_piece="nowhere")
    wrong = names(unk_piece="ab")
    for proto in (names(), unnamed, controls, wrong):
        path = write_model(proto, tmp_path / "m.model")
        ours = SentencePieceTokenizer(path)
        with monkeypatch.context() as patch:
            patch.setattr(fast, "COMPILED", None)
            theirs = SentencePieceTokenizer(path)
        assert (ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id) == (
            theirs.bos_id, theirs.eos_id, theirs.unk_id, theirs.pad_id,
        )  # fmt: skip
        assert ours.fingerprint == theirs.fingerprint


# ---- files ----


@compiled
@pytest.mark.parametrize(
    "change, cause",
    [
        (lambda p: p.pieces.add(piece="ab", score=0, type=KINDS.NORMAL), "is there twice"),
        (lambda p: p.pieces.add(piece="", score=0, type=KINDS.NORMAL), "is empty"),
        (lambda p: p.pieces.add(piece="a\0b", score=0, type=KINDS.NORMAL), "NUL"),
        (lambda p: p.pieces.add(piece="x" * 8000, score=0, type=KINDS.NORMAL), "too long"),
        (lambda p: p.pieces.add(piece="<other>", score=0, type=KINDS.UNKNOWN), "second unknown"),
        (lambda p: p.pieces.add(piece="<0x1>", score=0, type=KINDS.BYTE), "is no byte"),
        (lambda p: p.pieces.add(piece="<0xfg>", score=0, type=KINDS.BYTE), "is no byte"),
        (lambda p: p.pieces.__delitem__(7), "has no piece"),
    ],
)
def test_pieces_that_cannot_be(change: Any, cause: str, tmp_path: Path) -> None:
    proto = handmade_model(TIES)
    change(proto)
    path = write_model(proto, tmp_path / "m.model")
    with pytest.raises(DataError, match=f"E312.*{cause}"):
        SentencePieceTokenizer(path)
    with pytest.raises(DataError, match="E312"):  # sentencepiece says the same in other words
        load_processor(path.read_bytes(), path)


@pytest.mark.parametrize("with_compiled", [pytest.param(True, marks=compiled), False])
def test_a_piece_that_is_no_utf8(with_compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_compiled:
        monkeypatch.setattr(fast, "COMPILED", None)
    content = handmade_model(TIES).SerializeToString().replace("中文".encode(), b"\xe4\xb8\xad\xe6\x96\xff")
    (tmp_path / "m.model").write_bytes(content)
    with pytest.raises(DataError, match=r"E312.*not valid UTF-8"):
        SentencePieceTokenizer(tmp_path / "m.model")


@compiled
def test_garbled_files_are_refused_or_read_as_protobuf_reads_them() -> None:
    """Bytes changed, cut out, put in: the reader accepts what protobuf accepts, and finds the same in it."""
    seed = int.from_bytes(os.urandom(4), "little")
    generator = random.Random(seed)
    whole = handmade_model(TIES[:12], SYMBOLS[:2]).SerializeToString()
    accepted = 0
    for _ in range(4000):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(content))
            if generator.random() < 0.3:
                at = len(content) - 1 - min(at, 60)  # the settings
            match generator.randrange(4):
                case 0:
                    content[at] = generator.randrange(256)
                case 1:
                    content[at] ^= 1 << generator.randrange(8)
                case 2:
                    del content[at : at + generator.randint(1, 9)]
                case _:
                    content[at:at] = bytes(generator.choices(range(256), k=generator.randint(1, 9)))
        try:
            model = fast.COMPILED.Model(bytes(content))
        except ValueError:
            model = None
        try:
            proto: Any = sentencepiece_backend.parse_model(bytes(content), Path("garbled"))
            texts = [piece.piece.encode() for piece in proto.pieces]
            pieces = b"".join(struct.pack("<IfB", len(t), p.score, p.type) + t for t, p in zip(texts, proto.pieces))
        except (DataError, AttributeError):  # a piece that is no UTF-8 comes as bytes
            proto = None
        assert (model is None) == (proto is None), f"seed {seed}: {bytes(content)!r}"
        if proto is None:
            continue
        accepted += 1
        assert model.packed_pieces() == pieces, f"seed {seed}"
        assert model.charsmap() == proto.normalizer_spec.precompiled_charsmap
        for name, value in model.settings().items():
            spec = proto.trainer_spec if hasattr(proto.trainer_spec, name) else proto.normalizer_spec
            assert value == getattr(spec, name), f"seed {seed}: {name}"
        try:
            if not model.unsupported():
                fast.COMPILED.Encoder(model).encode_batch(["ab cab<br>", "中文\n  7"], 1)
        except ValueError:
            pass
    assert accepted > 100


@compiled
@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("content", [b"", b"\x08\x01", b"\x03aab", b"\xff"])
def test_every_field_of_a_model_is_read_as_protobuf_reads_it(number: int, content: bytes) -> None:
    """Behind a whole model, a further field: one that nobody asks for must parse where it is a message."""
    field = bytes([number << 3 | 2, len(content)]) + content
    whole = handmade_model(TIES[:12], SYMBOLS[:2]).SerializeToString() + field
    try:
        sentencepiece_backend.parse_model(whole, Path("model"))
    except DataError:
        with pytest.raises(ValueError, match="does not parse"):
            fast.COMPILED.Model(whole)
    else:
        fast.COMPILED.Model(whole)


@compiled
def test_loading_and_encoding_do_without_sentencepiece(plain: SentencePieceTokenizer) -> None:
    code = (
        "import sys\n"
        "from megatron_hammer.tokenizer.load import load_tokenizer\n"
        f"tokenizer = load_tokenizer({str(plain.path)!r})\n"
        "assert len(tokenizer.encode_documents(['a b', '中'], 2)[0]) and tokenizer.encode('x')\n"
        "loaded = {'sentencepiece', 'google.protobuf', 'tokenizers', 'torch'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert tokenizer.decode(tokenizer.encode('a b')) == 'a b'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_sources_compile_without_warnings() -> None:
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror"]
    for include in (pybind11.get_include(), sysconfig.get_paths()["include"]):
        options += ["-isystem", include]
    sources = sorted(map(str, SOURCES.glob("*.cpp")))
    done = subprocess.run(["g++", *options, *sources], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
