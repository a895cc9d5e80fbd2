"""Where each row of an extended embedding comes from: for every new id, the old ids whose rows are averaged.

Ids are matched by what they stand for, never by number, so a reordered or partly dropped vocabulary works. The rule
for a new id, first that applies:

copied   the old tokenizer has the same token: the same text, the same fallback byte, the same control name (of several
         that stand for one text, that of the same spelling, else the lowest id). One that is a control token on one
         side and an added or user-defined symbol on the other is the same token. The row keeps its bits.
role     a control token without namesake that is bos, eos, unk or pad: copied from the old token of that role.
pieces   text: the mean of the rows of the ids that the old tokenizer gives for it in the middle of a text (no dummy
         prefix, spaces kept, its normalisation applied). Summed in fp32 in the order of the ids, divided, rounded once.
bytes    the same mean, where an old piece among them is a part of a character (a fallback byte, or a byte-level token
         that is no whole text). What is no text itself (a part of a character) is put together from single bytes.
mean     what has no text in the old tokenizer: other control tokens (their name is not text), numbers without a token,
         text that the old tokenizer drops or knows as unk only. The mean of the rows of all old ids.

Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.pieces import SPACE, decode_token, flatten_decoders, is_fallback_byte
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, load_processor, parse_model

ORIGINS = ("copied", "role", "pieces", "bytes", "mean")
"""The rules above, in the order in which they are tried."""
_ROLES = ("bos_id", "eos_id", "unk_id", "pad_id")


class Token(NamedTuple):
    """What one id stands for."""

    kind: str
    """``text``, ``byte`` (of byte fallback), ``control`` (unk included), or ``none``: no token has this number."""
    name: str
    """As the tokenizer's file spells it."""
    content: bytes
    """Bytes of text; a control token's name; of a byte-level token perhaps a part of a character."""


_NO_TOKEN = Token("none", "", b"")


def read_vocabulary(tokenizer: Tokenizer) -> list[Token]:
    """The token of each id, ``[vocab_size]``."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return [_token_of_piece(piece) for piece in parse_model(tokenizer.model_bytes, tokenizer.path).pieces]
    assert isinstance(tokenizer, HuggingFaceTokenizer), f"no vocabulary of {tokenizer!r}"
    return _tokens_of_definition(tokenizer)


def _token_of_piece(piece: Any) -> Token:
    if piece.type in (piece.CONTROL, piece.UNKNOWN):
        return Token("control", piece.piece, piece.piece.encode())
    if piece.type == piece.BYTE:
        return Token("byte", piece.piece, bytes([int(piece.piece[3:5], 16)]))
    return Token("text", piece.piece, piece.piece.replace(SPACE, " ").encode())


def _tokens_of_definition(tokenizer: HuggingFaceTokenizer) -> list[Token]:
    definition = tokenizer.definition
    decoders = flatten_decoders(definition.get("decoder"))
    falls_back = any(step.get("type") == "ByteFallback" for step in decoders)
    added = {token["content"]: token for token in definition.get("added_tokens") or []}
    unknown = definition["model"].get("unk_token")
    tokens = [_NO_TOKEN] * tokenizer.vocab_size
    for name, index in _backend(definition).get_vocab(with_added_tokens=True).items():
        if name == unknown or added.get(name, {}).get("special"):
            tokens[index] = Token("control", name, name.encode())
        elif name in added:
            tokens[index] = Token("text", name, name.encode())
        elif falls_back and is_fallback_byte(name):
            tokens[index] = Token("byte", name, decode_token(name, decoders))
        else:
            tokens[index] = Token("text", name, decode_token(name, decoders))
    return tokens


def _backend(definition: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(json.dumps(definition))
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def inner_encoder(tokenizer: Tokenizer) -> Callable[[list[str]], list[list[int]]]:
    """Encodes texts as if each stood in the middle of a text: no dummy prefix, no spaces removed at its ends."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = parse_model(tokenizer.model_bytes, tokenizer.path)
        proto.normalizer_spec.add_dummy_prefix = False
        proto.normalizer_spec.remove_extra_whitespaces = False
        processor = load_processor(proto.SerializeToString(), tokenizer.path)
        return lambda texts: processor.encode(texts)
    assert isinstance(tokenizer, HuggingFaceTokenizer), f"no encoder of {tokenizer!r}"
    definition = tokenizer.definition
    inner = {
        **definition,
        "normalizer": _without_ends(definition.get("normalizer")),
        "pre_tokenizer": _without_ends(definition.get("pre_tokenizer")),
    }
    backend = _backend(inner)
    return lambda texts: [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _without_ends(step: Any) -> Any:
    """A normalizer or pre-tokenizer without what it does at the ends of a text; None where nothing is left."""
    if not isinstance(step, dict) or step.get("type") in ("Prepend", "Strip"):
        return None
    step = dict(step)
    for parts in ("normalizers", "pretokenizers"):
        if parts in step:
            step[parts] = [kept for part in step[parts] if (kept := _without_ends(part)) is not None]
    if step.get("type") == "Metaspace":
        step.pop("add_prefix_space", None)  # an older file's word for the same
        step["prepend_scheme"] = "never"
    elif step.get("type") == "ByteLevel":
        step["add_prefix_space"] = False
    return step


@dataclass(frozen=True)
class ExtensionPlan:
    """For each new id the old ids whose rows are averaged; none where the mean of all old rows is meant."""

    offsets: np.ndarray
    """``[v' + 1] int64``: new id i has the sources ``offsets[i] : offsets[i + 1]``."""
    sources: np.ndarray
    """``[sum] int64``: old ids."""
    origins: list[str]
    """``[v']``: which rule of the module's list applied."""
    old_ids: np.ndarray
    """``[n] int64``: the old ids that have a token: the rows of "all"."""
    tokens: list[Token]
    """``[v']``: of the new ids."""

    @property
    def size(self) -> int:
        """Number of new ids."""
        return len(self.origins)

    def sources_of(self, index: int) -> list[int]:
        """The old ids of a new one."""
        found: list[int] = self.sources[self.offsets[index] : self.offsets[index + 1]].tolist()
        return found


class _OldVocabulary:
    """Finds tokens of the old vocabulary by what they stand for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = read_vocabulary(tokenizer)
        self.unk_id = tokenizer.unk_id
        self._exact: dict[Token, int] = {}
        self._same: dict[tuple[str, bytes], int] = {}
        for index, token in enumerate(self.tokens):
            self._exact.setdefault(token, index)
            self._same.setdefault((token.kind, token.content), index)  # the lowest id
        self._bytes = [self._same.get(("byte", bytes([b])), self._same.get(("text", bytes([b])))) for b in range(256)]
        self._encode = inner_encoder(tokenizer)

    def find(self, token: Token) -> int | None:
        """The old id of the same token."""
        if token.kind == "none":
            return None
        other_kind = {"control": "text", "text": "control"}.get(token.kind, "")
        return self._exact.get(
            token, self._same.get((token.kind, token.content), self._same.get((other_kind, token.content)))
        )

    def spell(self, contents: Sequence[bytes]) -> Iterator[list[int]]:
        """The old ids that make up each content: text as the tokenizer encodes it, parts of characters as bytes."""
        split = [_split_invalid(content) for content in contents]
        encoded = iter(self._encode([part for parts in split for part in parts if isinstance(part, str)]))
        for parts in split:
            ids: list[int | None] = []
            for part in parts:
                ids += next(encoded) if isinstance(part, str) else [self._bytes[b] for b in part]
            yield [i for i in ids if i is not None and i != self.unk_id]

    def is_partial(self, index: int) -> bool:
        """Whether an old id may stand for a part of a character only."""
        token = self.tokens[index]
        return token.kind == "byte" or (token.kind == "text" and "\ufffd" in token.content.decode(errors="replace"))


def _split_invalid(content: bytes) -> list[str | bytes]:
    """Stretches of valid UTF-8 as text, the bytes between them as they are."""
    parts: list[str | bytes] = []
    for part in re.split("([\udc80-\udcff]+)", content.decode(errors="surrogateescape")):
        if part:
            stray = part[0] >= "\udc80" and part[0] <= "\udcff"
            parts.append(part.encode(errors="surrogateescape") if stray else part)
    return parts


def plan_extension(old: Tokenizer, new: Tokenizer) -> ExtensionPlan:
    """Decide by the module's rules where the row of each id of ``new`` comes from."""
    vocabulary, tokens = _OldVocabulary(old), read_vocabulary(new)
    roles = {
        getattr(new, role): getattr(old, role)
        for role in _ROLES
        if getattr(new, role) is not None and getattr(old, role) is not None
    }
    sources: list[list[int]] = []
    origins: list[str] = []
    unmatched = []
    for index, token in enumerate(tokens):
        found = vocabulary.find(token)
        if found is not None:
            sources.append([found])
            origins.append("copied")
        elif token.kind == "control" and index in roles:
            sources.append([roles[index]])
            origins.append("role")
        else:
            sources.append([])
            origins.append("mean")
            if token.kind in ("text", "byte"):
                unmatched.append(index)
    for index, spelt in zip(unmatched, vocabulary.spell([tokens[i].content for i in unmatched])):
        if spelt:
            sources[index] = spelt
            origins[index] = "bytes" if any(map(vocabulary.is_partial, spelt)) else "pieces"
    offsets = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum([len(ids) for ids in sources], out=offsets[1:])
    flat = np.fromiter((i for ids in sources for i in ids), np.int64, int(offsets[-1]))
    old_ids = np.array([i for i, token in enumerate(vocabulary.tokens) if token.kind != "none"], np.int64)
    return ExtensionPlan(offsets, flat, origins, old_ids, tokens)
