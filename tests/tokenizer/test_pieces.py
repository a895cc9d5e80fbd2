"""What ids stand for: the bytes that texts are made of, for both kinds of tokenizers."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import given, settings

from megatron_hammer.tokenizer.interface import Tokenizer
from tests.tokenizer.texts import any_text, model_proto


def test_pieces_have_the_bytes_that_the_tokenizer_counts(any_kind: Tokenizer) -> None:
    pieces = any_kind.read_pieces()
    assert [len(content) for content in pieces.content] == any_kind.piece_bytes().tolist()
    assert not (pieces.is_byte & pieces.is_text).any()


@given(text=any_text())
@settings(max_examples=60, deadline=None)
def test_pieces_of_ids_spell_the_text(plain: Any, converted_plain: Any, byte_level: Any, text: str) -> None:
    for tokenizer in (plain, converted_plain, byte_level):
        pieces = pieces_of(tokenizer)
        expected = text if tokenizer is byte_level else text.replace("\u2581", " ")
        ids = tokenizer.encode(text)
        assert b"".join(pieces.content[i] for i in ids) == expected.encode()
        assert pieces.characters[ids].sum() == len(text)


pieces_of = functools.cache(lambda tokenizer: tokenizer.read_pieces())


def test_byte_pieces(plain: Tokenizer, byte_level: Tokenizer) -> None:
    proto = model_proto(plain.path)
    expected = [piece.type == proto.SentencePiece.BYTE for piece in proto.pieces]
    assert plain.read_pieces().is_byte.tolist() == expected
    pieces = byte_level.read_pieces()
    for content, is_byte in zip(pieces.content, pieces.is_byte):
        assert is_byte == ("\ufffd" in content.decode(errors="replace"))
