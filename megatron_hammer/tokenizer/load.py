"""Loads a tokenizer from a file or folder, of whichever kind it is.

    tokenizer.model   --> SentencePieceTokenizer   (the ids that sentencepiece gives)
    tokenizer.json    --> HuggingFaceTokenizer     (the file's own rules, never rebuilt by a transformers class)
    *.tiktoken        --> TiktokenTokenizer        (under any name: recognised by its first line)
    folder            --> the tokenizer.model in it, else the tokenizer.json, else the one .tiktoken

Imports neither sentencepiece nor tokenizers before a file needs it; never torch, never transformers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.paths import missing_remedy, neighbour_of, unusable_remedy, what_is
from megatron_hammer.base.reading import open_regular
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.tiktoken_backend import TiktokenTokenizer

if TYPE_CHECKING:  # a program that only loads a tokenizer has no settings to read
    from megatron_hammer.config import Config


def load_tokenizer(
    path: str | Path, tiktoken_pattern: str | None = None, special_tokens: Sequence[str] = ()
) -> Tokenizer:
    """Load a sentencepiece ``.model``, a ``tokenizer.json``, a tiktoken vocabulary, or a folder that holds one.

    Args:
        tiktoken_pattern: how a tiktoken vocabulary cuts texts into words (see ``TiktokenTokenizer``); only for one.
        special_tokens: what the file of a tiktoken vocabulary leaves out; only for one.

    Raises:
        ConfigError: E299 pattern or special tokens for a tokenizer that has its own, or a pattern that is none.
        DataError: E310 no such path, E311 a folder without a tokenizer, E312 a damaged or foreign ``.model`` or
            ``.tiktoken``, E313 JSON that is no tokenizer.
    """
    path = find_file(Path(path))
    try:
        if tiktoken_pattern or special_tokens:
            raise _has_its_own(path, tiktoken_pattern)
        return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    except (ConfigError, DataError) as error:  # neither takes a vocabulary of tiktoken, whatever its name
        if is_tiktoken(path):
            return TiktokenTokenizer(path, tiktoken_pattern, special_tokens)
        raise _something_else(path) or error from None


def _has_its_own(path: Path, tiktoken_pattern: str | None) -> ConfigError:
    option = f"--tiktoken-pattern {tiktoken_pattern}" if tiktoken_pattern else "--special-tokens"
    return ConfigError(99, option, f"is for tiktoken vocabularies, and {path} has its own", "leave it out")


_BELOW = ("tokenizer", "hf")
"""Folders of a run, and of a checkpoint, that hold its tokenizer."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_in(folder: Path) -> Path | None:
    """The tokenizer's file in a folder."""
    vocabularies = sorted(folder.glob("*.tiktoken"))
    candidates = [folder / "tokenizer.model", folder / "tokenizer.json", *vocabularies[: len(vocabularies) == 1]]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")


def is_tiktoken(path: Path) -> bool:
    """Whether a file, whatever it is called, begins with a line of base64 and a number."""
    with open_regular(path) as file:
        return _TIKTOKEN_LINE.fullmatch(file.readline(4096).rstrip(b"\r\n")) is not None


_OTHER_FILES = {  # ending -> what such a file is, the remedy
    (".jsonl", ".ndjson", ".txt", ".md", ".parquet", ".csv"): (
        "text", "train one on it: tools/train_tokenizer.py --input {path} --output NEW --vocab-size N"),
    (".bin", ".idx", ".meta.json"): ("a part of a dataset", "name the tokenizer that made it"),
    (".safetensors", ".pt", ".pth", ".ckpt", ".gguf"): ("weights of a model", "name the folder of its tokenizer"),
    (".yaml", ".yml"): ("a config", "name the tokenizer that it names"),
}  # fmt: skip


def _something_else(path: Path) -> DataError | None:
    """The error for a file that is no tokenizer and whose name is that of something else; None: it has no such name."""
    for endings, (what, remedy) in _OTHER_FILES.items():
        if path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(endings):
            with open_regular(path) as file:
                if file.read(1) == b"\n":  # as sentencepiece's models begin, whatever they are called
                    return None
            return DataError(12, str(path), f"is {what}, no tokenizer", remedy.format(path=path))
    return None


def find_file(path: Path) -> Path:
    """The file that a path means, which may be its folder.

    Raises:
        DataError: E310 no such path, E311 a folder without a tokenizer.
    """
    if path.is_dir():
        if found := find_in(path):
            return found
        raise _no_tokenizer_in(path)
    if not path.exists():
        raise _missing(path)
    return path


def _no_tokenizer_in(folder: Path) -> DataError:
    remedy = "name a tokenizer file or its folder"
    steps = sorted(folder.glob("checkpoints/step-*"), reverse=True)
    folders = [place / name for place in (folder, *steps[:1]) for name in _BELOW]
    if below := [place for place in folders if find_in(place)]:
        remedy = f"did you mean {below[0]}?"
    elif kind := what_is(folder):
        remedy = f"it is {kind}: name the tokenizer that it was made with"
    return DataError(11, str(folder), "holds neither tokenizer.model nor tokenizer.json, nor one .tiktoken", remedy)


def _missing(path: Path) -> DataError:
    if path.with_name(f"{path.name}.idx").is_file():
        return DataError(10, str(path), "is the prefix of a dataset", "name the tokenizer that made it")
    remedy = "name a sentencepiece .model, a tokenizer.json, a .tiktoken vocabulary or a folder that holds one"
    if _HUB_NAME.fullmatch(str(path)) and neighbour_of(path) is None and not unusable_remedy(str(path)):
        remedy += f"; models of the Hub are fetched before: hf download {path} --local-dir {path.name}"
    return DataError(10, str(path), "does not exist", missing_remedy(path, remedy))


def with_vocab_size(config: Config, tokenizer: Tokenizer | None) -> Config:
    """The config with the size of vocabulary that it names, or that of its tokenizer.

    Raises:
        ConfigError: E207 there is neither, E205 the config's is less than the tokenizer's.
    """
    vocab_size = config.model.vocab_size
    if tokenizer is None and vocab_size is None:
        raise ConfigError(
            7,
            "model.vocab_size",
            "is not set and there is no tokenizer to take it from",
            "set tokenizer.path or model.vocab_size",
        )
    if tokenizer is not None and vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            5,
            f"model.vocab_size={vocab_size}",
            f"is less than the {tokenizer.vocab_size} ids of {tokenizer.path}",
            "leave model.vocab_size out to take the tokenizer's",
        )
    if vocab_size is not None:
        return config
    assert tokenizer is not None
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))
