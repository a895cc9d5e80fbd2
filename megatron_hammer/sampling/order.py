"""Which tokens are sample number p of one source: a pure function, so nothing about it is ever saved.

"independent", our own order. The documents of a source follow each other in an endless stream, each epoch in a new
permutation; windows of s + 1 tokens start every s tokens and are read, epoch by epoch, in a permutation of their own::

    stream    | epoch 0: T tokens, documents permuted | epoch 1: the same documents, permuted anew | ...
    windows   |---w0---|---w1---|---w2---|---w3---|---w4---|---w5---|---w6---| ...   w covers [w s, w s + s]
    samples   w1 w3 w0 w2 (those that start in epoch 0, permuted)  w6 w4 w5 ...

All of it follows from (seed, content of the source, s, p): extending a run, another batch size or another number of
ranks changes nothing that came before. No token is dropped at the end of an epoch: its last window goes on into the
next one. A permutation is a keyed function with random access (``index.permute``); all that is stored is one token
count every 64 documents, for the epochs in use. A run of several lengths goes on with what is unread (``rest.py``).

"megatron", Megatron-LM's order, for those who move a run: all epochs' documents are shuffled together (or the last one
apart), then all samples, by one MT19937. It needs the number of samples in advance and changes when that does.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megatron_hammer.base.errors import ConfigError
from megatron_hammer.sampling import index_builder as index
from megatron_hammer.sampling.cache import IndexStore, Key
from megatron_hammer.sampling.rest import WHOLE, Rest, read_windows

_STRIDE = 64  # documents between two token counts: 1/8 byte a document, and a window is found among 64 documents
_EPOCHS_KEPT = 4  # the current one, the next (which its last window reads) and the past ones of a look back


class SampleId(NamedTuple):
    """Names a sample whatever its number in the run: a window of a source, and the epoch in which it begins."""

    source: int
    epoch: int
    window: int


class DocumentSpan(NamedTuple):
    """Consecutive tokens of one document, which a sample reads."""

    document: int
    offset: int
    length: int


def derive_key(*parts: int | str) -> int:
    """A 64-bit key for ``index.permute`` from a seed, a purpose and whatever else it must depend on."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class IndependentOrder:
    """Our own order of one source.

    Args:
        lengths: int32 or int64, tokens of each document; at least one token in all.
        fingerprint: content of the source (``IndexedDataset.fingerprint``): equal data has an equal order, whatever its
            path and its place in the mix.
        seq_length: s; a sample holds s + 1 tokens.
        seed: of the run.
        store: where the token counts of large sources are kept; None: in memory only.
        rest: finds, when it is asked for, what samples of another length have left of the source (``rest_after``).
    """

    def __init__(
        self,
        lengths: np.ndarray,
        fingerprint: str,
        seq_length: int,
        seed: int,
        store: IndexStore | None = None,
        rest: Callable[[], Rest] = lambda: WHOLE,
    ) -> None:
        self.lengths, self.seq_length, self._find_rest = lengths, seq_length, rest
        self._store = store
        self.num_tokens = int(lengths.sum(dtype=np.int64))
        assert self.num_tokens > 0 and seq_length > 0, f"{self.num_tokens} tokens, seq_length {seq_length}"
        self._seed, self._fingerprint = seed, fingerprint
        self._marks: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()  # a thread may read ahead while another locates samples

    @cached_property
    def rest(self) -> Rest:
        """The targets that the windows are cut from."""
        return self._find_rest()

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows of samples [first, first + count) of the source (from 0, without end): int64."""
        parts = []
        while count > 0:
            begin, end, key = self._pass(first)
            taken = min(count, end - first)
            parts.append(begin + index.permute(end - begin, key, first - begin, taken))
            first, count = first + taken, count - taken
        return np.concatenate(parts)

    def _pass(self, position: int) -> tuple[int, int, int]:
        """The windows [begin, end) among which that of a sample is permuted, and the key: those that start in an epoch,
        or in what an earlier length has left of one."""
        s, rest = self.seq_length, self.rest
        tag = [rest.tag] if rest.tag else []
        behind = -(-rest.unfinished // s)  # the first window behind the unfinished pass
        if position < behind:
            return 0, behind, derive_key(self._seed, "windows", self._fingerprint, "rest", *tag)
        epoch = (position * s + rest.shift) // self.num_tokens
        begin, end = (max(behind, -(-(e * self.num_tokens - rest.shift) // s)) for e in (epoch, epoch + 1))
        return begin, end, derive_key(self._seed, "windows", self._fingerprint, epoch, *tag)

    def passes(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(begin, end) of the windows, and so of the samples, of the passes that hold samples [first, last]."""
        while first <= last:
            begin, end, _ = self._pass(first)
            yield begin, end
            first = end

    def rest_after(self, position: int) -> Rest:
        """What the first ``position`` samples have left of the source."""
        begin, end, key = self._pass(position)
        s, rest = self.seq_length, self.rest
        tag = f"{rest.tag} {s}:{position}".strip()
        if position == begin:  # no pass is unfinished, or nothing of it is read
            return rest if position == 0 else rest.behind(begin * s, tag)

        def build() -> dict[str, np.ndarray]:
            left = rest.without(end - begin, read_windows(end - begin, key, position - begin), begin * s, s, tag)
            return {"pieces": left.pieces, "firsts": left.firsts, "at": np.array([left.unfinished, left.goes_on_at])}

        follows_from: Key = {"dataset": self._fingerprint, "seed": self._seed, "read": tag}
        kept = build() if self._store is None else self._store.get("rest", follows_from, end - begin, build)
        unfinished, goes_on_at = kept["at"].tolist()
        return Rest(kept["pieces"], kept["firsts"], unfinished, goes_on_at - unfinished, tag)

    def epochs(self, windows: np.ndarray) -> list[int]:
        """The epoch in whose stream each of some windows begins."""
        s, rest = self.seq_length, self.rest
        if rest.unfinished == 0:  # a window's number times seq_length may leave 64 bits
            return [(window * s + rest.shift) // self.num_tokens for window in windows.tolist()]
        found: list[int] = ((rest.positions(windows * s) - 1) // self.num_tokens).tolist()
        return found

    def locate_all(self, windows: np.ndarray) -> index.Located:
        """What ``locate`` says of each of some windows: all spans, and how many each window has."""
        s, total, shift = self.seq_length, self.num_tokens, self.rest.shift
        first, last = int(windows.min()), int(windows.max())
        epoch = (first * s + shift) // total
        if first * s < self.rest.unfinished or ((last + 1) * s + shift) // total > epoch:
            # Seldom: pieces of a rest, or windows that begin in several epochs or go on into the next.
            located = [np.array(self.locate(window), np.int64) for window in windows.tolist()]
            return np.concatenate(located), np.array([len(spans) for spans in located], np.int64)
        # From the first of them on: in a far epoch, a window's number times seq_length may leave 64 bits.
        offsets = (windows - first) * s + (first * s + shift - epoch * total)
        key, marks = self._epoch(epoch)
        return index.locate_windows(self.lengths, marks, _STRIDE, key, offsets, s + 1)

    def locate(self, window: int) -> list[DocumentSpan]:
        """The seq_length + 1 tokens of a window, in order: its targets, and the token before the first of them."""
        spans: list[DocumentSpan] = []
        before = 1
        for position, count in self.rest.intervals(window * self.seq_length, self.seq_length):
            spans += self._locate_tokens(position - before, count + before)
            before = 0
        return spans

    def _locate_tokens(self, position: int, missing: int) -> list[DocumentSpan]:
        """Consecutive tokens of the stream."""
        epoch, offset = divmod(position, self.num_tokens)
        spans: list[DocumentSpan] = []
        while missing > 0:
            key, marks = self._epoch(epoch)
            found = index.find_pieces(self.lengths, marks, _STRIDE, key, offset, missing)
            spans.extend(DocumentSpan(*row) for row in found.tolist())
            missing -= int(found[:, 2].sum())
            epoch, offset = epoch + 1, 0
        return spans

    def documents(self, epoch: int, first: int, count: int) -> np.ndarray:
        """Documents ``first`` to ``first + count`` of an epoch, in the order of its stream: int64."""
        key = derive_key(self._seed, "documents", self._fingerprint, epoch)
        return index.permute(len(self.lengths), key, first, count)

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Key of the epoch's permutation of documents, and its token counts."""
        with self._lock:
            if epoch not in self._marks:
                key = derive_key(self._seed, "documents", self._fingerprint, epoch)
                self._marks[epoch] = key, self._find_marks(epoch, key)
                if len(self._marks) > _EPOCHS_KEPT:
                    self._marks.popitem(last=False)
            self._marks.move_to_end(epoch)
            return self._marks[epoch]

    def _find_marks(self, epoch: int, key: int) -> np.ndarray:
        def build() -> dict[str, np.ndarray]:
            return {"marks": index.epoch_marks(self.lengths, key, _STRIDE)}

        if self._store is None:
            return build()["marks"]
        follows_from: Key = {"dataset": self._fingerprint, "seed": self._seed, "epoch": epoch, "stride": _STRIDE}
        return self._store.get("marks", follows_from, len(self.lengths), build)["marks"]

    def prepare(self, first: int, last: int) -> None:
        """Build, or find, what reading samples [first, last] needs."""
        s, rest = self.seq_length, self.rest
        ends = np.array([0 if first * s < rest.unfinished else first * s, max(last * s, rest.unfinished)])
        low, high = ((rest.positions(ends) - 1) // self.num_tokens).tolist()
        for epoch in range(low, high + 1):
            self._epoch(epoch)


class MegatronIndex(NamedTuple):
    """The three arrays of Megatron-LM's GPT dataset."""

    documents: np.ndarray
    """int32, sequences of all epochs in the order of the stream."""
    samples: np.ndarray
    """[n + 1, 2], where in that stream each sample starts (``index.sample_index``)."""
    shuffle: np.ndarray
    """uint32, or int64 from 2^32 - 2 samples on: which sample is the p-th."""


class MegatronOrder:
    """Megatron-LM's order of one source, whose unit is the sequence.

    Args:
        lengths: int32, tokens of each sequence.
        seq_length: s; a sample holds s + 1 tokens.
        seed: of the run, in [0, 2^32).
        num_samples: how many the run will draw at most.
        store: where the arrays of large sources are kept; None: in memory only.
        fingerprint: content of the source, by which they are found there.
        forget: see ``build_megatron_index``.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seq_length: int,
        seed: int,
        num_samples: int,
        store: IndexStore | None = None,
        fingerprint: str = "",
        forget: Callable[[], None] | None = None,
    ) -> None:
        if not 0 <= seed < 1 << 32:
            raise ConfigError(
                71, f"train.seed={seed}", "must be in [0, 2^32) for data.order=megatron", "choose another seed"
            )
        self.lengths, self.seq_length = lengths, seq_length
        self.num_tokens = int(lengths.sum(dtype=np.int64))

        def build() -> dict[str, np.ndarray]:
            everything = range(len(lengths))
            return build_megatron_index(lengths, everything, seq_length, seed, num_samples, forget=forget)._asdict()

        if store is None:
            arrays = build()
        else:
            assert fingerprint, "an index is kept by the content of its source"
            key: Key = {"dataset": fingerprint, "seed": seed, "seq_length": seq_length, "samples": num_samples}
            work = len(lengths) * num_epochs(self.num_tokens, num_samples, seq_length) + num_samples
            arrays = store.get("megatron", key, work, build)
        self.index = MegatronIndex(**arrays)
        self.num_samples = len(self.index.shuffle)
        """Samples in the epochs that were needed: num_samples or a few more."""

    def prepare(self, first: int, last: int) -> None:
        """Nothing: all was built, or found, at once."""

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows of samples [first, first + count) of the source: int64; epochs are shuffled together."""
        return self.index.shuffle[first : first + count].astype(np.int64)

    def epochs(self, windows: np.ndarray) -> list[int]:
        """The epoch in which each of some windows begins."""
        return [window * self.seq_length // self.num_tokens for window in windows.tolist()]

    def locate_all(self, windows: np.ndarray) -> index.Located:
        """What ``locate`` says of each of some windows: all spans, and how many each window has."""
        return index.megatron_windows(self.lengths, self.index.documents, self.index.samples, windows, 1)

    def locate(self, window: int) -> list[DocumentSpan]:
        """The seq_length + 1 tokens of a window; ``document`` stands for the sequence."""
        return megatron_spans(self.index, self.lengths, window)


def num_epochs(tokens: int, num_samples: int | None, seq_length: int, extra: int = 1) -> int:
    """Passes over ``tokens`` that give ``num_samples``; one when that is None."""
    return 1 if num_samples is None else max(1, -(-(num_samples * seq_length + extra) // tokens))


def build_megatron_index(
    lengths: np.ndarray,
    indices: np.ndarray | range,
    seq_length: int,
    seed: int,
    num_samples: int | None = None,
    extra: int = 1,
    drop_last: bool = True,
    forget: Callable[[], None] | None = None,
) -> MegatronIndex:
    """Document, sample and shuffle index as Megatron-LM builds them.

    Args:
        lengths: int32, tokens of each sequence.
        indices: int32, the sequences that belong to this split; or a range of them, step 1.
        seed: of the one generator that makes both shuffles.
        num_samples: None: one epoch.
        extra, drop_last: see ``index.sample_index``.
        forget: called once ``lengths`` have been copied, to give back the pages of the map that they came from.
    """
    # They are read at random: from our own memory, in large pages, in half the time that a mapped file takes.
    lengths = np.array(lengths)
    if forget is not None:
        forget()
    taken = lengths[indices.start : indices.stop] if isinstance(indices, range) else lengths[indices]
    tokens = int(taken.sum(dtype=np.int64))
    epochs = num_epochs(tokens, num_samples, seq_length, extra)
    before_last = ((epochs - 1) * tokens - extra) // seq_length if epochs > 1 else 0
    # A last epoch of which little is needed is shuffled apart, lest its few samples thin out the documents of all.
    apart = (
        num_samples is not None
        and epochs > 1
        and num_samples - before_last < int(0.80 * ((tokens - extra) // seq_length))  # 0.80: Megatron-LM's threshold
    )
    random = index.random_state(seed)
    one = np.arange(indices.start, indices.stop, dtype=np.int32) if isinstance(indices, range) else indices
    documents = np.tile(np.asarray(one, np.int32), epochs) if epochs > 1 or one is indices else one
    del one, taken
    split = (epochs - 1) * len(indices) if apart else len(documents)
    random.shuffle(documents[:split])
    random.shuffle(documents[split:])
    samples = index.sample_index(lengths, documents, seq_length, epochs * tokens, extra, drop_last)
    total = len(samples) - 1
    shuffle = np.arange(total, dtype=np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64)
    split = before_last if apart else total
    random.shuffle(shuffle[:split])
    random.shuffle(shuffle[split:])
    return MegatronIndex(documents, samples, shuffle)


def megatron_spans(built: MegatronIndex, lengths: np.ndarray, window: int, extra: int = 1) -> list[DocumentSpan]:
    """Where the tokens of sample ``window`` (before the shuffle) lie; ``document`` stands for the sequence."""
    found, _ = index.megatron_windows(lengths, built.documents, built.samples, np.array([window], np.int64), extra)
    return [DocumentSpan(*row) for row in found.tolist()]
