"""Counts a dataset's characters by script without decoding it: how often each id occurs, times what its piece spells.

A whole character inside a piece has a script. Characters spelt in bytes (byte fallback, or pieces of byte-level BPE
that are no whole characters) are counted by their leading bytes, as "bytes". The replacement character U+FFFD is
counted inside pieces, and where it is spelt by up to three pieces in a row.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.scripts import SCRIPTS, script_of

_REPLACEMENT = "\ufffd".encode()  # EF BF BD
_TOKENS_AT_ONCE = 1 << 18  # their temporaries stay in the cache
_COMPARED = 8  # so many comparisons cost no more than one look-up


class ScriptCounts:
    """Counts the characters of a dataset, whose ids are of one tokenizer, by script.

    Args:
        tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pieces = tokenizer.read_pieces()
        self.unk_id = tokenizer.unk_id
        self.spelt_replacements = 0
        """U+FFFD that no piece holds whole."""
        content = self.pieces.content
        size = len(content)
        first, last = _REPLACEMENT[:1], _REPLACEMENT[-1:]
        self._open_1 = np.fromiter((piece.endswith(first) for piece in content), bool, size)
        self._open_2 = np.fromiter((piece.endswith(_REPLACEMENT[:2]) for piece in content), bool, size)
        self._close_1 = np.fromiter((piece.startswith(last) for piece in content), bool, size)
        self._close_2 = np.fromiter((piece.startswith(_REPLACEMENT[1:]) for piece in content), bool, size)
        self._middle = np.fromiter((piece == _REPLACEMENT[1:2] for piece in content), bool, size)
        self._is_opener = np.append(self._open_1 | self._open_2, False)
        """One more: ids beyond the vocabulary are clipped to it."""
        self._openers = np.flatnonzero(self._is_opener)

    def add_spelt(self, counts: np.ndarray, tokens: np.ndarray, first: int, end: int) -> None:
        """Count the U+FFFD that begin in ``tokens[first:end]`` and are spelt by several pieces.

        Args:
            counts: how often each id occurs there; mostly it says that there is nothing to look for.
            tokens: of the whole dataset: a character may go on beyond ``end``.
        """
        openers = self._openers[self._openers < len(counts)]
        openers = openers[counts[openers] > 0]
        if len(openers) == 0:
            return
        for start in range(first, end, _TOKENS_AT_ONCE):
            part = tokens[start : min(start + _TOKENS_AT_ONCE, end)]
            if len(openers) <= _COMPARED:  # as with byte fallback, which has one
                is_opener = part == openers[0]
                for token in openers[1:]:
                    is_opener |= part == token
            else:
                is_opener = np.take(self._is_opener, part, mode="clip")
            self.spelt_replacements += self._count_spelt(tokens, start + np.flatnonzero(is_opener))

    def _count_spelt(self, tokens: np.ndarray, at: np.ndarray) -> int:
        """U+FFFD that begin in the pieces at some places and end in a later one."""
        here, next_1, next_2 = (self._known(tokens, at + shift) for shift in (0, 1, 2))
        whole_2 = _of(self._open_2, here) & _of(self._close_1, next_1)
        whole_1 = _of(self._open_1, here) & _of(self._close_2, next_1)
        whole_3 = _of(self._open_1, here) & _of(self._middle, next_1) & _of(self._close_1, next_2)
        return int((whole_1 | whole_2 | whole_3).sum())

    def _known(self, tokens: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Ids at some places, -1 behind the end of the dataset and for ids beyond the vocabulary."""
        ids = np.full(len(at), -1, np.int64)
        inside = at < len(tokens)
        ids[inside] = tokens[at[inside]]
        ids[ids >= len(self._open_1)] = -1
        return ids

    def describe(self, counts: np.ndarray, num_tokens: int) -> dict[str, Any]:
        """Characters, their scripts by share, replacement characters, and the shares of byte pieces and unknown ids.

        Args:
            counts: int64, how often each id occurs in the whole dataset.
        """
        scripts: Counter[str] = Counter()
        replacements = self.spelt_replacements
        of_character: dict[str, str] = {}
        for token in np.flatnonzero(counts[: len(self.pieces.content)]).tolist():
            content, count = self.pieces.content[token], int(counts[token])
            if self.pieces.is_byte[token]:
                scripts["bytes"] += count * sum(byte & 0xC0 != 0x80 for byte in content)
                replacements += count * content.count(_REPLACEMENT)
                continue
            for character in content.decode():
                if character not in of_character:
                    of_character[character] = script_of(character)
                scripts[of_character[character]] += count
                replacements += count * (character == "\ufffd")
        total = sum(scripts.values())
        byte_pieces = int(counts[: len(self.pieces.is_byte)][self.pieces.is_byte[: len(counts)]].sum())
        unknown = int(counts[self.unk_id]) if self.unk_id is not None and self.unk_id < len(counts) else 0
        return {
            "count": total,
            "per_token": total / max(1, num_tokens),
            "scripts": {name: scripts[name] / total for name in SCRIPTS if scripts[name]},
            "replacement_characters": replacements,
            "byte_token_share": byte_pieces / max(1, num_tokens),
            "unknown_tokens": unknown,
        }


def _of(table: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """A property of pieces for some ids; False where there is none (-1)."""
    return np.asarray(table[ids] & (ids >= 0))
