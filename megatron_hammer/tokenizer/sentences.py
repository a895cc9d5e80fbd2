"""Text as a tokenizer's trainer takes it: documents cut into sentences, and a fair sample of them.

A sentence is a stretch of a document that the trainer sees at once, with the line breaks inside it.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterator

from megatron_hammer.tokenizer.pieces import SPACE

# The trainer drops a whole sentence that holds its word boundary (tab) or its mark for unknown characters (U+2585),
# and no piece may hold NUL. A literal U+2581 would be counted as a space. Cutting there costs nothing: no piece can
# span one.
_RESERVED = re.compile("[\t\0\u2585" + SPACE + "]+")
_SENTENCE_ENDS = tuple(mark.encode() for mark in "。！？；，")


def split_sentences(text: str, max_bytes: int) -> Iterator[bytes]:
    """Cut a document into stretches of UTF-8 of at most ``max_bytes``, at places where training loses least.

    The best place is before a run of spaces, where the trainer cuts words anyway; then after a line break, then after
    Chinese punctuation; failing all, between two characters.
    """
    for stretch in _RESERVED.split(text):
        rest = stretch.encode("utf-8")
        while len(rest) > max_bytes:
            cut = _find_cut(rest, max_bytes)
            yield rest[:cut]
            rest = rest[cut:]
        if rest:
            yield rest


def _find_cut(data: bytes, max_bytes: int) -> int:
    half = max_bytes // 2  # a cut further left would make too many short stretches
    window = data[:max_bytes]
    space = window.rfind(b" ")
    if space >= 0:
        start = len(window[: space + 1].rstrip(b" "))  # of the run of spaces
        if start > half:
            return start
    newline = window.rfind(b"\n") + 1
    if newline > half:
        return newline
    mark = max(window.rfind(mark) + len(mark) if mark in window else 0 for mark in _SENTENCE_ENDS)
    if mark > half:
        return mark
    cut = max_bytes
    while data[cut] & 0xC0 == 0x80:  # inside a character
        cut -= 1
    return cut


class HashSample:
    """The sentences with the smallest hashes that fit into ``limit`` bytes: a random choice that depends on them alone.

    Streaming: a heap keeps the largest hash on top; once a hash was too large it stays so, whatever comes later, and
    therefore the outcome is the same for every order of the input.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.seen_bytes = self.kept_bytes = 0
        self._cut: bytes | None = None
        self._heap: list[tuple[bytes, bytes]] = []  # (inverted hash, sentence)

    def add(self, sentence: bytes, key: bytes = b"") -> None:
        """Offer a sentence; with a key of its own (its place, say), equal ones are chosen one by one."""
        self.seen_bytes += len(sentence)
        inverted = bytes(255 - byte for byte in hashlib.blake2b(sentence, digest_size=8, key=key).digest())
        if self._cut is not None and inverted <= self._cut:
            return
        heapq.heappush(self._heap, (inverted, sentence))
        self.kept_bytes += len(sentence)
        while self.kept_bytes > self.limit:
            self._cut, dropped = heapq.heappop(self._heap)
            self.kept_bytes -= len(dropped)
            while self._heap and self._heap[0][0] == self._cut:  # equal sentences stay or go together
                self.kept_bytes -= len(heapq.heappop(self._heap)[1])

    @property
    def sentences(self) -> list[bytes]:
        """The sample, in an order that follows from the hashes alone."""
        return [sentence for _, sentence in sorted(self._heap)]
