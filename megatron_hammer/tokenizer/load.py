"""One face for the two kinds of tokenizer files: sentencepiece's ``.model`` and Hugging Face's ``tokenizer.json``.

    tokenizer.model   --> SentencePieceTokenizer   (sentencepiece's own ids: the truth for what we train ourselves)
    tokenizer.json    --> HuggingFaceTokenizer     (the file's own rules, never rebuilt by a transformers class)
    folder            --> the tokenizer.model in it, else the tokenizer.json

What holds for both kinds:

- ``encode`` never adds an id that the text does not call for, and text cannot inject a control id: a document that
  spells ``</s>`` gets ordinary pieces. The one exception is a property of some Hugging Face files and sentencepiece
  models: *non-special* added tokens and user-defined symbols (``<br>``, digits) are pieces like others and do match.
- ``vocab_size`` is the largest id + 1, never padded. Padding for tensor parallelism exists only inside the model.
- ``fingerprint`` hashes what decides ids and nothing else: no path, no training metadata. Datasets and checkpoints
  carry it, so that ids made by one tokenizer are never read with another.

Ids of a ``.model`` come from our own encoder where it is for it (``encode.py``), else from sentencepiece:
``Tokenizer.encoder`` says which, and why.

Imports sentencepiece or tokenizers only when they are needed; never torch, never transformers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megatron_hammer.base.errors import DataError
from megatron_hammer.base.files import replace_file
from megatron_hammer.tokenizer import encode as fast

SPACE = "\u2581"
"""The lower one eighth block that stands for a space in sentencepiece's pieces."""

_CUT_CHARACTERS = 4096  # at the end of a piece, in which a place to cut is looked for

# Names that well-known models give their document marks; asked only where no configuration file says anything.
_WELL_KNOWN_BOS = ("<s>", "<|begin_of_text|>")
_WELL_KNOWN_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


class Tokenizer(ABC):
    """Encodes and decodes text, and knows its special ids. Make one with ``load_tokenizer``."""

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

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text that the ids stand for; special ids stand for nothing."""

    @abstractmethod
    def piece_bytes(self) -> np.ndarray:
        """``[vocab_size] int32``: UTF-8 bytes of text that each id stands for.

        0 for control, unknown and other ids that no text produces. The bytes of a text's ids add up to the bytes of the
        text; a dummy prefix adds one, and a literal U+2581 in the text counts as the space it decodes to.
        """

    @abstractmethod
    def save_files(self, directory: Path) -> None:
        """Write into an existing folder what ``load_tokenizer`` needs to get an equal tokenizer from it."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, vocab_size={self.vocab_size})"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece ``.model``, a ``tokenizer.json``, or a folder that holds one (the ``.model`` goes first).

    Raises:
        DataError: E310 no such path, E311 a folder without a tokenizer, E312 a damaged or foreign ``.model``,
            E313 JSON that is no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("tokenizer.model", "tokenizer.json"):
            if (path / name).is_file():
                return load_tokenizer(path / name)
        raise DataError(
            11, str(path), "holds neither tokenizer.model nor tokenizer.json", "name a tokenizer file or its folder"
        )
    if not path.exists():
        raise DataError(
            10, str(path), "does not exist", "name a sentencepiece .model, a tokenizer.json or a Hugging Face folder"
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return SentencePieceTokenizer(path)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file, whatever algorithm it asks for; ids are sentencepiece's own.

    Attributes:
        model_bytes: the file's content.
    """

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model_bytes = path.read_bytes()
        self._processor: Any = None
        self._encoder: Any = None
        if fast.COMPILED is None:
            proto = parse_model(self.model_bytes, path)
            if not all(isinstance(piece.piece, str) for piece in proto.pieces):  # protobuf returns others as bytes
                raise _damaged_model(path, "a piece is not valid UTF-8")
            facts = _facts_by_protobuf(proto, self._sentencepiece)
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
                _ = self._sentencepiece  # what it refuses must not be found later
            facts = _facts_of_compiled(model)
        self.encoder = f"sentencepiece ({reason})" if reason else "C++ (sentencepiece's BPE, same ids)"
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = facts.special_ids
        self._piece_bytes = facts.piece_bytes
        self.vocab_size = len(self._piece_bytes)
        self.fingerprint = _fingerprint_model(facts)

    @property
    def _sentencepiece(self) -> Any:
        """The library's processor, loaded when it is first needed."""
        if self._processor is None:
            self._processor = load_processor(self.model_bytes, self.path)
        return self._processor

    def encode(self, text: str) -> list[int]:
        if self._encoder is not None:
            return self._call(self._encoder.encode_batch, [text], 1)[0]
        try:
            return self._sentencepiece.encode(text)
        except (RuntimeError, TypeError, UnicodeError) as error:
            raise _refuse_surrogates([text], error) from None

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        if self._encoder is not None:
            return self._call(self._encoder.encode_batch, texts, threads)
        try:
            return self._sentencepiece.encode(list(texts), num_threads=threads)
        except (RuntimeError, TypeError, UnicodeError) as error:
            raise _refuse_surrogates(texts, error) from None

    def encode_documents(
        self, texts: Sequence[str], threads: int = 1, first: int | None = None, last: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._encoder is not None:
            return self._call(self._encoder.encode_documents, texts, threads, first, last)
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
            raise _refuse_surrogates(texts, error) from None

    def decode(self, ids: Iterable[int]) -> str:
        return self._sentencepiece.decode([int(i) for i in ids])

    def piece_bytes(self) -> np.ndarray:
        return self._piece_bytes.copy()

    def save_files(self, directory: Path) -> None:
        replace_file(Path(directory) / "tokenizer.model", self.model_bytes)


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``, run by the tokenizers library.

    Literal special tokens in a text stay text (``encode_special_tokens``); truncation and padding that the file may
    ask for are switched off. Special ids are looked up in the files beside it, in this order: tokenizer_config.json,
    special_tokens_map.json, generation_config.json, config.json; then by well-known names.
    """

    kind = "tokenizers"
    encoder = "tokenizers (a tokenizer.json)"

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.path = path
        self.definition = _read_definition(path)
        try:
            self._backend = Backend.from_str(json.dumps(self.definition))
        except Exception as error:  # the Rust library raises bare Exception
            raise _not_a_tokenizer(path, str(error)) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise _not_a_tokenizer(path, "its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        special = _find_special_ids(path.parent, vocabulary, self.definition)
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = special
        self.fingerprint = _fingerprint_definition(self.definition, special)

    def encode(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise _refuse_surrogates([text], error) from None

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """As ``encode``. The library has one pool of threads for all: any ``threads`` above 1 means that pool."""
        if threads == 1:
            return [self.encode(text) for text in texts]
        try:
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeError) as error:
            raise _refuse_surrogates(texts, error) from None

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def piece_bytes(self) -> np.ndarray:
        return _piece_bytes_definition(
            self.definition, self._backend.get_vocab(with_added_tokens=True), self.vocab_size
        )

    def save_files(self, directory: Path) -> None:
        """``tokenizer.json`` as it is, and a ``tokenizer_config.json`` that states the special tokens found."""
        directory = Path(directory)
        replace_file(directory / "tokenizer.json", self.path.read_bytes())
        config = _read_json_object(self.path.with_name("tokenizer_config.json"))
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        for name, token_id in names.items():
            if token_id is None:
                config.pop(name, None)
            elif _token_content(config.get(name)) != self._backend.id_to_token(token_id):
                config[name] = self._backend.id_to_token(token_id)
        replace_file(directory / "tokenizer_config.json", dump_json(config))
        template = self.path.with_name("chat_template.jinja")
        if template.is_file():
            replace_file(directory / template.name, template.read_bytes())


# ---- sentencepiece model files ----


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


SpecialIds = tuple[int | None, int | None, int | None, int | None]
"""bos, eos, unk, pad."""


@dataclass(frozen=True)
class _Facts:
    """What a model file says about ids, read by the compiled encoder or by protobuf: one and the same."""

    settings: dict[str, int | bool]
    """Of the trainer and the normaliser: those that decide ids."""
    charsmap: bytes
    """The compiled normalisation rules."""
    special_ids: SpecialIds
    packed_pieces: bytes
    """For each piece, little endian: bytes of its text (u32), score (f32), type (u8), text."""
    piece_bytes: np.ndarray


def _facts_of_compiled(model: Any) -> _Facts:
    return _Facts(
        model.settings(), model.charsmap(), model.special_ids(), model.packed_pieces(), model.piece_bytes()
    )  # fmt: skip


def _facts_by_protobuf(proto: Any, processor: Any) -> _Facts:
    trainer, normalizer, kinds = proto.trainer_spec, proto.normalizer_spec, proto.SentencePiece
    packed = bytearray()
    lengths = np.zeros(len(proto.pieces), dtype=np.int32)
    for index, piece in enumerate(proto.pieces):
        text = piece.piece.encode()
        packed += struct.pack("<IfB", len(text), piece.score, piece.type) + text
        if piece.type == kinds.BYTE:
            lengths[index] = 1
        elif piece.type in (kinds.NORMAL, kinds.USER_DEFINED):
            lengths[index] = len(piece.piece.replace(SPACE, " ").encode())
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
    return _Facts(settings, normalizer.precompiled_charsmap, (bos, eos, unk, pad), bytes(packed), lengths)


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


# ---- tokenizer.json ----


def _not_a_tokenizer(path: Path, cause: str) -> DataError:
    return DataError(13, str(path), f"is not a tokenizer ({cause})", "name a tokenizer.json of the tokenizers library")


def _read_definition(path: Path) -> dict[str, Any]:
    try:
        definition = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_a_tokenizer(path, f"not valid JSON: {error}") from None
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise _not_a_tokenizer(path, "it describes no tokenizer model")
    return definition


def _read_json_object(path: Path) -> dict[str, Any]:
    """A configuration file beside the tokenizer; absent means empty."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(13, str(path), f"is not valid JSON: {error}", "mend or remove it") from None
    if not isinstance(value, dict):
        raise DataError(13, str(path), "is not a JSON object", "mend or remove it")
    return value


def _token_content(value: Any) -> str | None:
    """A token as configuration files write it: a string, or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _find_special_ids(
    folder: Path, vocabulary: dict[str, int], definition: dict[str, Any]
) -> tuple[int | None, int | None, int | None, int | None]:
    """The bos, eos, unk and pad ids by the search order of ``HuggingFaceTokenizer``."""
    by_token = [_read_json_object(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")]
    by_id = [_read_json_object(folder / name) for name in ("generation_config.json", "config.json")]

    def find(name: str, well_known: Sequence[str | None]) -> int | None:
        for config in by_token:
            token = _token_content(config.get(f"{name}_token"))
            if isinstance(token, str) and token in vocabulary:
                return vocabulary[token]
        for config in by_id:
            value = config.get(f"{name}_token_id")
            value = value[0] if isinstance(value, list) and value else value  # several: the first is the document's
            if isinstance(value, int) and value in vocabulary.values():
                return value
        return next((vocabulary[token] for token in well_known if token in vocabulary), None)

    unknown = definition["model"].get("unk_token")
    return find("bos", _WELL_KNOWN_BOS), find("eos", _WELL_KNOWN_EOS), find("unk", (unknown,)), find("pad", ())


def _fingerprint_definition(definition: dict[str, Any], special_ids: Sequence[int | None]) -> str:
    model = dict(definition["model"])
    if isinstance(model.get("merges"), list):  # written as "a b" by old versions, as ["a", "b"] by new ones
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    content = {
        "format": "tokenizers-1",
        "model": model,
        "added_tokens": definition.get("added_tokens") or [],
        "normalizer": definition.get("normalizer"),
        "pre_tokenizer": definition.get("pre_tokenizer"),
        "decoder": definition.get("decoder"),
        "special_ids": list(special_ids),
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def _piece_bytes_definition(definition: dict[str, Any], vocabulary: dict[str, int], vocab_size: int) -> np.ndarray:
    added = {token["content"]: token for token in definition.get("added_tokens") or []}
    decoders = flatten_decoders(definition.get("decoder"))
    unknown = definition["model"].get("unk_token")
    lengths = np.zeros(vocab_size, dtype=np.int32)
    for token, index in vocabulary.items():
        if token in added:
            lengths[index] = 0 if added[token].get("special") else len(token.encode())
        elif token != unknown:
            lengths[index] = len(decode_token(token, decoders))
    return lengths


def flatten_decoders(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", []) for step in flatten_decoders(part)]
    return [decoder]


def decode_token(token: str, decoders: list[dict[str, Any]]) -> bytes:
    """The bytes of text that one token stands for, by what each decoding step does to it."""
    for step in decoders:
        match step.get("type"):
            case "ByteLevel" if all(character in BYTE_LEVEL_ALPHABET for character in token):
                return bytes(BYTE_LEVEL_ALPHABET[character] for character in token)
            case "ByteFallback" if is_fallback_byte(token):
                return bytes([int(token[3:5], 16)])
            case "Metaspace":
                token = token.replace(step.get("replacement", SPACE), " ")
            case "Replace" if "String" in step.get("pattern", {}):
                token = token.replace(step["pattern"]["String"], step.get("content", ""))
            case "BPEDecoder":
                token = token.replace(step.get("suffix", "</w>"), " ")
            case "WordPiece":
                token = token.removeprefix(step.get("prefix", "##"))
    return token.encode()


def is_fallback_byte(token: str) -> bool:
    """Whether a token has the form ``<0xNN>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 is itself, the rest U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(hidden)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


# ---- shared ----


def _refuse_surrogates(texts: Iterable[str], error: Exception) -> Exception:
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


def dump_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
