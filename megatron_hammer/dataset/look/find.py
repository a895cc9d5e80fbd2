"""Finds a text in an indexed dataset by the bytes that its token ids stand for, however the tokenizer has cut the text.

The ids of a text by itself are not the ids that it has inside another text, where pieces reach over both its ends. So
the search is for bytes, without decoding the dataset. A match can begin at a place only if

    one piece holds the whole text   or   a piece ends with the first k bytes of it, and the next one goes on from there

Two tables say for every id, as bits of a 64-bit word, for which k it can be the first of such a pair and for which the
second. Two look-ups and one AND leave a few of a million tokens, which are spelt out and compared. The search is exact.
It stays inside a document, and ids that spell nothing (bos, eod, unknown) end a match.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.base.progress import Progress
from megatron_hammer.dataset.format import HASH_BLOCK_BYTES
from megatron_hammer.dataset.look.places import TokenMap, document_of_token, document_source, document_starts
from megatron_hammer.dataset.reader import IndexedDataset
from megatron_hammer.tokenizer.spelling import Speller

_TOKENS_AT_ONCE = 1 << 14  # their two 64-bit words each stay in the cache
_CONTEXT_TOKENS = 24
_BITS = 64


@dataclass(frozen=True)
class Match:
    """One place where the text stands."""

    document: int
    offset: int
    """Of its first token in the document; the text may begin inside that token."""
    length: int
    """Tokens that it touches."""


class TextSearch:
    """One text and the tables of its tokenizer.

    Args:
        text: what to look for, at least one character.
        speller: of the dataset's tokenizer.

    Raises:
        ConfigError: E294 no text.
    """

    def __init__(self, text: str, speller: Speller) -> None:
        if not text:
            raise ConfigError(94, "TEXT", "is empty", "give the text to look for")
        self.wanted = text.encode("utf-8", "surrogateescape")  # as the command line gives bytes that are no UTF-8
        self._content = speller.pieces.content
        size = len(self._content)
        self._first, self._second = np.zeros(size + 1, np.uint64), np.zeros(size + 1, np.uint64)
        self._whole = np.zeros(size + 1, bool)
        """One more entry each: ids beyond the vocabulary are clipped to it and spell nothing."""
        for token, content in enumerate(self._content):
            if content:
                self._first[token], self._second[token] = self._bits(content)
                self._whole[token] = self.wanted in content
        self._has_whole = bool(self._whole.any())

    def _bits(self, content: bytes) -> tuple[int, int]:
        """Bit k mod 64: the piece ends with the first k bytes of the text / goes on, or ends it, after the first k.

        Folding k makes no place disappear, it only lets some through that the comparison refuses.
        """
        wanted, first, second = self.wanted, 0, 0
        if wanted[0] in content:  # else not even one byte: most pieces
            for k in range(1, min(len(wanted) - 1, len(content)) + 1):
                if content.endswith(wanted[:k]):
                    first |= 1 << k % _BITS
        if content[0] not in wanted:
            return first, second
        place = wanted.find(content, 1)
        while place >= 0:  # inside the text, or at its end
            second |= 1 << place % _BITS
            place = wanted.find(content, place + 1)
        for k in range(max(1, len(wanted) - len(content) + 1), len(wanted)):
            if content.startswith(wanted[k:]):  # the text ends inside the piece
                second |= 1 << k % _BITS
        return first, second

    def matches(self, dataset: IndexedDataset, progress: Progress | None = None) -> Iterator[Match]:
        """All places, in order; several that begin in the same token count once."""
        tokens = TokenMap(dataset)
        for _, first, block in tokens.blocks(HASH_BLOCK_BYTES):
            for start in range(first, first + len(block), _TOKENS_AT_ONCE):
                end = min(start + _TOKENS_AT_ONCE, first + len(block))
                for place in self._candidates(tokens.all[start : end + 1])[: end - start].nonzero()[0].tolist():
                    match = self._compare(dataset, tokens.all, start + place)
                    if match is not None:
                        yield match
                if progress is not None:
                    progress.advance((end - start) * dataset.dtype.itemsize)

    def _candidates(self, ids: np.ndarray) -> np.ndarray:
        """bool [n], the ids in which a match may begin; of the last one only whether it holds the whole text."""
        first, second = (np.take(table, ids, mode="clip") for table in (self._first, self._second))
        found = np.take(self._whole, ids, mode="clip") if self._has_whole else np.zeros(len(ids), bool)
        found[:-1] |= (first[:-1] & second[1:]) != 0
        return found

    def _compare(self, dataset: IndexedDataset, tokens: np.ndarray, token: int) -> Match | None:
        """The match that begins inside this token, if there is one."""
        head = self._spelt(tokens, token)
        whole = self.wanted in head
        starts = [len(head) - k for k in range(1, len(head) + 1) if self.wanted.startswith(head[-k:])]
        if not whole and not starts:
            return None
        document, offset = document_of_token(dataset, token)
        if whole:
            return Match(document, offset, 1)
        end = int(document_starts(dataset, document, 1)[1])
        spelt, after = bytearray(head), token + 1
        while len(spelt) < len(head) + len(self.wanted) and after < end:
            content = self._spelt(tokens, after)
            if not content:
                break
            spelt += content
            after += 1
        for begin in sorted(starts):
            if spelt.startswith(self.wanted, begin):
                return Match(document, offset, self._touched(tokens, token, begin + len(self.wanted)))
        return None

    def _touched(self, tokens: np.ndarray, token: int, num_bytes: int) -> int:
        """Tokens from this one on that hold so many bytes."""
        count = 0
        while num_bytes > 0:
            num_bytes -= len(self._spelt(tokens, token + count))
            count += 1
        return count

    def _spelt(self, tokens: np.ndarray, token: int) -> bytes:
        index = int(tokens[token])
        return self._content[index] if 0 <= index < len(self._content) else b""


def describe_match(dataset: IndexedDataset, match: Match, speller: Speller) -> dict[str, Any]:
    """A match as plain values, with the text around it."""
    start, end = document_starts(dataset, match.document, 1).tolist()
    first, last = match.offset, match.offset + match.length
    source = document_source(dataset, match.document)

    def spell(a: int, b: int) -> str:
        return speller.text(dataset.tokens[start + max(a, 0) : min(start + b, end)].tolist())

    return {
        "document": match.document,
        "source": None if source is None else {"path": source[0], "document": source[1]},
        "offset": first,
        "tokens": match.length,
        "before": spell(first - _CONTEXT_TOKENS, first),
        "match": spell(first, last),
        "after": spell(last, last + _CONTEXT_TOKENS),
    }


def format_match(facts: dict[str, Any]) -> str:
    """``describe_match`` on one line: the tokens that hold the text between ``>>`` and ``<<``."""
    source = facts["source"]
    came_from = f" ({source['path']}, document {source['document']})" if source is not None else ""
    text = f"{facts['before']}>>{facts['match']}<<{facts['after']}".replace("\n", "\\n").replace("\r", "\\r")
    return f"document {facts['document']}{came_from}, token {facts['offset']}: {text}"
