"""The loops over every document or sample in NumPy: the reference, which also runs where nothing was compiled.

Each function has a compiled twin in ``csrc/data`` that returns identical arrays; ``index_builder.py`` chooses. Values
that cannot be (a negative length, a document out of range) are a ``ValueError`` in both: files are checked before
(``dataset/reader.py``), so only a mistake of ours meets it. Needs no torch.
"""

from __future__ import annotations

import math

import numpy as np

LARGEST_N = 1 << 60
_MASK = (1 << 64) - 1
_BLOCK = 1 << 20  # documents handled at once: some tens of megabytes of scratch

Located = tuple[np.ndarray, np.ndarray]
"""Spans of all windows, int64 [spans, 3] of (document, offset in it, length), and how many each window has, int64."""

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Source of each sample int16, its number in that source int64, and how many each source has given then, int64."""


def random_state(seed: int) -> np.random.RandomState:
    """MT19937, for shuffles; seed in [0, 2^32)."""
    return np.random.RandomState(seed)


def permute(n: int, key: int, start: int, count: int) -> np.ndarray:
    """Values ``start`` to ``start + count`` of the pseudo-random permutation of [0, n) that ``key`` chooses: int64.

    A generalised Feistel network over rows x columns just above n, with cycle walking (Black and Rogaway 2002); the
    construction is stated in ``csrc/data/index_builder.hpp``. Random access, no memory, n at most 2^60.
    """
    if not 0 <= n <= LARGEST_N:
        raise ValueError("n must be in [0, 2^60]")
    if not (start >= 0 and count >= 0 and start + count <= n):
        raise ValueError("start and count must stay within [0, n)")
    out = np.empty(count, np.int64)
    for first in range(0, count, _BLOCK):
        block = np.arange(start + first, start + min(first + _BLOCK, count), dtype=np.uint64)
        out[first : first + len(block)] = _permute_values(block, n, key)
    return out


def _round_keys(key: int, rounds: int) -> list[int]:
    """splitmix64 (Steele, Lea and Flood 2014) started at ``key``."""
    keys = []
    for _ in range(rounds):
        key = (key + 0x9E3779B97F4A7C15) & _MASK
        z = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        keys.append(z ^ (z >> 31))
    return keys


def _permute_values(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """The permutation applied to each of ``values`` (uint64, all below n)."""
    rows = max(math.isqrt(n - 1) + 1 if n > 0 else 0, 1)  # the rounded-up square root
    columns = np.uint64(max(-(-n // rows), 1))
    moduli = (np.uint64(rows), columns)
    keys = [np.uint64(k) for k in _round_keys(key, 24 if n < 1 << 16 else 8)]
    half = np.uint64(32)
    out = values.copy()
    outside = np.arange(len(values))
    while len(outside):  # cycle walking: again for those that fell beyond n
        current = out[outside]
        sides = [current // columns, current % columns]
        for number, round_key in enumerate(keys):
            side, other = number % 2, 1 - number % 2
            x = (sides[other] ^ round_key) * np.uint64(0xD6E8FEB86659FD93)
            x ^= x >> half
            x *= np.uint64(0xFF51AFD7ED558CCD)
            sides[side] += ((x >> half) * moduli[side]) >> half
            sides[side] -= np.where(sides[side] >= moduli[side], moduli[side], np.uint64(0))
        current = sides[0] * columns + sides[1]
        out[outside] = current
        outside = outside[current >= np.uint64(n)]
    return out.astype(np.int64)


def epoch_marks(lengths: np.ndarray, key: int, stride: int) -> np.ndarray:
    """Tokens before every ``stride``-th document position of an epoch that ``permute(len(lengths), key)`` orders.

    int64 of ceil(n / stride) + 1; the last one is the total. From these ``find_pieces`` finds any window by looking at
    ``stride`` documents, so an epoch costs 8 / stride bytes a document instead of 8 to 16 bytes a window.
    """
    if stride < 1:
        raise ValueError("stride must be at least 1")
    n = len(lengths)
    blocks = -(-n // stride)
    marks = np.zeros(blocks + 1, np.int64)
    step = max(_BLOCK // stride, 1)
    for first in range(0, blocks, step):
        last = min(first + step, blocks)
        start, stop = first * stride, min(last * stride, n)
        taken = lengths[permute(n, key, start, stop - start)].astype(np.int64)
        if taken.min() < 0:
            raise ValueError("a length is negative")
        sums = np.add.reduceat(taken, np.arange(0, stop - start, stride))
        marks[first + 1 : last + 1] = marks[first] + np.cumsum(sums)
        if marks[last] < marks[first]:
            raise ValueError("the lengths sum up beyond 64 bits")
    return marks


def find_pieces(lengths: np.ndarray, marks: np.ndarray, stride: int, key: int, offset: int, count: int) -> np.ndarray:
    """Where tokens [offset, offset + count) of an epoch lie: int64 [pieces, 3] of (document, offset in it, length).

    Stops early at the end of the epoch; empty documents give no piece. Arguments as for ``epoch_marks``.
    """
    n = len(lengths)
    if stride < 1 or len(marks) != -(-n // stride) + 1:
        raise ValueError("marks do not belong to these lengths")
    if not (0 <= offset <= marks[-1] and count >= 0):
        raise ValueError("offset or count is out of range")
    block = min(max(int(np.searchsorted(marks, offset, side="right")) - 1, 0), max(len(marks) - 2, 0))
    skip, position = offset - int(marks[block]), block * stride
    pieces = []
    while position < n and count > 0:
        documents = permute(n, key, position, min(stride, n - position))
        for document, length in zip(documents.tolist(), lengths[documents].tolist()):
            if length < 0:
                raise ValueError("a length is negative")
            if skip >= length:
                skip -= length
                continue
            taken = min(length - skip, count)
            pieces.append((document, skip, taken))
            count -= taken
            skip = 0
            if count == 0:
                break
        position += len(documents)
    return np.array(pieces, np.int64).reshape(-1, 3)


def locate_windows(
    lengths: np.ndarray, marks: np.ndarray, stride: int, key: int, offsets: np.ndarray, count: int
) -> Located:
    """``find_pieces`` for tokens [offset, offset + count) of each of ``offsets`` (int64) of one epoch."""
    found = [find_pieces(lengths, marks, stride, key, offset, count) for offset in offsets.tolist()]
    return _concatenate(found)


def megatron_windows(
    lengths: np.ndarray, documents: np.ndarray, samples: np.ndarray, windows: np.ndarray, extra: int
) -> Located:
    """Where samples ``windows`` (int64) of a ``sample_index`` lie: pieces (sequence, offset in it, length).

    Sample k is tokens [row k, row k + 1) of the stream of ``documents``, and ``extra`` more.
    """
    found = []
    for window in windows.tolist():
        if not 0 <= window < len(samples) - 1:
            raise ValueError("a window is out of range")
        (first, begin), (last, end) = samples[window].tolist(), samples[window + 1].tolist()
        if not 0 <= first <= last < len(documents):
            raise ValueError("samples do not belong to these documents")
        pieces = []
        for position in range(first, last + 1):
            sequence = int(documents[position])
            if not 0 <= sequence < len(lengths):
                raise ValueError("documents do not belong to these lengths")
            start = begin if position == first else 0
            stop = end + extra if position == last else int(lengths[sequence])
            if not (start >= 0 and stop <= lengths[sequence]):
                raise ValueError("samples do not belong to these lengths")
            if stop > start:
                pieces.append((sequence, start, stop - start))
        found.append(np.array(pieces, np.int64).reshape(-1, 3))
    return _concatenate(found)


def _concatenate(found: list[np.ndarray]) -> Located:
    pieces = np.concatenate([np.empty((0, 3), np.int64), *found])
    return pieces, np.array([len(rows) for rows in found], np.int64)


def copy_windows(
    tokens: np.ndarray,
    pointers: np.ndarray,
    boundaries: np.ndarray | None,
    pieces: np.ndarray,
    counts: np.ndarray,
    rows: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write the tokens of located windows: row ``rows[r]`` of ``out`` becomes window r, which must fill it exactly.

    Args:
        tokens: integers, all sequences one after the other.
        pointers: int64, byte offset of each sequence.
        boundaries: int64, first sequence of each document; None: a piece names its sequence, not its document.
        pieces, counts: as ``locate_windows`` returns them.
        rows: int64 [windows].
        out: [rows, width] int32 or int64, contiguous.
    """
    if out.dtype not in (np.int32, np.int64) or tokens.dtype.kind not in "iu" or tokens.itemsize > out.itemsize:
        raise TypeError("tokens must be integers of at most the width of out, which is int32 or int64")
    if len(rows) != len(counts) or (len(counts) and counts.min() < 0) or counts.sum() != len(pieces):
        raise ValueError("counts and rows do not belong to these pieces")
    if len(rows) and not (rows.min() >= 0 and rows.max() < len(out)):
        raise ValueError("a row is out of range")
    ends = np.cumsum(counts).tolist()
    for row, first, end in zip(rows.tolist(), [0, *ends], ends):
        filled = 0
        for unit, offset, length in pieces[first:end].tolist():
            for table in (boundaries, pointers):
                if table is not None:
                    if not 0 <= unit < len(table):
                        raise ValueError("a piece is of a document that is not there")
                    unit = int(table[unit])
            start = unit // tokens.itemsize + offset
            if unit < 0 or unit % tokens.itemsize or offset < 0 or not 0 <= length <= len(tokens) - start:
                raise ValueError("a piece reaches beyond the tokens")
            if length > out.shape[1] - filled:
                raise ValueError("a window has more tokens than a row")
            out[row, filled : filled + length] = tokens[start : start + length]
            filled += length
        if filled != out.shape[1]:
            raise ValueError("a window has fewer tokens than a row")


def count_samples(total_tokens: int, seq_length: int, extra: int, drop_last: bool) -> int:
    """Samples in a stream of ``total_tokens``: each takes ``seq_length`` and looks at ``extra`` tokens more."""
    if seq_length < 1 or extra not in (0, 1) or total_tokens < extra:
        raise ValueError("seq_length must be at least 1, extra 0 or 1, and total_tokens at least extra")
    usable = total_tokens - extra
    return usable // seq_length if drop_last else -(-usable // seq_length)


def needs_64_bits(lengths: np.ndarray, documents: np.ndarray) -> bool:
    """Whether a position in ``documents`` or an offset within one may leave 32 bits."""
    if len(documents) == 0:
        raise ValueError("documents must not be empty")
    return max(len(documents), int(lengths.max()) if len(lengths) else 0) > np.iinfo(np.int32).max


def sample_index(
    lengths: np.ndarray,
    documents: np.ndarray,
    seq_length: int,
    total_tokens: int,
    extra: int = 1,
    drop_last: bool = True,
) -> np.ndarray:
    """Megatron-LM's sample index: row k = (position in ``documents``, offset) where token k * seq_length lies.

    ``extra=1``: samples overlap by one token and a boundary belongs to the sequence whose token it is; ``extra=0``: a
    boundary on the end of a sequence stays there. ``drop_last=False`` keeps the partial sample, whose end is the last
    row (last position, its length - extra). Unlike Megatron-LM's, the number of samples does not pass through float32.

    Args:
        lengths: int32, tokens of each sequence.
        documents: int32, the order in which sequences follow each other; repeated for several epochs.
        total_tokens: tokens of the whole stream.

    Returns:
        [samples + 1, 2], int32, or int64 when positions or offsets need it.
    """
    wide = needs_64_bits(lengths, documents)
    samples = count_samples(total_tokens, seq_length, extra, drop_last)
    if documents.min() < 0 or documents.max() >= len(lengths):
        raise ValueError(f"a document is not in [0, {len(lengths)})")
    taken = lengths[documents].astype(np.int64)
    if taken.min() < 0:
        raise ValueError("a length is negative")
    ends = np.cumsum(taken)
    if total_tokens > ends[-1] or (not drop_last and total_tokens != ends[-1]):
        raise ValueError("total_tokens is not what the documents hold")
    full = (total_tokens - extra) // seq_length
    boundaries = np.arange(1, full + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, boundaries, side="right" if extra else "left")
    rows = np.zeros((samples + 1, 2), np.int64 if wide else np.int32)
    rows[1 : full + 1, 0] = positions
    rows[1 : full + 1, 1] = boundaries - (ends - taken)[positions]
    if samples > full:
        rows[samples] = len(documents) - 1, taken[-1] - extra
    return rows


def chairman_blend(weights: np.ndarray, drawn: np.ndarray, count: int) -> Drawn:
    """The next ``count`` samples of a mix after ``drawn`` ones: which source, and which of its samples.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): with n sources of shares w summing
    to 1, sample t = 1, 2, ... goes to the source with the earliest deadline,

        argmin of (1 - 1/(2n - 2) - lag) / w   over the sources with   lag = w t - drawn >= 1/(2n - 2),

    and every prefix then differs from w t by at most 1 - 1/(2n - 2). Float64 throughout; when rounding leaves no
    source eligible, the one that lags most is taken. Ties go to the first.
    """
    past = _check_past(weights, drawn, count)
    if weights.min() <= 0:
        raise ValueError("a weight must be above zero")
    slack = 1.0 / (2 * len(weights) - 2) if len(weights) > 1 else 0.0
    drawn = drawn.astype(np.int64)
    source, position = np.empty(count, np.int16), np.empty(count, np.int64)
    for i in range(count):
        lag = weights * float(past + i + 1) - drawn
        deadline = np.where(lag >= slack, ((1.0 - slack) - lag) / weights, np.inf)
        k = int(np.argmin(deadline)) if (lag >= slack).any() else int(np.argmax(lag))
        source[i], position[i] = k, drawn[k]
        drawn[k] += 1
    return source, position, drawn


def greedy_blend(weights: np.ndarray, drawn: np.ndarray, count: int, limits: np.ndarray | None = None) -> Drawn:
    """Like ``chairman_blend``, by Megatron-LM's rule: the largest w * max(i, 1) - drawn, the first one on ties.

    A prefix may be off by more than one sample. With ``limits`` a source leaves the contest once it gave so many.
    """
    past = _check_past(weights, drawn, count)
    drawn = drawn.astype(np.int64)
    most = np.full(len(weights), np.iinfo(np.int64).max) if limits is None else limits
    if len(most) != len(weights):
        raise ValueError("limits must have one entry per weight")
    source, position = np.empty(count, np.int16), np.empty(count, np.int64)
    for i in range(count):
        lag = np.where(drawn < most, weights * max(float(past + i), 1.0) - drawn, -np.inf)
        k = int(np.argmax(lag))
        if drawn[k] >= most[k]:
            raise ValueError("all sources are spent")
        source[i], position[i] = k, drawn[k]
        drawn[k] += 1
    return source, position, drawn


def blend_counts(chairman: bool, weights: np.ndarray, drawn: np.ndarray, count: int) -> np.ndarray:
    """The counts after the next ``count`` samples of either rule, int64: what the blends return last."""
    return (chairman_blend if chairman else greedy_blend)(weights, drawn, count)[2]


def _check_past(weights: np.ndarray, drawn: np.ndarray, count: int) -> int:
    """How many samples were drawn so far; the checks of the compiled version."""
    if not 1 <= len(weights) <= np.iinfo(np.int16).max or len(drawn) != len(weights):
        raise ValueError("weights must hold 1 to 32767 entries, and drawn as many")
    if not np.isfinite(weights).all() or weights.min() < 0 or drawn.min() < 0 or count < 0:
        raise ValueError("weights, drawn and count must be finite and not negative")
    past = int(drawn.sum())
    if past > (1 << 53) - count:  # beyond it a sample number is no longer exact in float64
        raise ValueError("too many samples")
    return past
