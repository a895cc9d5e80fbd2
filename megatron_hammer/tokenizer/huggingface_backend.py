"""Tokenizers of Hugging Face: a ``tokenizer.json``, run by the tokenizers library, with the files beside it.

Imports tokenizers only when a tokenizer is made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import DataError, UnfitFile
from megatron_hammer.base.files import dump_json, replace_file
from megatron_hammer.base.reading import parse_json, read_regular
from megatron_hammer.tokenizer.interface import SpecialIds, Tokenizer, refuse_surrogates
from megatron_hammer.tokenizer.pieces import Pieces, pieces_of_definition
from megatron_hammer.tokenizer.tokenizer_files import check_largest_id, read_tokenizer, read_tokenizer_json

# Names that well-known models give their document marks; asked only where no configuration file says anything.
_WELL_KNOWN_BOS = ("<s>", "<|begin_of_text|>")
_WELL_KNOWN_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")


STAND_IN_PAD = "pad_token_stands_in"
"""In a tokenizer_config.json of ours: true where the tokenizer has no pad, and ``pad_token`` is another one's."""


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``, run by the tokenizers library.

    Literal special tokens in a text stay text (``encode_special_tokens``); truncation and padding that the file may
    ask for are switched off. Special ids are looked up in the files beside it, in this order: tokenizer_config.json,
    special_tokens_map.json, generation_config.json, config.json; then by well-known names.
    """

    kind = "tokenizers"
    encoder = "tokenizers (a tokenizer.json)"

    def __init__(self, path: Path, definition: dict[str, Any] | None = None) -> None:
        """``definition`` is the content where ``path`` is a file of another form that stands for it."""
        from tokenizers import Tokenizer as Backend

        self.path = path
        self.definition = _read_definition(path) if definition is None else definition
        try:
            self._backend = Backend.from_str(json.dumps(self.definition))
        except BaseException as error:  # the Rust library raises bare Exception, and one of its own where it panics
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise _not_a_tokenizer(path, str(error)) from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise _not_a_tokenizer(path, "its vocabulary is empty")
        self.vocab_size = max(vocabulary.values()) + 1
        check_largest_id(path, self.vocab_size - 1)
        special = _find_special_ids(path.parent, vocabulary, self.definition)
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = special
        self.fingerprint = _fingerprint_definition(self.definition, special)

    def encode(self, text: str) -> list[int]:
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError) as error:
            raise refuse_surrogates([text], error) from None

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """As ``encode``. The library has one pool of threads for all: any ``threads`` above 1 means that pool."""
        if threads == 1:
            return [self.encode(text) for text in texts]
        try:
            return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except (TypeError, UnicodeError) as error:
            raise refuse_surrogates(texts, error) from None

    def template_ids(self) -> list[int]:
        """As the interface says. A tokenizer_config.json that speaks of bos has the last word, as in transformers."""
        ids: list[int] = self._backend.encode("", add_special_tokens=True).ids
        wants_bos = _read_json_object(self.path.with_name("tokenizer_config.json")).get("add_bos_token")
        if self.bos_id is None or not isinstance(wants_bos, bool) or wants_bos == (ids[:1] == [self.bos_id]):
            return ids
        return [self.bos_id, *ids] if wants_bos else ids[1:]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def find_id(self, token: str) -> int | None:
        found: int | None = self._backend.token_to_id(token)
        return found

    def read_pieces(self) -> Pieces:
        return pieces_of_definition(self.definition, self.vocab_size)

    def save_files(self, directory: Path) -> None:
        """``tokenizer.json`` as it is, and a ``tokenizer_config.json`` that states the special tokens found."""
        directory = Path(directory)
        replace_file(directory / "tokenizer.json", read_tokenizer(self.path))
        self.save_config(directory)

    def save_config(self, directory: Path) -> None:
        """The ``tokenizer_config.json`` of ``save_files``, and the chat template where there is one."""
        config = _read_json_object(self.path.with_name("tokenizer_config.json"))
        config.pop(STAND_IN_PAD, None)
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        for name, token_id in names.items():
            if token_id is None:
                config.pop(name, None)
            elif _token_content(config.get(name)) != self._backend.id_to_token(token_id):
                config[name] = self._backend.id_to_token(token_id)
        replace_file(directory / "tokenizer_config.json", dump_json(config))
        template = self.path.with_name("chat_template.jinja")
        if template.is_file():
            replace_file(directory / template.name, read_regular(template))


# ---- the file and those beside it ----


def _not_a_tokenizer(path: Path, cause: str) -> DataError:
    beside = [path.with_name(name) for name in ("tokenizer.model", "tokenizer.json")]
    near = next((file for file in beside if file.is_file() and file != path), None)
    remedy = f"did you mean {near}?" if near else "name a tokenizer.json of the tokenizers library"
    return DataError(13, str(path), f"is not a tokenizer ({cause})", remedy)


def _read_definition(path: Path) -> dict[str, Any]:
    try:
        definition = read_tokenizer_json(path)
    except (UnfitFile, ValueError) as error:
        raise _not_a_tokenizer(path, f"not valid JSON: {error}") from None
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise _not_a_tokenizer(path, "it describes no tokenizer model")
    if dropout := definition["model"].get("dropout"):
        raise DataError(
            13,
            str(path),
            f"has BPE dropout (model.dropout={dropout}): the same text would get other ids in every run",
            'set "dropout": null in its "model"; training on random segmentations is not supported',
        )
    return definition


def _read_json_object(path: Path) -> dict[str, Any]:
    """A configuration file beside the tokenizer; absent means empty."""
    if not os.path.lexists(path):
        return {}
    try:
        value = parse_json(read_regular(path))
    except (UnfitFile, ValueError) as error:
        raise DataError(13, str(path), f"is not valid JSON: {error}", "mend or remove it") from None
    if not isinstance(value, dict):
        raise DataError(13, str(path), "is not a JSON object", "mend or remove it")
    return value


def _token_content(value: Any) -> str | None:
    """A token as configuration files write it: a string, or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def _find_special_ids(folder: Path, vocabulary: dict[str, int], definition: dict[str, Any]) -> SpecialIds:
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
    pad = None if by_token[0].get(STAND_IN_PAD) else find("pad", ())
    return find("bos", _WELL_KNOWN_BOS), find("eos", _WELL_KNOWN_EOS), find("unk", (unknown,)), pad


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
