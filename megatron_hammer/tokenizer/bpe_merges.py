"""The merges of a sentencepiece BPE model, in the order in which a tokenizer.json has to list them.

sentencepiece knows no merges, only pieces with scores: of all adjacent pairs whose join is a piece it merges the one
whose piece scores best, of equal scores the leftmost. The tokenizers library has a list of merges and performs the one
that stands first.

*One merge a piece.* While a stretch of text is merged into piece p, nothing outside takes part, so the steps are those
of encoding p alone, and the last of them is always the same pair. All other ways to split p never win a merge and can
be left out; so can every p that encoding p alone does not reach.

*Equal scores.* tokenizers gives each merge a rank of its own, so one of two equal merges always goes first, wherever it
stands. That makes a difference only where performing one can prevent or precede the other:
(a) they share a symbol: X = (x, y), Y = (y, z) on x y z; (b) Y = (xy, x) grows what X = (x, y) made, as in runs of
spaces; (c) X's piece is a part of an equal or better piece that takes a symbol which Y needs too. Each demands one
order; a topological sort meets all demands. Should they contradict each other, the final proof decides.
"""

from __future__ import annotations

import heapq
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import RefusedError
from megatron_hammer.tokenizer.pieces import SPACE

Pair = tuple[str, str]
"""The two parts that a merge joins."""


def not_expressible(path: Path, rule: str) -> RefusedError:
    """E501: the error for a model that uses something which no tokenizer.json has."""
    return RefusedError(
        1, str(path), f"{rule}, which a tokenizer.json cannot reproduce exactly",
        "the folder gets the model itself, in a class that calls sentencepiece",
    )  # fmt: skip


def is_never_emitted(piece: Any) -> bool:
    """Single characters that sentencepiece has a piece for and yet spells in bytes."""
    return len(piece.piece) == 1 and (piece.type == piece.UNUSED or piece.piece == "\0")


def derive_merges(proto: Any, path: Path) -> tuple[list[Pair], list[str]]:
    """The merges of a sentencepiece BPE model in tokenizers' order, and texts on which that order matters.

    Raises:
        RefusedError: E501 where a merge cannot be written down.
    """
    # A piece with a raw space is never met: spaces are escaped before.
    mergeable = [
        p
        for p in proto.pieces
        if p.type in (p.NORMAL, p.USER_DEFINED, p.UNUSED) and p.piece != "\0" and " " not in p.piece
    ]
    scores = {piece.piece: piece.score for piece in mergeable}
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    emitted = {piece.piece for piece in mergeable if not is_never_emitted(piece)}
    symbols = [p.piece for p in mergeable if p.type == p.USER_DEFINED]
    has_symbol = re.compile("|".join(map(re.escape, symbols)) if symbols else "(?!)").search

    last_pairs: dict[str, Pair] = {}  # piece: the pair that always makes it
    for piece in mergeable:
        text = piece.piece
        # A symbol in the text is cut out before merging: no merge can span it.
        if len(text) < 2 or has_symbol(text) or (pair := _last_merge(text, scores)) is None:
            continue
        if piece.type == piece.UNUSED:
            raise not_expressible(path, f"merges into the unused piece {text!r} and takes it apart again")
        if missing := [part for part in pair if part not in emitted]:
            raise not_expressible(path, f"merges the character {missing[0]!r}, which has no piece, into {text!r}")
        last_pairs[text] = pair

    by_score = defaultdict(list)
    for text in last_pairs:
        by_score[scores[text]].append(text)
    demands, directed = _order_demands(last_pairs, scores)
    merges = []
    for score in sorted(by_score, reverse=True):
        for text in _sort_equals(by_score[score], ids, demands):
            merges.append(last_pairs[text])
    return merges, directed


def _last_merge(text: str, scores: Mapping[str, float]) -> Pair | None:
    """The last of the merges that make ``text`` one piece; None where merging ends earlier.

    Quadratic in the length, which is a few dozen characters at most.
    """
    parts = list(text)
    while len(parts) > 2:
        best, at = None, -1
        for index in range(len(parts) - 1):
            score = scores.get(parts[index] + parts[index + 1])
            if score is not None and (best is None or score > best):  # ">": of equals the leftmost
                best, at = score, index
        if best is None:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _order_demands(
    last_pairs: Mapping[str, Pair], scores: Mapping[str, float]
) -> tuple[dict[str, set[str]], list[str]]:
    """For each piece the equal-scored pieces that must be ranked after it, by the module's rules (a), (b), (c)."""
    by_left, by_right = defaultdict(list), defaultdict(list)  # (symbol, score): pieces that have it as that part
    for text, (left, right) in last_pairs.items():
        by_left[left, scores[text]].append(text)
        by_right[right, scores[text]].append(text)
    # The worst score among the merges inside a piece: merging gets to it after everything better is done.
    levels: dict[str, float] = {}
    for text in sorted(last_pairs, key=len):
        left, right = last_pairs[text]
        levels[text] = min(scores[text], levels.get(left, math.inf), levels.get(right, math.inf))
    demands: dict[str, set[str]] = defaultdict(set)
    directed: list[str] = []

    def level(*parts: str) -> float:
        return min((levels.get(part, math.inf) for part in parts), default=math.inf)

    def demand(first: str, second: str, left: Sequence[str], shared: Sequence[str], right: Sequence[str]) -> None:
        """Rank ``first`` before ``second``, if the symbols left + shared + right can wait side by side for both.

        They cannot where one side comes to be only when the other pair is long merged, or where the right side holds
        what ``first`` makes: of the same merge, the one on the left happens first anyway.
        """
        if first == second:
            return
        late_right = level(*right) < min(level(*left, *shared), scores[first])
        late_left = level(*left) < min(level(*shared, *right), scores[first])
        directed.append("".join((*left, *shared, *right)).replace(SPACE, " "))
        if not late_right and not late_left and first not in right:
            demands[first].add(second)

    for text, pair in last_pairs.items():
        left, right = pair
        for other in by_left[right, scores[text]]:  # (a)
            demand(text, other, (left,), (right,), (last_pairs[other][1],))
        if left in last_pairs and scores[left] == scores[text] and last_pairs[left][0] == right:  # (b)
            demands[text].add(left)
        if left in last_pairs and scores[left] <= scores[text]:  # (c), on the right side: left is made, then taken
            for other in by_left[right, scores[left]]:
                if other != text:
                    demand(left, other, last_pairs[left], (), last_pairs[other])
        if right in last_pairs and scores[right] < scores[text]:  # (c), on the left side; equal scores are (a)
            for other in by_right[left, scores[right]]:
                demand(other, right, last_pairs[other], (), last_pairs[right])
    return demands, directed


def _sort_equals(texts: list[str], ids: Mapping[str, int], demands: Mapping[str, set[str]]) -> Iterator[str]:
    """Pieces of one score in an order that meets the demands; otherwise by id (Kahn's algorithm)."""
    waiting_for = dict.fromkeys(texts, 0)
    for text in texts:
        for later in demands.get(text, ()):
            if later in waiting_for:
                waiting_for[later] += 1
    ready = [(ids[text], text) for text in texts if waiting_for[text] == 0]
    heapq.heapify(ready)
    while waiting_for:
        if ready:
            text = heapq.heappop(ready)[1]
        else:  # the demands contradict each other: go on somewhere, and leave the verdict to the proof
            text = min(waiting_for, key=lambda t: (waiting_for[t], ids[t]))
        del waiting_for[text]
        yield text
        for later in demands.get(text, ()):
            if later in waiting_for:
                waiting_for[later] -= 1
                if waiting_for[later] == 0:
                    heapq.heappush(ready, (ids[later], later))
