"""A tokenizer as its users load it, in any of its forms, reduced to what a comparison asks of it.

How each form is loaded and asked:

form                        loaded by        asked
--------------------------  ---------------  ---------------------------------------------------------------------------
sentencepiece ``.model``    sentencepiece    ``encode``; bytes that are no UTF-8 too, if both are of this form
``tokenizer.json``          tokenizers       ``encode`` without special tokens, literal ones staying text
Hugging Face folder         AutoTokenizer    ``tokenizer(text, add_special_tokens=False)``; and ``tokenizer(text)`` if
                                             its tokenizer_config.json says what is added (``add_bos_token`` is
                                             stated and ``add_eos_token`` false): then both must give the ids,
                                             but for one bos in front where it says so

A folder is what its users get: a ``tokenizer.model`` in it is not looked at (name that file to compare it), and literal
special tokens become what the folder's own settings make of them. A folder with a ``tokenizer.model`` alone is no
Hugging Face folder but a name for that file. A ``tokenizer.json`` need not state all special ids: those that it does
not state are not compared.

Imports transformers only for a folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.base.system import usable_cores
from megatron_hammer.tokenizer.huggingface_backend import STAND_IN_PAD, HuggingFaceTokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.pieces import BYTE_LEVEL_ALPHABET, SPACE
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, parse_model

SPECIAL_NAMES = ("bos", "eos", "unk", "pad")
_THREADS = usable_cores()  # for sentencepiece; the tokenizers library has a pool of its own

Ids = list[list[int]]


@dataclass(frozen=True)
class Form:
    """A tokenizer in one of its forms, reduced to what a comparison asks of it."""

    path: Path
    kind: str
    vocab_size: int
    special_ids: dict[str, int | None]
    pieces: list[str]
    """The vocabulary as text, for the fuzz corpus."""
    symbols: list[str]
    """User-defined symbols, or added tokens that are not special."""
    specials: list[str]
    """Control pieces, or special added tokens."""
    encode: Mapping[str, Callable[[list[str]], Ids]]
    """The ways in which users ask for ids, by name: all of them must agree."""
    encode_bytes: Mapping[str, Callable[[list[bytes]], Ids]]
    """Likewise for bytes, where the form takes them."""
    decode: Callable[[list[int]], str]
    piece: Callable[[int], str]


def load_form(path: str | Path) -> Form:
    """Load a tokenizer as its users do."""
    path = Path(path)
    if path.is_dir() and any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return _load_folder(path)
    tokenizer = load_tokenizer(path)
    special_ids = {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_NAMES}
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece_form(tokenizer, special_ids)
    assert isinstance(tokenizer, HuggingFaceTokenizer), f"no comparison for {tokenizer!r}"
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(tokenizer.definition))  # for pieces and decoding, not for ids
    added = tokenizer.definition.get("added_tokens") or []
    return Form(
        path=path,
        kind="tokenizer.json",
        vocab_size=tokenizer.vocab_size,
        special_ids=special_ids,
        pieces=_texts_of(backend.get_vocab(), lambda token_id: backend.decode([token_id])),
        symbols=[token["content"] for token in added if not token.get("special")],
        specials=[token["content"] for token in added if token.get("special")],
        encode={"encode": lambda batch: tokenizer.encode_batch(batch, threads=_THREADS)},
        encode_bytes={},
        decode=lambda ids: backend.decode(ids, skip_special_tokens=False),
        piece=lambda token_id: str(backend.id_to_token(token_id)),
    )


def _sentencepiece_form(tokenizer: SentencePieceTokenizer, special_ids: dict[str, int | None]) -> Form:
    proto, processor = parse_model(tokenizer.model_bytes, tokenizer.path), tokenizer.processor
    kinds = proto.SentencePiece
    return Form(
        path=tokenizer.path,
        kind="sentencepiece model",
        vocab_size=tokenizer.vocab_size,
        special_ids=special_ids,
        pieces=[piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.piece],
        symbols=[piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED],
        specials=[piece.piece for piece in proto.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)],
        encode={"encode": lambda batch: processor.encode(batch, num_threads=_THREADS)},  # the truth, not our encoder
        encode_bytes={"encode": processor.encode},
        decode=tokenizer.decode,
        piece=lambda token_id: proto.pieces[token_id].piece,
    )


def _load_folder(path: Path) -> Form:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # long documents are no mistake here
    try:
        # Never code from the folder: without the argument, a folder that brings some would ask on the terminal.
        loaded: Any = AutoTokenizer.from_pretrained(
            str(path), trust_remote_code=False, use_safetensors=True, local_files_only=True
        )
    except Exception as error:  # the Rust library raises bare Exception
        if (path / "tokenizer.json").is_file():
            load_tokenizer(path / "tokenizer.json")  # where the file is to blame, this names the fault
        raise RefusedError(
            9, str(path), f"cannot be loaded by transformers.AutoTokenizer ({error})",
            "mend the folder, or compare the tokenizer.json or tokenizer.model in it",
        ) from None  # fmt: skip
    vocabulary = loaded.get_vocab()
    added = loaded.added_tokens_decoder.values()

    def plain(batch: list[str]) -> Ids:
        ids: Ids = loaded(batch, add_special_tokens=False)["input_ids"]
        return ids

    def by_default(batch: list[str]) -> Ids:
        ids: Ids = loaded(batch)["input_ids"]
        bos = [loaded.bos_token_id]
        return [one[1:] if adds_bos and one[:1] == bos else one for one in ids]

    ways = {"tokenizer(text, add_special_tokens=False)": plain}
    settings = _settings(path)
    adds_bos, adds_eos = (settings.get(name) for name in ("add_bos_token", "add_eos_token"))
    special_ids = {name: getattr(loaded, f"{name}_token_id") for name in SPECIAL_NAMES}
    if settings.get(STAND_IN_PAD):
        special_ids["pad"] = None
    if isinstance(adds_bos, bool) and adds_eos is False:
        ways["tokenizer(text)"] = by_default
    return Form(
        path=path,
        kind=f"Hugging Face folder ({type(loaded).__name__})",
        vocab_size=max(vocabulary.values(), default=-1) + 1,
        special_ids=special_ids,
        pieces=_texts_of(vocabulary, lambda token_id: loaded.decode([token_id])),
        symbols=[token.content for token in added if not token.special],
        specials=[token.content for token in added if token.special],
        encode=ways,
        encode_bytes={},
        decode=lambda ids: loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        piece=lambda token_id: str(loaded.convert_ids_to_tokens(token_id)),
    )


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    settings: dict[str, Any] = parse_json(read_regular(path)) if path.is_file() else {}
    return settings


def _texts_of(vocabulary: dict[str, int], decode: Callable[[int], str]) -> list[str]:
    """The vocabulary as text, by id. Byte-level pieces are decoded; halves of characters are no text and left out."""
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if sum(all(c in BYTE_LEVEL_ALPHABET for c in token) for token in tokens) > 0.9 * len(tokens):
        texts = [decode(vocabulary[token]) for token in tokens]
        return [text for text in texts if text and "\ufffd" not in text]
    return [token.replace(SPACE, " ") for token in tokens if token]
