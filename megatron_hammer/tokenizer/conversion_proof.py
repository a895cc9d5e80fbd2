"""Tests that a Hugging Face folder gives the same ids and the same decoding as the tokenizer that it was made from.

The folder is loaded with ``AutoTokenizer`` and compared with the source on fixed texts, on every piece, on random joins
of pieces, on noise, and on texts made for the merges whose order matters (``bpe_merges.derive_merges``).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS, join_pieces, noise
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, load_processor

_RANDOM_JOINS = 20_000  # of pieces; with all pieces and the noise, some 10 s for 105,789 pieces on one EPYC core
_RANDOM_NOISE = 2_000


class Mismatch(NamedTuple):
    """A text on which the two differ: its ids, or what they are decoded to."""

    text: str
    expected: Any
    found: Any


def prove_conversion(
    tokenizer: Tokenizer,
    directory: Path,
    pieces: list[str],
    directed: list[str],
    *,
    begins_with_bos: bool | None = None,
) -> None:
    """Load the folder as users will, and compare ids and decoding on all texts of the proof.

    Args:
        tokenizer: the source.
        directory: the folder that was made of it.
        pieces: the pieces of the source as text.
        directed: texts on which the order of merges matters.
        begins_with_bos: whether a call without arguments puts bos before the ids and nothing else, or adds nothing;
            None: not looked at.

    Raises:
        RefusedError: E502.
    """
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(directory))
    except (ValueError, OSError, TypeError) as error:
        raise RefusedError(
            2, str(tokenizer.path), f"is refused by transformers: {error}", "choose another tokenizer"
        ) from None
    if difference := _find_difference(tokenizer, converted, pieces, directed, begins_with_bos):
        text, expected, found = difference
        raise RefusedError(
            2, str(tokenizer.path),
            f"and its Hugging Face form differ on the text {text[:60]!r}: {expected} against {found}",
            "this tokenizer cannot be exported exactly; report it with the file",
        )  # fmt: skip


def _find_difference(
    tokenizer: Tokenizer, converted: Any, pieces: list[str], directed: list[str], begins_with_bos: bool | None
) -> Mismatch | None:
    # The library itself, not our encoder: the proof is about its ids.
    encode: Callable[[list[str]], list[list[int]]] = tokenizer.encode_batch
    if isinstance(tokenizer, SentencePieceTokenizer):
        encode = load_processor(tokenizer.model_bytes, tokenizer.path).encode
    before = [tokenizer.bos_id] if begins_with_bos and tokenizer.bos_id is not None else []
    arguments = {"add_special_tokens": False, "verbose": False}  # no word on texts that are longer than the context
    if not isinstance(tokenizer, SentencePieceTokenizer):  # a given tokenizer.json keeps its owner's default
        arguments["split_special_tokens"] = True
    marks = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    for text in FIXED_TEXTS:
        expected = encode([text])[0]
        found = converted(text, **arguments)["input_ids"]
        if found != expected:
            return Mismatch(text, *_first_difference(expected, found))
        if begins_with_bos is not None:
            by_default = converted(text, **(arguments | {"add_special_tokens": True}))["input_ids"]
            if by_default != [*before, *expected]:
                return Mismatch(text, *_first_difference([*before, *expected], by_default))
        decoded = converted.decode(
            [*marks, *found, *marks], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if decoded != (wanted := tokenizer.decode(found)):
            return Mismatch(text, wanted, decoded)

    # The calls above have set the backend's switches; from here on it is asked directly, in batches.
    backend = converted.backend_tokenizer
    texts = list(_random_texts(pieces)) + directed + pieces
    for start in range(0, len(texts), 4096):
        batch = texts[start : start + 4096]
        expected_ids = encode(batch)
        found_ids = [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
        found_texts = backend.decode_batch(found_ids, skip_special_tokens=True)
        for text, expected, found, decoded in zip(batch, expected_ids, found_ids, found_texts):
            if found != expected:
                return Mismatch(text, *_first_difference(expected, found))
            if decoded != (wanted := tokenizer.decode(expected)):
                return Mismatch(text, wanted, decoded)
    return None


def _random_texts(pieces: list[str]) -> Iterator[str]:
    generator = random.Random(3407)  # the same proof every time
    for _ in range(_RANDOM_NOISE):
        yield noise(generator)
    if not pieces:
        return
    for _ in range(_RANDOM_JOINS):
        yield join_pieces(generator, pieces)


def _first_difference(expected: list[int], found: list[int]) -> tuple[str, str]:
    """Both lists from the first place where they differ, shortened."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    return f"id {at} on {_shorten(expected[at:])}", f"{_shorten(found[at:])}"


def _shorten(ids: Iterable[int]) -> str:
    ids = list(ids)
    return str(ids[:6])[:-1] + (", ...]" if len(ids) > 6 else "]")
