"""Continues a pass over a source when the length of its samples changes: by the tokens that were not read yet.

A pass over a source that has begun at one ``seq_length`` is finished at another by what the old windows have left:
their targets, in the order of the stream, joined, followed by the whole passes after it::

    stream of the source   |..w0..|..w1..|..w2..|..w3..|..w4..|..w5..|  next pass ...     w1, w4 and w5 have been read
    targets of the rest    |..w0..|      |..w2..|..w3..|                next pass ...
    its pieces              piece 0       piece 1                       piece 2, without end

The rest is cut into windows of the new length as a source is (``order.py``), and so it has a rest in turn. Between two
pieces the text jumps, as it does between documents; ``data.attention_mask=document`` keeps them apart. All of it is a
function of what has been read, the lengths and positions in ``tag``. A piece takes 16 bytes; there are at most half as
many as there are windows in a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_hammer.sampling import index_builder as index

_WINDOWS_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Rest:
    """The targets that are left of a source's endless stream, in order."""

    pieces: np.ndarray
    """[n] int64, position in the stream at which each piece begins; the last one has no end."""
    firsts: np.ndarray
    """[n] int64, targets of the rest before each piece."""
    unfinished: int
    """Targets of the pass that had begun; 0: none had."""
    shift: int
    """What the number of a target behind this pass lacks to the position before it."""
    tag: str
    """What has been read so far; empty: nothing."""

    def intervals(self, first: int, count: int) -> list[tuple[int, int]]:
        """(position in the stream, length) of the targets [first, first + count) of the rest, in order."""
        found = []
        piece = int(np.searchsorted(self.firsts, first, "right")) - 1
        while count > 0:
            taken = count
            if piece + 1 < len(self.firsts):
                taken = min(count, int(self.firsts[piece + 1]) - first)
            found.append((int(self.pieces[piece]) + first - int(self.firsts[piece]), taken))
            first, count, piece = first + taken, count - taken, piece + 1
        return found

    @property
    def goes_on_at(self) -> int:
        """Position in the stream before that of the first target behind the unfinished pass."""
        return self.unfinished + self.shift

    def positions(self, targets: np.ndarray) -> np.ndarray:
        """Position in the stream of some targets: int64."""
        piece = np.searchsorted(self.firsts, targets, "right") - 1
        found: np.ndarray = self.pieces[piece] + (targets - self.firsts[piece])
        return found

    def targets_at(self, first: int, count: int) -> list[tuple[int, int]]:
        """Which targets the positions [first, first + count) of the stream are: (number, length) of those unread."""
        ends = np.append(self.pieces[:-1] + np.diff(self.firsts), np.iinfo(np.int64).max)
        low, high = np.maximum(self.pieces, first), np.minimum(ends, first + count)
        held = np.flatnonzero(low < high)
        numbers = self.firsts[held] + (low[held] - self.pieces[held])
        return list(zip(numbers.tolist(), (high[held] - low[held]).tolist(), strict=True))

    def behind(self, target: int, tag: str) -> Rest:
        """What is left when all targets before one are read, which is behind the unfinished pass."""
        at = target + self.shift
        return Rest(np.array([at + 1]), np.array([0]), 0, at, tag)

    def without(self, windows: int, read: np.ndarray, first: int, seq_length: int, tag: str) -> Rest:
        """What is left when some windows of a pass are read.

        Args:
            windows: of the pass.
            read: bool [windows], which of them.
            first: number of the first target of the pass.
        """
        edges = np.flatnonzero(np.diff(read, prepend=True, append=True))  # a run of unread windows: begin, end
        begins, ends = first + edges[::2] * seq_length, first + edges[1::2] * seq_length
        cuts = self.firsts
        if len(begins):
            at = np.searchsorted(begins, cuts, "right") - 1
            cuts = cuts[(at >= 0) & (cuts > begins[at]) & (cuts < ends[at])]
            begins, ends = np.sort(np.append(begins, cuts)), np.sort(np.append(ends, cuts))
        unfinished, behind = int((ends - begins).sum()), first + windows * seq_length
        pieces = np.append(self.positions(begins), behind + self.shift + 1)
        firsts = np.append(0, np.cumsum(ends - begins))
        joins = pieces[1:] == pieces[:-1] + np.diff(firsts)  # goes on where the piece before it ends
        kept = np.append(True, ~joins)
        return Rest(pieces[kept], firsts[kept], unfinished, behind + self.shift - unfinished, tag)


WHOLE = Rest(np.array([1]), np.array([0]), 0, 0, "")
"""Of a source of which nothing has been read; position 0 of the stream is no target."""


def read_windows(windows: int, key: int, count: int) -> np.ndarray:
    """bool [windows], those that the first ``count`` samples of a pass are."""
    read = np.zeros(windows, bool)
    for first in range(0, count, _WINDOWS_AT_ONCE):
        read[index.permute(windows, key, first, min(_WINDOWS_AT_ONCE, count - first))] = True
    return read
