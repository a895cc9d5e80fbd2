"""The smaller vocabularies that are the best-ranked part of a BPE tokenizer's own, as tokenizers of their own.

A sentencepiece model loses its worst-scored pieces, a ``tokenizer.json`` its last merges. Byte, control and
user-defined pieces and single characters stay, since a training to that size would have them too; so do runs of spaces
that rank behind everything else (Llama-2's were put in by hand).
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from megatron_hammer.base.files import writing
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.load import load_tokenizer
from megatron_hammer.tokenizer.pieces import SPACE
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer, parse_model


class Prefixes(ABC):
    """The vocabularies that are the best-ranked part of a tokenizer's; made by ``find_prefixes``."""

    fixed: int
    """Pieces that always stay."""
    full: int
    """``vocab_size`` of the tokenizer."""

    @abstractmethod
    def cut(self, size: int, folder: Path) -> Tokenizer:
        """The tokenizer with ``full - size`` of its pieces left out. Its ids are its own: good for counting only.

        Args:
            size: from fixed to full.
            folder: existing; its files are written there, and may be removed when it is loaded.
        """


def find_prefixes(tokenizer: Tokenizer) -> Prefixes | str:
    """The smaller vocabularies of a BPE tokenizer, or why there are none (as the predicate of its name)."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        proto = parse_model(tokenizer.model_bytes, tokenizer.path)
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            name = proto.trainer_spec.ModelType.Name(proto.trainer_spec.model_type).lower()
            return f"is a {name} model, and a smaller one of that kind is no part of it"
        found: Prefixes = _ModelPrefixes(proto, tokenizer.vocab_size)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer), type(tokenizer)
        kind = tokenizer.definition["model"].get("type") or "BPE"
        if kind != "BPE" or not tokenizer.definition["model"].get("merges"):
            return f"is a {kind} tokenizer without merges, and a smaller one of that kind is no part of it"
        found = _DefinitionPrefixes(tokenizer.definition, tokenizer.vocab_size)
    return found if found.fixed < found.full else "has no piece that can be left out"


def _count_ranked(pieces: list[str]) -> int:
    """How many pieces, best first, are left without the runs of spaces at the end."""
    count = len(pieces)
    while count and not pieces[count - 1].strip(SPACE):
        count -= 1
    return count


class _ModelPrefixes(Prefixes):
    def __init__(self, proto: Any, vocab_size: int) -> None:
        self._proto = proto
        merged = [i for i, piece in enumerate(proto.pieces) if piece.type == piece.NORMAL and len(piece.piece) > 1]
        # Best score first; of equal ones the lower id was there first.
        merged.sort(key=lambda i: (-proto.pieces[i].score, i))
        self._merged = merged[: _count_ranked([proto.pieces[i].piece for i in merged])]
        self.full = vocab_size
        self.fixed = vocab_size - len(self._merged)

    def cut(self, size: int, folder: Path) -> Tokenizer:
        assert self.fixed <= size <= self.full, f"{self.fixed} <= {size} <= {self.full}"
        dropped = set(self._merged[size - self.fixed :])
        proto = type(self._proto)()
        proto.CopyFrom(self._proto)
        del proto.pieces[:]
        proto.pieces.extend(piece for i, piece in enumerate(self._proto.pieces) if i not in dropped)
        path = folder / "tokenizer.model"
        _write(path, proto.SerializeToString())
        return load_tokenizer(path)


class _DefinitionPrefixes(Prefixes):
    def __init__(self, definition: dict[str, Any], vocab_size: int) -> None:
        self._definition = definition
        model = definition["model"]
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        skipped = len(model.get("continuing_subword_prefix") or "")
        self._merges = [(left, right, left + right[skipped:]) for left, right in pairs]
        added = {token["content"] for token in definition.get("added_tokens") or []}
        products = dict.fromkeys(product for _, _, product in self._merges)  # in order of the first merge to each
        merged = [product for product in products if product not in added]
        self._merged = merged[: _count_ranked(merged)]
        self.full = vocab_size
        self.fixed = vocab_size - len(self._merged)

    def cut(self, size: int, folder: Path) -> Tokenizer:
        assert self.fixed <= size <= self.full, f"{self.fixed} <= {size} <= {self.full}"
        dropped = set(self._merged[size - self.fixed :])
        definition = copy.copy(self._definition)
        model = definition["model"] = copy.copy(self._definition["model"])
        model["vocab"] = {token: index for token, index in model["vocab"].items() if token not in dropped}
        model["merges"] = [[left, right] for left, right, product in self._merges
                           if not dropped & {left, right, product}]  # fmt: skip
        path = folder / "tokenizer.json"
        _write(path, json.dumps(definition).encode())
        return load_tokenizer(path)


def _write(path: Path, content: bytes) -> None:
    """A model for a moment, in a temporary folder."""
    with writing(path, len(content)):
        path.write_bytes(content)
