"""What each id of a tokenizer stands for: a piece of text, a single byte, or nothing that text can spell.

Read from the tokenizer's own file, so it needs neither the sentencepiece nor the tokenizers library::

    tokenizer.model   pieces, each with a type: byte, normal, user-defined; those of other types spell nothing
    tokenizer.json    vocabulary and added tokens; its decoding steps say which bytes a token stands for
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

SPACE = "\u2581"
"""The lower one eighth block that stands for a space in sentencepiece's pieces."""


class Pieces(NamedTuple):
    """What each id of a tokenizer stands for."""

    content: list[bytes]
    """UTF-8, spaces as spaces; empty for control pieces and unused ids."""
    is_byte: np.ndarray
    """[vocab_size] bool: byte pieces, ``<0x..>`` of byte fallback or byte-level pieces that are no whole characters."""
    is_text: np.ndarray
    """[vocab_size] bool: pieces of whole characters; False for byte, control and unknown pieces."""

    @property
    def lengths(self) -> np.ndarray:
        """[vocab_size] int32: bytes of each."""
        return np.fromiter(map(len, self.content), np.int32, len(self.content))

    @property
    def characters(self) -> np.ndarray:
        """[vocab_size] int32: characters that begin in each. Those of a text's ids add up to the text's, also where
        several byte pieces make one character: it counts with its first byte."""
        begins = (np.frombuffer(b"".join(self.content), np.uint8) & 0xC0) != 0x80  # no continuation byte of UTF-8
        ends = np.cumsum(self.lengths, dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(begins, dtype=np.int64)])
        counts: np.ndarray = before[ends] - before[ends - self.lengths]
        return counts.astype(np.int32)


def _collect(found: Iterable[tuple[int, bytes, bool]], vocab_size: int) -> Pieces:
    """Pieces of (id, content, whether it is a byte piece); the ids that are not named stand for nothing."""
    content = [b""] * vocab_size
    is_byte = np.zeros(vocab_size, dtype=bool)
    for index, text, byte in found:
        content[index], is_byte[index] = text, byte
    return Pieces(content, is_byte, np.array([bool(text) for text in content], dtype=bool) & ~is_byte)


# ---- of a sentencepiece model ----

# Types of pieces, as sentencepiece_model.proto numbers them.
NORMAL, USER_DEFINED, BYTE = 1, 4, 6
_PACKED = struct.Struct("<IfB")  # bytes of the text, score, type; the text follows


def pack_pieces(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """Text, score and type of each piece of a model, one after the other, as the compiled encoder gives them too."""
    packed = bytearray()
    for text, score, kind in pieces:
        content = text.encode()
        packed += _PACKED.pack(len(content), score, kind) + content
    return bytes(packed)


def unpack_pieces(packed: bytes) -> Iterator[tuple[bytes, float, int]]:
    """The inverse of ``pack_pieces``; the text stays UTF-8."""
    place = 0
    while place < len(packed):
        size, score, kind = _PACKED.unpack_from(packed, place)
        place += _PACKED.size + size
        yield packed[place - size : place], score, kind


def pieces_of_model(packed: bytes, vocab_size: int) -> Pieces:
    """What the ids of a sentencepiece model stand for.

    Args:
        packed: all its pieces, by ``pack_pieces``.
    """
    space = SPACE.encode()

    def found() -> Iterator[tuple[int, bytes, bool]]:
        for index, (text, _, kind) in enumerate(unpack_pieces(packed)):
            if kind == BYTE:
                yield index, bytes([int(text[3:5], 16)]), True
            elif kind in (NORMAL, USER_DEFINED):
                yield index, text.replace(space, b" "), False

    return _collect(found(), vocab_size)


# ---- of a tokenizer.json ----


def pieces_of_definition(definition: dict[str, Any], vocab_size: int) -> Pieces:
    """What the ids of a ``tokenizer.json`` stand for.

    Args:
        definition: the file's content.
    """
    return _collect(_definition_pieces(definition), vocab_size)


def _definition_pieces(definition: dict[str, Any]) -> Iterator[tuple[int, bytes, bool]]:
    vocabulary = definition["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: [piece, score] in order of ids
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        unknown = next((t for t, i in vocabulary.items() if i == definition["model"].get("unk_id")), None)
    else:
        unknown = definition["model"].get("unk_token")
    added = {token["content"]: token for token in definition.get("added_tokens") or []}
    decoders = flatten_decoders(definition.get("decoder"))
    for token, index in vocabulary.items():
        if token not in added and token != unknown:
            yield index, *_decoded(token, decoders)
    for token, entry in added.items():
        if not entry.get("special") and token != unknown:
            yield vocabulary.get(token, entry["id"]), token.encode(), False


def _decoded(token: str, decoders: list[dict[str, Any]]) -> tuple[bytes, bool]:
    """(bytes that a token stands for, whether it is a byte piece: the fallback's, or no whole characters)."""
    content = decode_token(token, decoders)
    fallback = is_fallback_byte(token) and any(step.get("type") == "ByteFallback" for step in decoders)
    return content, fallback or not _is_whole(content)


def _is_whole(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def flatten_decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The decoding steps of a tokenizer.json in their order, nested sequences opened."""
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", []) for step in flatten_decoders(part)]
    return [decoder]


def decode_token(token: str, decoders: list[dict[str, Any]]) -> bytes:
    """The bytes of text that one token stands for, by what each decoding step does to it."""
    for step in decoders:
        match step.get("type"):
            case "ByteLevel" if all(character in BYTE_LEVEL_ALPHABET for character in token):
                return bytes(BYTE_LEVEL_ALPHABET[character] for character in token)
            case "ByteFallback" if is_fallback_byte(token):
                return bytes([int(token[3:5], 16)])
            case "Metaspace":
                token = token.replace(step.get("replacement", SPACE), " ")
            case "Replace" if "String" in step.get("pattern", {}):
                token = token.replace(step["pattern"]["String"], step.get("content", ""))
            case "BPEDecoder":
                token = token.replace(step.get("suffix", "</w>"), " ")
            case "WordPiece":
                token = token.removeprefix(step.get("prefix", "##"))
    return token.encode()


def is_fallback_byte(token: str) -> bool:
    """Whether a token has the form ``<0xNN>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 is itself, the rest U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()
