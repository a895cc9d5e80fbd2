"""Text that is on every machine, models made by hand, and the places of the real ones."""

from __future__ import annotations

import hashlib
import inspect
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as pb

REPOSITORY = Path(__file__).parents[2]
REAL_MODELS = REPOSITORY.parent / "shared" / "tokenizers"

SYMBOLS = ["<br>", "<strong>", "---", "--", "7", "\\357\\274\\220", "两个 词", "<sep"]


class Texts:
    """A ``TextSource`` from a list."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def describe(self) -> list[dict[str, Any]]:
        return [{"name": "list", "sha256": hashlib.sha256("".join(self.texts).encode()).hexdigest()}]


def training_texts() -> list[str]:
    """Some 0.5 MB of Chinese, English and code."""
    modules = [inspect, json, random, hashlib, pytest]
    code = [Path(inspect.getfile(module)).read_text(encoding="utf-8") for module in modules]
    code += [Path(inspect.getfile(json)).with_name(name).read_text() for name in ("decoder.py", "encoder.py")]
    from pydoc_data.topics import topics

    essays = [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "examples/corpus").glob("*.txt"))]
    return [*essays, *(topics[name] for name in sorted(topics)[:40]), *code]


def real_model(name: str) -> Path:
    path = REAL_MODELS / name
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return path


def any_text() -> st.SearchStrategy[str]:
    """Texts that tokenizers find hard; no lone surrogates, which no UTF-8 file can hold."""
    character = st.characters(exclude_categories=["Cs"])
    fragment = st.sampled_from(
        ["  ", "    ", "\n", "\r\n", "\t", "\0", "\u2581", "<s>", "</s>", "<unk>", "<0x41>", "中文，", "漢字。", "12",
         "def f(",
         "    return", "---", "<br>", "<str", "😀", "\u200d", "hello", " world", "<|endoftext|>"]
    )  # fmt: skip
    return st.lists(st.one_of(fragment, st.text(character, max_size=8)), max_size=12).map("".join)


def model_proto(path: Path) -> Any:
    proto = pb.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def write_model(proto: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return path


def handmade_model(pieces: list[tuple[str, float]], symbols: tuple[str, ...] = (), dummy_prefix: bool = False) -> Any:
    """A BPE model with byte fallback and just these normal pieces, after unk, bos, eos, the bytes and the symbols."""
    proto = pb.ModelProto()

    def add(piece: str, score: float, kind: int) -> None:
        proto.pieces.add(piece=piece, score=score, type=kind)

    kinds = pb.ModelProto.SentencePiece
    add("<unk>", 0, kinds.UNKNOWN)
    add("<s>", 0, kinds.CONTROL)
    add("</s>", 0, kinds.CONTROL)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0, kinds.BYTE)
    for symbol in symbols:
        add(symbol, 0, kinds.USER_DEFINED)
    for piece, score in pieces:
        add(piece, score, kinds.NORMAL)
    proto.trainer_spec.model_type = pb.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto
