"""Compares two tokenizers id by id, on given texts and on a seeded corpus of hard ones, to show that they are the same.

    A, B --> load as a user would --> same ids on every text? --> same size, same special ids? --> counts
                                          | no
                                          +--> the first difference, in context

How a tokenizer is loaded and asked is ``forms.py``.

100,000 texts of HammerLLM's model against its conversion took 13 s of one Intel Xeon core's time, and 0.44 GB.
Imports transformers only for a folder.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError, RefusedError
from megatron_hammer.base.progress import track
from megatron_hammer.tokenizer.lab.forms import SPECIAL_NAMES, Form, load_form
from megatron_hammer.tokenizer.lab.fuzz import break_utf8, fuzz_texts

_BATCH_TEXTS = 2048
_BATCH_CHARACTERS = 1 << 21  # a batch of long documents is one document or a few: some 100 MB of lists at most
_CONTEXT_CHARACTERS = 30
_CONTEXT_TOKENS = 4

Text = str | bytes


@dataclass(frozen=True)
class Difference:
    """The first text with other ids."""

    where: str
    text: Text
    ways: tuple[str, str]
    ids: tuple[list[int], list[int]]
    at: int
    """The first token that differs."""
    offset: int
    """The character of the text (of the decoded form of bytes) where that token starts; after a normalisation that
    changes lengths, about there."""
    pieces: tuple[list[str], list[str]]
    """The tokens around it, ``id 'piece'`` each, the differing one marked."""

    def lines(self) -> list[str]:
        """For people: where it is, the text around it, and what either made of it."""
        text = self.text.decode("utf-8", "replace") if isinstance(self.text, bytes) else self.text
        before = text[max(0, self.offset - _CONTEXT_CHARACTERS) : self.offset]
        after = text[self.offset : self.offset + _CONTEXT_CHARACTERS]
        width = max(map(len, self.ways))
        return [
            f"first difference: {self.where}, character {self.offset:,}, token {self.at:,}",
            f"  text   {before!r} | {after!r}",
            *(f"  {way:{width}}  {' '.join(pieces)}" for way, pieces in zip(self.ways, self.pieces)),
        ]


@dataclass
class TokenizerComparison:
    """What was compared, and what was found."""

    a: Form
    b: Form
    texts: int = 0
    byte_strings: int = 0
    tokens: int = 0
    seconds: float = 0.0
    settings: list[str] = field(default_factory=list)
    """Sizes and special ids that differ, a phrase each."""
    difference: Difference | None = None

    def lines(self) -> list[str]:
        """The report, without a verdict on differences: that is ``error``."""
        strings = "1 text" if self.texts == 1 else f"{self.texts:,} texts"
        if self.byte_strings:
            strings += f" and {self.byte_strings:,} byte strings that are no UTF-8"
        lines = [f"compared {strings}, {self.tokens:,} tokens, in {self.seconds:.1f} s"]
        lines += [f"{form.path}: {form.kind}, {form.vocab_size:,} ids, {_describe(form)}" for form in (self.a, self.b)]
        if self.difference:
            lines += self.difference.lines()
        if self.error() is None:
            lines.append("equal")
        return lines

    def error(self) -> RefusedError | None:
        """Why the one cannot stand for the other, if it cannot."""
        both = f"{self.a.path} and {self.b.path}"
        remedy = "use the tokenizer that the data was made with, or convert it again"
        if self.difference:
            where = f"{self.difference.where} from character {self.difference.offset:,} on"
            return RefusedError(7, both, f"differ on {where}", remedy)
        if self.settings:
            return RefusedError(8, both, f"give equal ids, but differ in {'; '.join(self.settings)}", remedy)
        return None


def compare_tokenizers(
    a: str | Path, b: str | Path, texts: Mapping[str, Iterable[str]] | None = None, fuzz: int = 0, seed: int = 3407
) -> TokenizerComparison:
    """Compare two tokenizers up to the first text on which they differ; a bar or a line now and then on stderr.

    Args:
        a: a sentencepiece ``.model``, a ``tokenizer.json`` or a Hugging Face folder; so is ``b``.
        texts: by name (of a file, whose lines they are), compared in order and whole.
        fuzz: how many texts of ``fuzz.py`` to compare. Two sentencepiece models get a tenth as many strings of bytes
            that are no UTF-8 besides.
        seed: of the fuzz texts, which depend on both vocabularies too.

    Raises:
        ConfigError: E230 a negative count; E231 nothing to compare.
        DataError: what ``load_tokenizer`` raises, and the reader of the texts.
        RefusedError: E509 transformers cannot load a folder.
    """
    if fuzz < 0:
        raise ConfigError(30, f"--fuzz {fuzz}", "must not be negative", "give the number of random texts")
    if not fuzz and not texts:
        raise ConfigError(31, "--fuzz 0 without --texts", "leaves nothing to compare", "give one of them")
    started = time.monotonic()
    comparison = TokenizerComparison(load_form(a), load_form(b))
    comparison.settings = _compare_settings(comparison.a, comparison.b)
    for source, strings in _sources(comparison.a, comparison.b, texts or {}, fuzz, seed):
        if _find_difference(comparison, source, strings):
            break
    comparison.seconds = time.monotonic() - started
    return comparison


def _compare_settings(a: Form, b: Form) -> list[str]:
    found = []
    if a.vocab_size != b.vocab_size:
        found.append(f"vocabulary size ({a.vocab_size:,} against {b.vocab_size:,})")
    for name in SPECIAL_NAMES:
        ids = (a.special_ids[name], b.special_ids[name])
        silent = any(form.kind == "tokenizer.json" and form.special_ids[name] is None for form in (a, b))
        if ids[0] != ids[1] and not silent:
            found.append(f"{name} id ({ids[0]} against {ids[1]})")
    return found


def _sources(
    a: Form, b: Form, texts: Mapping[str, Iterable[str]], fuzz: int, seed: int
) -> Iterator[tuple[str, Iterable[Text]]]:
    """What to compare, a source at a time: its name, and its strings under a progress bar."""
    for name, given in texts.items():
        yield f"{name}, line", track(given, name, None, "texts")
    if not fuzz:
        return
    names = "pieces", "symbols", "specials"
    # Each once, in a fixed order: the corpus is a function of its arguments.
    pieces, symbols, specials = (list(dict.fromkeys(getattr(a, name) + getattr(b, name))) for name in names)
    fuzzed = fuzz_texts(fuzz, seed, pieces, symbols, specials)
    yield f"fuzz (seed {seed}), text", track(fuzzed, "fuzz", fuzz, "texts")
    if a.encode_bytes and b.encode_bytes:
        count = -(-fuzz // 10)
        generator = random.Random(seed)
        broken = (break_utf8(text, generator) for text in fuzz_texts(count, seed + 1, pieces, symbols, specials))
        yield f"fuzz (seed {seed}), byte string", track(broken, "fuzz", count, "byte strings")


def _find_difference(comparison: TokenizerComparison, source: str, strings: Iterable[Text]) -> bool:
    """Compare one source, count what was compared, and note the first difference. True: there is one."""
    first = 1
    for batch in _batches(strings):
        as_bytes = isinstance(batch[0], bytes)
        (way, form, reference), *others = [
            (f"{form.path} {way}", form, encode(batch))
            for form in (comparison.a, comparison.b)
            for way, encode in (form.encode_bytes if as_bytes else form.encode).items()
        ]
        # Of several ways that differ somewhere in the batch, the one that does so in the earliest text.
        found = [
            (next(i for i, (x, y) in enumerate(zip(reference, ids)) if x != y), other, form_b, ids)
            for other, form_b, ids in others
            if ids != reference
        ]
        compared = len(batch)
        if found:
            index, other, form_b, ids = min(found, key=lambda item: item[0])
            compared = index + 1
            comparison.difference = _describe_difference(
                f"{source} {first + index:,}",
                batch[index],
                (way, other),
                (form, form_b),
                (reference[index], ids[index]),
            )
        if as_bytes:
            comparison.byte_strings += compared
        else:
            comparison.texts += compared
        comparison.tokens += sum(map(len, reference[:compared]))
        if found:
            return True
        first += len(batch)
    return False


def _batches(strings: Iterable[Text]) -> Iterator[list[Any]]:
    batch: list[Text] = []
    size = 0
    for string in strings:
        batch.append(string)
        size += len(string)
        if len(batch) == _BATCH_TEXTS or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _describe_difference(
    where: str, text: Text, ways: tuple[str, str], forms: tuple[Form, Form], ids: tuple[list[int], list[int]]
) -> Difference:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*ids))
    at = sum(1 for _ in same)
    pieces = []
    for form, tokens in zip(forms, ids):
        start, stop = max(0, at - _CONTEXT_TOKENS), at + _CONTEXT_TOKENS + 1
        shown = [
            f"{'>' if index == at else ''}{tokens[index]} {form.piece(tokens[index])!r}"
            for index in range(start, min(stop, len(tokens)))
        ]
        if at >= len(tokens):
            shown.append(">end")
        pieces.append(["..."] * (start > 0) + shown + ["..."] * (stop < len(tokens)))
    return Difference(where, text, ways, ids, at, len(forms[0].decode(ids[0][:at])), (pieces[0], pieces[1]))


def _describe(form: Form) -> str:
    return ", ".join(f"{name} {'none' if i is None else i}" for name, i in form.special_ids.items())
