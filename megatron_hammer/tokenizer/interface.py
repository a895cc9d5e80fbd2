"""What a tokenizer can do, whichever kind of file it was read from: the base class of all backends.

What holds for every kind:

- ``encode`` never adds an id that the text does not call for, and text cannot inject a control id: a document that
  spells ``</s>`` gets ordinary pieces. The one exception is a property of some Hugging Face files and sentencepiece
  models: *non-special* added tokens and user-defined symbols (``<br>``, digits) are pieces like others and do match.
- ``vocab_size`` is the largest id + 1, never padded. Padding for tensor parallelism exists only inside the model.
- ``fingerprint`` hashes what decides ids and nothing else: no path, no training metadata. Datasets and checkpoints
  carry it, so that ids made by one tokenizer are never read with another.

Other packages import this class for their types, and get an object of it from ``load.load_tokenizer``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from megatron_hammer.base.errors import DataError
from megatron_hammer.tokenizer.pieces import Pieces

SpecialIds = tuple[int | None, int | None, int | None, int | None]
"""The ids of bos, eos, unk and pad; None where the tokenizer has no such piece."""


class Tokenizer(ABC):
    """A tokenizer of any kind. ``load_tokenizer`` makes one."""

    kind: ClassVar[str]
    path: Path
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    fingerprint: str
    """32 hex digits: BLAKE2b-128 of vocabulary, scores or merges, normaliser and special ids."""
    encoder: str
    """What makes the ids, and why it is not our own encoder where it is not: for programs to print."""
    assumption: str = ""
    """What was assumed because the file does not say it, in a sentence for people, or nothing."""
    always_converts: bool = True
    """Whether a Hugging Face folder can have its ids, whatever its pieces are (``convert.py``)."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special ids are added, and none can be spelt by the text."""

    @abstractmethod
    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """The ids of each text, equal to ``encode`` of it."""

    def encode_documents(
        self, texts: Sequence[str], threads: int = 1, first: int | None = None, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts one after the other, for an indexed dataset.

        Args:
            first: id put before the ids of every text that has any; ``last`` likewise behind them. An empty text gets
                neither: its length is 0.

        Returns:
            ids: [sum of lengths] int32; lengths: [texts] int64, tokens of each text.
        """
        before = [] if first is None else [first]
        behind = [] if last is None else [last]
        documents = [[*before, *ids, *behind] if ids else [] for ids in self.encode_batch(list(texts), threads)]
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        ids = np.fromiter((token for document in documents for token in document), np.int32, int(lengths.sum()))
        return ids, lengths

    def encode_pieces(self, pieces: Iterable[str], threads: int = 1) -> Iterator[np.ndarray]:
        """The ids of one text that comes in pieces: int32 parts, one after the other; no special ids.

        Where the encoder can cut a text, memory holds a few pieces; else they are joined first.
        """
        yield self.encode_documents(["".join(pieces)], threads)[0]

    def template_ids(self) -> list[int]:
        """The ids that the tokenizer itself puts around a text for those who ask it to, as Hugging Face's can."""
        return []

    @property
    def begins_with_bos(self) -> bool:
        """Whether a text begins with bos where nothing is known of the documents that a model was trained on."""
        return self.bos_id is not None and self.template_ids()[:1] == [self.bos_id]

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text that the ids stand for; special ids stand for nothing."""

    @abstractmethod
    def find_id(self, token: str) -> int | None:
        """The id of a token by its name in the vocabulary, control tokens included; None where there is none."""

    @abstractmethod
    def read_pieces(self) -> Pieces:
        """What each id stands for, as the tokenizer's file says."""

    def piece_bytes(self) -> np.ndarray:
        """``[vocab_size] int32``: UTF-8 bytes of text that each id stands for, ``Pieces.lengths``.

        0 for control, unknown and other ids that no text produces. The bytes of a text's ids add up to the bytes of the
        text; a dummy prefix adds one, and a literal U+2581 in the text counts as the space it decodes to.
        """
        return self.read_pieces().lengths

    def piece_characters(self) -> np.ndarray:
        """``[vocab_size] int32``: characters of text that each id stands for, ``Pieces.characters``; they add up as the
        bytes do."""
        return self.read_pieces().characters

    @abstractmethod
    def save_files(self, directory: Path) -> None:
        """Write into an existing folder what ``load_tokenizer`` needs to get an equal tokenizer from it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, vocab_size={self.vocab_size})"


def refuse_surrogates(texts: Iterable[str], error: Exception) -> Exception:
    """What to raise when a library refused to encode: our error where the text is no Unicode, else the library's."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as found:
            return DataError(
                14, f"text {text[:20]!a}", f"holds half of a surrogate pair at character {found.start}",
                "pass text that is valid Unicode",
            )  # fmt: skip
    return error
