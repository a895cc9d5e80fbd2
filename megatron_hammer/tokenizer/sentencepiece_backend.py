"""Tokenizers of the sentencepiece library: a ``.model`` file, whatever algorithm it asks for.

Ids come from our own compiled encoder where it can read the model (``encode.py``), else from the sentencepiece
library: ``Tokenizer.encoder`` says which, and why. Both give the same ids. The facts of a model (settings, special
ids, pieces) are read by the compiled encoder or by protobuf, and are the same too.

Imports sentencepiece and protobuf only when they are needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.files import replace_file
from megatron_hammer.tokenizer import encode as fast
from megatron_hammer.tokenizer.interface import SpecialIds, Tokenizer, refuse_surrogates
from megatron_hammer.tokenizer.pieces import Pieces, pack_pieces, pieces_of_model, unpack_pieces
from megatron_hammer.tokenizer.tokenizer_files import MAX_MODEL_BYTES, read_tokenizer

_CUT_CHARACTERS = 4096  # at the end of a part of a text, in which a place to cut is looked for


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file, whatever algorithm it asks for; ids are sentencepiece's own.

    Attributes:
        model_bytes: the file's content.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_bytes = read_tokenizer(path, MAX_MODEL_BYTES)
        self._processor: Any = None
        self._encoder: Any = None
        if fast.COMPILED is None:
            proto = parse_model(self.model_bytes, path)
            if not all(isinstance(piece.piece, str) for piece in proto.pieces):  # protobuf returns others as bytes
                raise _damaged_model(path, "a piece is not valid UTF-8")
            facts = _facts_by_protobuf(proto, self.processor)
            reason = fast.NOT_COMPILED
        else:
            try:
                model = fast.COMPILED.Model(self.model_bytes)
                reason = model.unsupported()
                if not reason:
                    self._encoder = fast.COMPILED.Encoder(model)
            except ValueError as error:
                raise _damaged_model(path, str(error)) from None
            if self._encoder is None:
                _ = self.processor  # what it refuses must not be found later
            facts = _Facts(
                model.settings(), model.charsmap(), model.special_ids(), model.packed_pieces(), model.piece_bytes()
            )
        self.encoder = f"sentencepiece ({reason})" if reason else "C++ (sentencepiece's BPE, same ids)"
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = facts.special_ids
        self._facts = facts
        self.always_converts = bool(facts.settings["byte_fallback"])  # the folder around the .model itself is exact
        self.vocab_size = len(facts.piece_bytes)
        self.fingerprint = _fingerprint_model(facts)

    @property
    def begins_with_bos(self) -> bool:  # as sentencepiece's models are exported (``convert.py``)
        return self.bos_id is not None

    @property
    def removes_extra_spaces(self) -> bool:
        """Whether the model drops spaces at both ends of a text and all but one of each run."""
        return bool(self._facts.settings["remove_extra_whitespaces"])

    @property
    def has_byte_fallback(self) -> bool:
        """Whether a character without a piece becomes its bytes, so that nothing in a text is unknown."""
        return bool(self._facts.settings["byte_fallback"])

    @property
    def processor(self) -> Any:
        """The sentencepiece library's own, loaded when it is first needed."""
        if self._processor is None:
            self._processor = load_processor(self.model_bytes, self.path)
        return self._processor

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        ids: list[list[int]]
        if self._encoder is not None:
            ids = self._call(self._encoder.encode_batch, texts, threads)
            return ids
        try:
            ids = self.processor.encode(list(texts), num_threads=threads)
        except (RuntimeError, TypeError, UnicodeError) as error:
            raise refuse_surrogates(texts, error) from None
        return ids

    def encode_documents(
        self, texts: Sequence[str], threads: int = 1, first: int | None = None, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._encoder is not None:
            documents: tuple[np.ndarray, np.ndarray] = self._call(
                self._encoder.encode_documents, texts, threads, first, last
            )
            return documents
        return super().encode_documents(texts, threads, first, last)

    def encode_pieces(self, pieces: Iterable[str], threads: int = 1) -> Iterator[np.ndarray]:
        if self._encoder is None or not self._encoder.parts_are_independent():
            yield from super().encode_pieces(pieces, threads)
            return
        rest, continued = "", False
        for piece in pieces:
            text = rest + piece
            cut = self._encoder.safe_cut(text, max(len(text) - _CUT_CHARACTERS, 1))
            if cut < len(text):  # else there is no place to cut: more must be known
                yield self._call(self._encoder.encode_documents, [text[:cut]], threads, None, None, continued)[0]
                continued = True
            rest = text[cut:] if cut < len(text) else text
        yield self._call(self._encoder.encode_documents, [rest], threads, None, None, continued)[0]

    @staticmethod
    def _call(encode: Any, texts: Sequence[str], *arguments: Any) -> Any:
        try:
            return encode(texts, *arguments)
        except UnicodeError as error:
            raise refuse_surrogates(texts, error) from None

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self.processor.decode([int(i) for i in ids])
        return text

    def find_id(self, token: str) -> int | None:
        names = (name for name, _, _ in unpack_pieces(self._facts.packed_pieces))
        return next((index for index, name in enumerate(names) if name == token.encode()), None)

    def read_pieces(self) -> Pieces:
        return pieces_of_model(self._facts.packed_pieces, self.vocab_size)

    def piece_bytes(self) -> np.ndarray:
        return self._facts.piece_bytes.copy()  # which the compiled encoder knows already

    def save_files(self, directory: Path) -> None:
        replace_file(Path(directory) / "tokenizer.model", self.model_bytes)


# ---- model files ----


def parse_model(content: bytes, path: Path) -> Any:
    """The ``ModelProto`` of a sentencepiece model file, its main parts checked.

    Raises:
        DataError: E312.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise _damaged_model(path, "it does not parse") from None
    # Pieces come first in the file: where the settings behind them are missing, the end was cut off.
    if not proto.pieces or not proto.HasField("trainer_spec") or not proto.HasField("normalizer_spec"):
        raise _damaged_model(path, "pieces or settings are missing")
    return proto


def load_processor(content: bytes, path: Path) -> Any:
    """A ``SentencePieceProcessor`` for a model file's content, without the library's chatter on stderr.

    Raises:
        DataError: E312.
    """
    import sentencepiece

    quiet_sentencepiece()
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except (RuntimeError, OSError) as error:
        raise _damaged_model(path, str(error)) from None
    return processor


def quiet_sentencepiece() -> None:
    """Only errors of the library reach stderr: a merged vocabulary with a NUL piece would warn at every load."""
    import sentencepiece

    if hasattr(sentencepiece, "SetMinLogLevel"):  # since 0.2.1
        sentencepiece.SetMinLogLevel(2)


def _damaged_model(path: Path, cause: str) -> DataError:
    return DataError(
        12, str(path), f"is not a whole sentencepiece model ({cause})",
        "fetch or train it again; a Hugging Face tokenizer.json can be named directly",
    )  # fmt: skip


@dataclass(frozen=True)
class _Facts:
    """What a model file says about ids, read by the compiled encoder or by protobuf: one and the same."""

    settings: dict[str, int | bool]
    """Of the trainer and the normaliser: those that decide ids."""
    charsmap: bytes
    """The compiled normalisation rules."""
    special_ids: SpecialIds
    packed_pieces: bytes
    """All pieces, as ``pieces.pack_pieces`` writes them."""
    piece_bytes: np.ndarray
    """``Pieces.lengths``."""


def _facts_by_protobuf(proto: Any, processor: Any) -> _Facts:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    packed = pack_pieces((piece.piece, piece.score, piece.type) for piece in proto.pieces)
    lengths = pieces_of_model(packed, len(proto.pieces)).lengths
    settings = {
        "model_type": trainer.model_type,
        "byte_fallback": trainer.byte_fallback,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "add_dummy_prefix": normalizer.add_dummy_prefix,
        "remove_extra_whitespaces": normalizer.remove_extra_whitespaces,
        "escape_whitespaces": normalizer.escape_whitespaces,
    }
    ids = (processor.bos_id(), processor.eos_id(), processor.unk_id(), processor.pad_id())
    bos, eos, unk, pad = (i if i >= 0 else None for i in ids)
    return _Facts(settings, normalizer.precompiled_charsmap, (bos, eos, unk, pad), packed, lengths)


def _fingerprint_model(facts: _Facts) -> str:
    settings = facts.settings | {
        "format": "sentencepiece-1",
        "normalizer": hashlib.sha256(facts.charsmap).hexdigest(),
        "special_ids": list(facts.special_ids),
        "pieces": len(facts.piece_bytes),
    }
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
    digest.update(facts.packed_pieces)
    return digest.hexdigest()
