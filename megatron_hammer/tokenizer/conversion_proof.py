"""Tests that a Hugging Face folder gives the same ids and the same decoding as the tokenizer that it was made from.

The folder is loaded with ``AutoTokenizer`` and compared with the source on fixed texts, on every piece, on random joins
of pieces, on noise, and on texts made for the merges whose order matters (``definition.derive_merges``).

Decoding is compared where no id is unk: the text that was unknown is lost, and each library has its own sign for that.
Nor are spaces at the beginning where the model removes extra ones: sentencepiece then drops one of every leading piece,
which only a text with a literal U+2581 has several of. It is not compared at all for a folder around a sentencepiece
model (``model_folder.py``).

A given tokenizer.json may hold a token as an ordinary one, which a text matches, that its settings make special (an
eos, say). By default transformers matches it too, with ``split_special_tokens`` not: it is compared by default alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.tokenizer.hard_texts import FIXED_TEXTS, join_pieces, noise
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer

_RANDOM_JOINS = 20_000  # of pieces; with all pieces and the noise, some 10 s for 105,789 pieces on one EPYC core
_RANDOM_NOISE = 2_000
_RANDOM_JOINS_OF_A_MODEL = 4_000  # for a folder that hands its texts to sentencepiece: there is no order of merges


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
    converted = _load(tokenizer, directory)
    difference = _find_difference(tokenizer, converted, pieces, directed, begins_with_bos)
    if difference is not None:
        raise _refused(tokenizer, difference)


def prove_ids(tokenizer: Tokenizer, directory: Path, pieces: list[str], *, begins_with_bos: bool) -> None:
    """As ``prove_conversion``, for a folder around a sentencepiece model: ids, by default and without special tokens.

    Raises:
        RefusedError: E502.
    """
    converted = _load(tokenizer, directory)
    texts = [*FIXED_TEXTS, *_random_texts(pieces, _RANDOM_JOINS_OF_A_MODEL), *pieces]
    before = [tokenizer.bos_id] if begins_with_bos and tokenizer.bos_id is not None else []
    wanted = _reference(tokenizer)(texts)
    found = converted(texts, add_special_tokens=False, verbose=False)["input_ids"]
    by_default = converted(texts, verbose=False)["input_ids"]
    for text, expected, plain, prompt in zip(texts, wanted, found, by_default):
        for ours, theirs in ((expected, plain), ([*before, *expected], prompt)):
            if ours != theirs:
                raise _refused(tokenizer, Mismatch(text, *_first_difference(ours, theirs)))


def _load(tokenizer: Tokenizer, directory: Path) -> Any:
    """The folder, as its users load it."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except (ValueError, OSError, TypeError) as error:
        raise RefusedError(
            2, str(tokenizer.path), f"is refused by transformers {transformers.__version__}: {error}",
            "install transformers 5, or choose another tokenizer",
        ) from None  # fmt: skip


def _reference(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """The ids that the proof is about: the library's itself, not our encoder's."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        encode: Callable[[list[str]], list[list[int]]] = tokenizer.processor.encode
        return encode
    return tokenizer.encode_batch


def _refused(tokenizer: Tokenizer, difference: Mismatch) -> RefusedError:
    text, expected, found = difference
    return RefusedError(
        2, str(tokenizer.path),
        f"and its Hugging Face form differ on the text {text[:60]!r}: {expected} against {found}",
        "this tokenizer cannot be exported exactly; report it with the file",
    )  # fmt: skip


def _find_difference(
    tokenizer: Tokenizer, converted: Any, pieces: list[str], directed: list[str], begins_with_bos: bool | None
) -> Mismatch | None:
    made_special = _made_special(tokenizer, converted)
    texts = _without(made_special, [*_random_texts(pieces, _RANDOM_JOINS), *directed, *pieces])
    encode = _reference(tokenizer)
    removes = isinstance(tokenizer, SentencePieceTokenizer) and tokenizer.removes_extra_spaces
    trim: Callable[[str], str] = (lambda text: text.lstrip(" ")) if removes else str
    before = [tokenizer.bos_id] if begins_with_bos and tokenizer.bos_id is not None else []
    arguments = {"add_special_tokens": False, "verbose": False}  # no word on texts that are longer than the context
    if not isinstance(tokenizer, SentencePieceTokenizer):  # a given tokenizer.json keeps its owner's default
        arguments["split_special_tokens"] = True
    marks = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    for text in _without(made_special, FIXED_TEXTS):
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
        if tokenizer.unk_id not in found and trim(decoded) != trim(wanted := tokenizer.decode(found)):
            return Mismatch(text, wanted, decoded)

    # The calls above have set the backend's switches; from here on it is asked directly, in batches.
    backend = converted.backend_tokenizer
    for start in range(0, len(texts), 4096):
        batch = texts[start : start + 4096]
        expected_ids = encode(batch)
        found_ids = [e.ids for e in backend.encode_batch_fast(batch, add_special_tokens=False)]
        found_texts = backend.decode_batch(found_ids, skip_special_tokens=True)
        for text, expected, found, decoded in zip(batch, expected_ids, found_ids, found_texts):
            if found != expected:
                return Mismatch(text, *_first_difference(expected, found))
            if tokenizer.unk_id not in expected and trim(decoded) != trim(wanted := tokenizer.decode(expected)):
                return Mismatch(text, wanted, decoded)
    for text in (around.format(token) for token in made_special for around in ("{0}", "a {0} b", "{0}{0}")):
        expected = encode([text])[0]
        found = converted(text, add_special_tokens=False, verbose=False)["input_ids"]
        if found != expected:
            return Mismatch(text, *_first_difference(expected, found))
    return None


def _made_special(tokenizer: Tokenizer, converted: Any) -> list[str]:
    """Ordinary added tokens of a given tokenizer.json that are special to transformers."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return []
    ordinary = {t["content"] for t in tokenizer.definition.get("added_tokens") or () if not t.get("special")}
    return sorted(ordinary.intersection(converted.all_special_tokens))


def _without(tokens: list[str], texts: Iterable[str]) -> list[str]:
    """The texts that hold none of the tokens."""
    return [text for text in texts if not any(token in text for token in tokens)]


def _random_texts(pieces: list[str], joins: int) -> Iterator[str]:
    generator = random.Random(3407)  # the same proof every time
    for _ in range(_RANDOM_NOISE):
        yield noise(generator)
    if not pieces:
        return
    for _ in range(joins):
        yield join_pieces(generator, pieces)


def _first_difference(expected: list[int], found: list[int]) -> tuple[str, str]:
    """Both lists from the first place where they differ, shortened."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found)) if a != b), min(len(expected), len(found)))
    return f"id {at} on {_shorten(expected[at:])}", f"{_shorten(found[at:])}"


def _shorten(ids: Iterable[int]) -> str:
    ids = list(ids)
    return str(ids[:6])[:-1] + (", ...]" if len(ids) > 6 else "]")
