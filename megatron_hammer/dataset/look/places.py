"""Where the documents of a dataset begin and end in its tokens, which one holds a token, and what text one came from.

All of it is looked up in the index in pieces of bounded size, so that memory does not grow with the number of
documents; ``TokenMap`` goes through the tokens in the same way. (``IndexedDataset`` keeps such tables whole, for
training, which asks for millions of documents.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_hammer.dataset.reader import IndexedDataset, map_file

DOCUMENTS_AT_ONCE = 1 << 20
"""Of the index looked at together: some tens of megabytes."""


def document_starts(dataset: IndexedDataset, first: int, count: int) -> np.ndarray:
    """int64 [count + 1]: first token of documents ``first`` to ``first + count``, then where the last one ends."""
    return _first_tokens(dataset, np.array(dataset.document_indices[first : first + count + 1]))


def document_spans(dataset: IndexedDataset, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token of each of some documents, and where each ends: int64 [n] each."""
    bounds = dataset.document_indices
    return _first_tokens(dataset, bounds[documents]), _first_tokens(dataset, bounds[documents + 1])


def _first_tokens(dataset: IndexedDataset, sequences: np.ndarray) -> np.ndarray:
    """First token of each of some sequences, int64; of the one behind the last, the number of tokens."""
    starts = np.full(len(sequences), dataset.num_tokens, np.int64)
    inside = sequences < dataset.num_sequences
    starts[inside] = dataset.pointers[sequences[inside]] // dataset.dtype.itemsize
    return starts


def iterate_starts(dataset: IndexedDataset, at_once: int = DOCUMENTS_AT_ONCE) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first document, ``document_starts``) of all documents, some at a time."""
    for first in range(0, dataset.num_documents, at_once):
        yield first, document_starts(dataset, first, min(at_once, dataset.num_documents - first))


def document_of_token(dataset: IndexedDataset, token: int) -> tuple[int, int]:
    """The document that a token of the dataset belongs to, and its place in that document."""
    sequence = _last_at_most(dataset.pointers, token * dataset.dtype.itemsize)
    document = _last_at_most(dataset.document_indices[:-1], sequence)
    return document, token - int(document_starts(dataset, document, 0)[0])


def _last_at_most(values: np.ndarray, value: int) -> int:
    """The last place in rising ``values`` that holds no more than ``value``; NumPy's search would copy all of them."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if values[middle] <= value else (low, middle)
    return low


class TokenMap:
    """The tokens of .bin on a mapping of our own, whose pages are given back after use: a scan needs little memory."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self._size, self._mapped = dataset.dtype.itemsize, map_file(dataset.bin_path)
        self.all = np.frombuffer(self._mapped.array(), dataset.dtype, dataset.num_tokens)
        """[num_tokens]"""

    def blocks(self, block_bytes: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """(block, first token, tokens) from start to end; ``block_bytes``: whole pages and whole tokens.

        Raises:
            DataError: E350 the file was changed meanwhile.
        """
        step = block_bytes // self._size
        for block, first in enumerate(range(0, len(self.all), step)):
            tokens = self.all[first : first + step]
            yield block, first, tokens
            self._mapped.check()
            self._mapped.forget(first * self._size, tokens.nbytes)


def document_source(dataset: IndexedDataset, document: int) -> tuple[str, int] | None:
    """The input file that a document came from, and its number among the documents of that file; None: not recorded."""
    sources = dataset.header.sources if dataset.header is not None else ()
    if sum(source.documents for source in sources) != dataset.num_documents:
        return None
    for source in sources:
        if document < source.documents:
            return source.path, document
        document -= source.documents
    raise AssertionError("the sources hold all documents")
