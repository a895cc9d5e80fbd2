"""The tokenizer.json of a sentencepiece model, derived from what sentencepiece does, step by step.

The stock conversion goes wrong for merged vocabularies (HammerLLM's is one): it ranks merges by piece id, where id
order is not score order, and it prepends a space that the model does not ask for.

sentencepiece                                           tokenizer.json
------------------------------------------------------  ---------------------------------------------------------------
extra spaces go, where the model says so                normalizer: Replace with an expression, before and after
space becomes U+2581; perhaps one is put in front       normalizer: [Prepend,] Replace
user-defined symbols: longest match, never merged       added tokens, not special, matched after the normalizer
BPE: merge the adjacent pair whose piece scores best;   one merge a piece, ranked by score; among equal scores in an
of equal scores the leftmost                            order that keeps "leftmost" (see below)
char: every character is a piece                        no merges
a character without a piece becomes bytes, or, without  byte_fallback, fuse_unk
byte fallback, one unk for all that stand together
a NUL piece, or a single character declared unused or   its entry has a name that no text can spell
a control piece, is never emitted
``<s>`` in a text is text                               ``split_special_tokens`` in tokenizer_config.json

What it cannot express, ``json_obstacle`` names:

- *Unigram.* The tokenizers library has that algorithm too, but adds up scores in float64 where sentencepiece does in
  float32, and of splits that are equal but for rounding (``oc|ation`` against ``oca|tion``; a long run of spaces in two
  pieces) it finds another one. Tried with a 6,000-piece model, byte and control pieces put out of the reach of text and
  user-defined symbols scored as sentencepiece does: 1 % of 100,000 fuzz strings, 0.6 % of Chinese, 2 % of English and
  7 % of code documents still differed.
- *word.* sentencepiece makes one unk of unknown words that follow each other, WordLevel one of each.
- *Normalisation of characters.* sentencepiece applies the longest rule at every place; ``Precompiled`` looks at one
  grapheme and takes its shortest rule (a decomposed Vietnamese vowel loses its tone), or at single characters.
- *A dummy prefix or removed spaces beside user-defined symbols*: the normalizer would change the symbols too.

The merges
----------
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


def json_obstacle(proto: Any) -> str:
    """Why no tokenizer.json gives the ids of a sentencepiece model, as far as its settings tell; or an empty string."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    symbols = any(piece.type == piece.USER_DEFINED for piece in proto.pieces)
    reasons = (
        (
            trainer.model_type == trainer.UNIGRAM,
            "is a unigram model, and the tokenizers library rounds sums of scores otherwise",
        ),
        (trainer.model_type == trainer.WORD, "is a word model"),
        (bool(normalizer.precompiled_charsmap), f"normalises characters ({normalizer.name or 'a rule of its own'})"),
        (normalizer.remove_extra_whitespaces and symbols, "has user-defined symbols and removes extra spaces"),
        (not normalizer.escape_whitespaces, "does not escape spaces"),
        (
            trainer.treat_whitespace_as_suffix and normalizer.add_dummy_prefix,
            "puts a space at the end of every text",
        ),
        (bool(proto.denormalizer_spec.precompiled_charsmap), "changes characters when decoding"),
        (normalizer.add_dummy_prefix and symbols, "has both a dummy prefix and user-defined symbols"),
    )
    return next((rule for found, rule in reasons if found), "")


def definition_of(proto: Any, path: Path) -> tuple[dict[str, Any], list[str]]:
    """The content of the tokenizer.json, and texts on which the order of its merges matters.

    Raises:
        RefusedError: E501 there is none, by the settings of the model or because a merge cannot be written down.
    """
    if why := json_obstacle(proto):
        raise _refused(path, why)
    merges: list[Pair] = []
    directed: list[str] = []
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        merges, directed = derive_merges(proto, path)
    return build_definition(proto, merges), directed


def build_definition(proto: Any, merges: list[Pair]) -> dict[str, Any]:
    """The content of the tokenizer.json with these merges."""
    names = _vocabulary_names(proto)
    fallback = proto.trainer_spec.byte_fallback
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto, names),
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _decoder(proto.normalizer_spec, fallback),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(names[i] for i, piece in enumerate(proto.pieces) if piece.type == piece.UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": fallback,
            "ignore_merges": False,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }


def _added_tokens(proto: Any, names: list[str]) -> list[dict[str, Any]]:
    added = []
    for index, piece in enumerate(proto.pieces):
        control = piece.type in (piece.CONTROL, piece.UNKNOWN)
        # A symbol with a raw space never matches: the space of the text is escaped before symbols are looked for.
        if control or (piece.type == piece.USER_DEFINED and " " not in piece.piece):
            added.append(
                {
                    "id": index,
                    "content": names[index],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": not control,
                    "special": control,
                }
            )
    return added


def _normalizer(spec: Any) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace(" ", SPACE)]
    if spec.add_dummy_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    if spec.remove_extra_whitespaces:
        steps[:0] = [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " +"}, " ")]
        steps.append(_replace({"Regex": rf"{SPACE}+\z"}, ""))  # what the text itself writes as U+2581 goes too
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "normalizers": steps}


def _decoder(spec: Any, byte_fallback: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace(SPACE, " "), {"type": "Fuse"}]
    if byte_fallback:
        steps.insert(1, {"type": "ByteFallback"})
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: str | dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern} if isinstance(pattern, str) else pattern,
            "content": content}  # fmt: skip


def _vocabulary_names(proto: Any) -> list[str]:
    """The pieces by id; those that a text never emits under a name that is too long to be met as a character."""
    taken = {piece.piece for piece in proto.pieces}
    names = []
    for index, piece in enumerate(proto.pieces):
        name = piece.piece
        if is_never_emitted(piece) or (len(name) == 1 and piece.type in (piece.CONTROL, piece.UNKNOWN)):
            name = f"<unused_{index}>"
            while name in taken:
                name = f"<{name}>"
            taken.add(name)
        names.append(name)
    return names


# ---- the merges ----


def _refused(path: Path, rule: str) -> RefusedError:
    """E501: the error for a model that no tokenizer.json reproduces."""
    return RefusedError(1, str(path), rule, "the folder gets the model itself, in a class that calls sentencepiece")


_NOT_EXPRESSIBLE = "which a tokenizer.json cannot reproduce exactly"


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
            raise _refused(path, f"merges into the unused piece {text!r} and takes it apart again, {_NOT_EXPRESSIBLE}")
        if missing := [part for part in pair if part not in emitted]:
            rule = f"merges the character {missing[0]!r}, which has no piece, into {text!r}"
            raise _refused(path, f"{rule}, {_NOT_EXPRESSIBLE}")
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
