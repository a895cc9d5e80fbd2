"""The sets that models are evaluated on: indexed datasets as they are, texts by the model's own tokenizer.

::

    NAME=P        P.idx exists: an indexed dataset, whose ids must be those of the model's tokenizer
    NAME=FILE     a text file (jsonl, txt, parquet, also .gz and .zst), folder or pattern: each document encoded by the
                  model's tokenizer as [bos] ids [eos] and written to a dataset that is gone afterwards

Either way the windows are those of training's evaluation (``ValidData``), so the rule is one: documents one after the
other, window j predicts tokens j s + 1 to j s + s and sees nothing before token j s; each token but the very first is
predicted exactly once. Attention crosses documents unless the run's data.attention_mask says otherwise.

What a loss is divided by is counted here too: bytes and characters of the text that was predicted, and its tokens by a
reference tokenizer. Of whole texts these are the text's own counts; of a dataset, or of the first windows alone, those
of the text that the predicted ids stand for. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.corpus.documents import read_batches
from megatron_hammer.corpus.readers import expand_inputs
from megatron_hammer.dataset.format import path_of
from megatron_hammer.dataset.writer import IndexedWriter
from megatron_hammer.sampling.samples import ValidData, check_tokenizer
from megatron_hammer.tokenizer.interface import Tokenizer

_TOKENS_AT_ONCE = 1 << 18  # their sizes stay in the cache


@dataclass(frozen=True)
class NamedSet:
    """A set as the user named it."""

    name: str
    path: str
    is_text: bool

    def files(self) -> list[Path]:
        """The files of a set of texts.

        Raises:
            DataError: E301 there are none.
        """
        return expand_inputs([self.path])


@dataclass(frozen=True)
class Framing:
    """The ids that stand around each document of a text; None: none."""

    first: int | None
    last: int | None


@dataclass(frozen=True)
class TextCounts:
    """How much text the predicted tokens of a set stand for."""

    num_bytes: int
    num_characters: int
    reference_tokens: int | None
    """By the reference tokenizer, with one more for the end of each document; None without one."""


def parse_sets(arguments: Sequence[str]) -> list[NamedSet]:
    """``NAME=PATH`` arguments.

    Raises:
        ConfigError: E234 another form, or a name twice.
        DataError: E301 a text that is not there.
    """
    sets: list[NamedSet] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path):
            rule, remedy = "is not NAME=PATH", "write it as --set zh=corpus/zh.valid.jsonl, or zh=data/zh_text_document"
            raise ConfigError(34, f"--set {argument}", rule, remedy)
        if name in [other.name for other in sets]:
            raise ConfigError(34, f"--set {argument}", "has the name of another set", "give each set its own name")
        sets.append(NamedSet(name, path, not path_of(path, ".idx").exists()))
    for one in sets:
        if one.is_text:
            one.files()
    return sets


def open_set(
    named: NamedSet,
    tokenizer: Tokenizer | None,
    framing: Framing,
    vocab_size: int,
    seq_length: int,
    samples: int | None,
    document_mask: bool,
    folder: Path,
    key: str = "text",
) -> ValidData:
    """The windows of a set for one model.

    Args:
        framing: of texts.
        samples: only so many windows from the start; None: all.
        folder: where the ids of texts are written.

    Raises:
        ConfigError: E233 texts, and a model without a tokenizer.
        DataError: the set is missing, damaged or too short.
        RefusedError: E510 a dataset of another tokenizer.
    """
    prefix: str | Path = named.path
    if named.is_text:
        tokenizer = encoder_of(named, tokenizer)
        prefix = folder / "set"
        _encode(named, tokenizer, framing, prefix, key)
    valid = ValidData(named.name, prefix, seq_length, samples, document_mask, vocab_size)
    check_tokenizer(
        valid.dataset, tokenizer.fingerprint if tokenizer is not None else None, vocab_size, "the model's tokenizer"
    )
    return valid


def encoder_of(named: NamedSet, tokenizer: Tokenizer | None, model: str = "the model") -> Tokenizer:
    """The model's tokenizer, which a set of texts needs.

    Raises:
        ConfigError: E233 it has none.
    """
    if tokenizer is None:
        remedy = "give an indexed dataset, or a model with its tokenizer"
        raise ConfigError(33, f"--set {named.name}={named.path}", f"is text, and {model} has no tokenizer", remedy)
    return tokenizer


def _encode(named: NamedSet, tokenizer: Tokenizer, framing: Framing, prefix: Path, key: str) -> None:
    with IndexedWriter(prefix, vocab_size=tokenizer.vocab_size) as writer:
        for texts in read_batches(named.files(), key):
            writer.add(*tokenizer.encode_documents(texts, first=framing.first, last=framing.last))
        if writer.num_tokens < 2:
            raise DataError(45, named.path, f"gives {writer.num_tokens} tokens: a target needs two", "give more text")


def count_text(
    named: NamedSet, valid: ValidData, tokenizer: Tokenizer | None, reference: Tokenizer | None, key: str = "text"
) -> TextCounts | None:
    """What the predicted tokens of the set stand for; None for a model without a tokenizer.

    Raises:
        ConfigError: E233 a reference, and ids that cannot be turned into text.
    """
    if named.is_text and num_targets(valid) == valid.dataset.num_tokens - 1:
        counts = np.zeros(3, np.int64)
        for texts in read_batches(named.files(), key):
            counts[:2] += sum(len(text.encode()) for text in texts), sum(map(len, texts))
            counts[2] += 0 if reference is None else _reference_tokens(reference, texts)
        num_bytes, characters, tokens = counts.tolist()
        return TextCounts(num_bytes, characters, None if reference is None else tokens)
    if tokenizer is None:
        if reference is not None:
            raise ConfigError(33, f"--reference {reference.path}", "needs a model with a tokenizer", "leave it out")
        return None
    predicted = valid.dataset.tokens[1 : 1 + num_targets(valid)]
    pieces = tokenizer.read_pieces()
    # One more: ids beyond the tokenizer's, which a model's vocabulary may have, stand for nothing.
    sizes = np.stack([np.append(pieces.lengths, 0), np.append(pieces.characters, 0)])
    found = np.zeros(2, np.int64)
    for first in range(0, len(predicted), _TOKENS_AT_ONCE):
        found += sizes.take(predicted[first : first + _TOKENS_AT_ONCE], axis=1, mode="clip").sum(axis=1)
    num_bytes, characters = found.tolist()
    by_reference = None
    if reference is not None:
        by_reference = sum(_reference_tokens(reference, [text]) for text in _decoded(valid, tokenizer))
    valid.dataset.check_unchanged()
    return TextCounts(num_bytes, characters, by_reference)


def num_targets(valid: ValidData) -> int:
    """Tokens of the set that are predicted."""
    return min(len(valid) * valid.seq_length, valid.dataset.num_tokens - 1)


def _reference_tokens(reference: Tokenizer, texts: Sequence[str]) -> int:
    """Tokens of some documents, each with one more for its end; an empty text is no document."""
    texts = [text for text in texts if text]
    return len(reference.encode_documents(texts)[0]) + len(texts)


def _decoded(valid: ValidData, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of the documents, as far as their tokens are predicted."""
    end, place = num_targets(valid) + 1, 0
    for length in valid.dataset.document_lengths.tolist():
        if place >= end:
            return
        ids = valid.dataset.tokens[place : min(place + length, end)]
        yield tokenizer.decode(ids[ids < tokenizer.vocab_size].tolist())
        place += length
