"""Context parallelism: which tokens of a micro-batch each rank of the group has, and which keys they attend to.

A pure function of the documents and the number of ranks: every rank computes the whole split and takes its own part.
Each rank gets the same number of tokens, so that shapes stay; what is balanced is the work of attention, the pairs of
a query and a key that it sees. Token i of a document sees i + 1 keys, so a document in equal parts one after the other
would give the last rank most of the pairs. It is cut in *zigzag* instead, as in Llama 3 (arXiv 2407.21783, section
3.3.2): into twice as many chunks as ranks, of which rank r gets chunk r and chunk r counted from the end::

    4 ranks, one document    | 0 | 1 | 2 | 3 | 3 | 2 | 1 | 0 |        each rank: two spans, the same number of pairs

Under a causal mask each sample is one document, and each is cut so. Under document masks a document that many ranks
share costs each of them keys that others have too, and short spans fill no block of a kernel. So short documents
stay whole where the balance allows: longest first, each goes to the rank with the fewest pairs that has room for it;
what fits nowhere fills the room that is left. A bound decides what is short. It starts at a rank's share of the tokens
and is halved until no rank has more than 1.05 times the mean of the pairs; at 0 every document is cut in zigzag.

Every span lies within one document. Its keys are those of the document from the first up to the span's last, so
its queries are the end of its keys (``kernels/packed_sequences.py``). RoPE's positions count within the document, as on
one rank. Pure arithmetic. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

BALANCE = 1.05  # of the mean of the pairs: below the 1.10 that the split must keep, and reached by few cuts


class TokenSpan(NamedTuple):
    """Neighbouring tokens of one document, counted from the micro-batch's first token."""

    document_start: int
    """The first token of the document."""
    first: int
    stop: int

    @property
    def pairs(self) -> int:
        """Of a query in it and a key that it sees."""
        seen_before, seen_at_last = self.first - self.document_start, self.stop - self.document_start
        return (seen_at_last * (seen_at_last + 1) - seen_before * (seen_before + 1)) // 2


@dataclass(frozen=True)
class SequenceShare:
    """What one rank has of a micro-batch of b s tokens."""

    rows: np.ndarray
    """[b s / cp] int64: its tokens, rising."""
    lengths: np.ndarray
    """[spans] int64: tokens of each span, one after the other as in ``rows``."""
    positions: np.ndarray
    """[b s / cp] int64: place of each token in its document."""
    key_lengths: np.ndarray
    """[spans] int64: keys of each span."""
    key_rows: np.ndarray
    """[sum of key_lengths] int64: which of the tokens of all ranks, gathered in the order of the ranks, each key is."""
    shards: int
    """Number of ranks."""


def share(ends: np.ndarray, rank: int, shards: int, keep_whole: bool) -> SequenceShare:
    """What rank ``rank`` of ``shards`` has.

    Args:
        ends: [documents + 1] cumulative lengths of the micro-batch's documents.
        keep_whole: leave documents whole where the balance allows; False: cut each in zigzag.
    """
    parts = split(ends, shards, keep_whole)
    gathered = np.empty(int(ends[-1]), dtype=np.int64)
    gathered[np.concatenate([_rows(part) for part in parts])] = np.arange(len(gathered))
    mine = parts[rank]
    return SequenceShare(
        _rows(mine),
        np.array([span.stop - span.first for span in mine]),
        np.concatenate([np.arange(s.first - s.document_start, s.stop - s.document_start) for s in mine]),
        np.array([span.stop - span.document_start for span in mine]),
        np.concatenate([gathered[span.document_start : span.stop] for span in mine]),
        shards,
    )


def token_index(ends: np.ndarray, shards: int, keep_whole: bool = True) -> list[np.ndarray]:
    """The tokens of each rank, [b s / cp] int64 each, rising. Arguments as of ``share``."""
    return [_rows(part) for part in split(ends, shards, keep_whole)]


def split(ends: np.ndarray, shards: int, keep_whole: bool = True) -> list[list[TokenSpan]]:
    """The spans of each rank, in the order of the tokens. Arguments as of ``share``."""
    room, left = divmod(int(ends[-1]), shards)
    assert left == 0, f"{ends[-1]} tokens cannot be divided over {shards} ranks"
    documents = sorted((TokenSpan(a, a, b) for a, b in zip(ends.tolist(), ends[1:].tolist())), key=_longest_first)
    bound = room if keep_whole and shards > 1 else 0
    while True:
        parts = _deal(documents, shards, room, bound)
        if bound == 0 or imbalance(parts) <= BALANCE:
            return [_joined(part) for part in parts]
        bound //= 2


def imbalance(parts: list[list[TokenSpan]]) -> float:
    """Pairs of the rank that has most, as a multiple of the mean."""
    pairs = [sum(span.pairs for span in part) for part in parts]
    return max(pairs) * len(pairs) / sum(pairs)


def _longest_first(document: TokenSpan) -> tuple[int, int]:
    return document.first - document.stop, document.first


def _deal(documents: list[TokenSpan], shards: int, room_each: int, bound: int) -> list[list[TokenSpan]]:
    """The spans of each rank; documents of up to ``bound`` tokens stay whole while a rank has room for them."""
    parts: list[list[TokenSpan]] = [[] for _ in range(shards)]
    room, pairs = [room_each] * shards, [0] * shards

    def give(rank: int, span: TokenSpan) -> None:
        parts[rank].append(span)
        room[rank] -= span.stop - span.first
        pairs[rank] += span.pairs

    for document in documents:
        length = document.stop - document.first
        roomy = [rank for rank in range(shards) if room[rank] >= length]
        if length > bound:
            for rank, span in _zigzag(document, room):
                give(rank, span)
        elif roomy:
            give(min(roomy, key=pairs.__getitem__), document)
        else:  # the last of its parts sees most keys: it goes to the rank with the fewest pairs
            first = document.first
            for rank in sorted(range(shards), key=pairs.__getitem__, reverse=True):
                stop = min(first + room[rank], document.stop)
                if first < stop:
                    give(rank, TokenSpan(document.document_start, first, stop))
                first = stop
    return parts


def _zigzag(document: TokenSpan, room: list[int]) -> list[tuple[int, TokenSpan]]:
    """(rank, chunk) of a document in zigzag; the tokens that do not divide go to the ranks with the most room.

    Where the documents before were cut so, too, no rank has room for more than one token more than another, and that
    stays: at most two tokens are left for a rank.
    """
    shards = len(room)
    chunk, left = divmod(document.stop - document.first, 2 * shards)
    sizes = [chunk] * (2 * shards)
    order = sorted(range(shards), key=lambda rank: -room[rank])
    ahead = sum(room[rank] > min(room) for rank in range(shards))
    # Round by round, one token a rank: first those that are one behind, then all, then those that had none at first.
    turns = [*order[:ahead], *order, *order[ahead:]]
    for turn in range(left):
        rank = turns[turn]
        second = rank in turns[:turn]
        sizes[rank if second else 2 * shards - 1 - rank] += 1
    cuts = np.cumsum([document.first, *sizes]).tolist()
    owners = [*range(shards), *reversed(range(shards))]
    return [
        (rank, TokenSpan(document.document_start, a, b))
        for rank, a, b in zip(owners, cuts, cuts[1:], strict=False)
        if a < b
    ]


def _joined(part: list[TokenSpan]) -> list[TokenSpan]:
    """In the order of the tokens, and neighbours of one document as one span."""
    joined: list[TokenSpan] = []
    for span in sorted(part, key=lambda span: span.first):
        if joined and joined[-1].stop == span.first and joined[-1].document_start == span.document_start:
            joined[-1] = joined[-1]._replace(stop=span.stop)
        else:
            joined.append(span)
    return joined


def _rows(part: list[TokenSpan]) -> np.ndarray:
    return np.concatenate([np.arange(span.first, span.stop) for span in part])
