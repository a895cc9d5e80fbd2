"""Loads a tokenizer from a file or folder, of whichever kind it is.

    tokenizer.model   --> SentencePieceTokenizer   (the ids that sentencepiece gives)
    tokenizer.json    --> HuggingFaceTokenizer     (the file's own rules, never rebuilt by a transformers class)
    *.tiktoken        --> TiktokenTokenizer        (whatever it is called: told by its first line)
    folder            --> the tokenizer.model in it, else the tokenizer.json, else the one .tiktoken

Imports neither sentencepiece nor tokenizers before a file needs it; never torch, never transformers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.paths import missing_remedy, neighbour_of
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer
from megatron_hammer.tokenizer.tiktoken_backend import TiktokenTokenizer, is_tiktoken


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
    if is_tiktoken(path):
        return TiktokenTokenizer(path, tiktoken_pattern, special_tokens)
    if tiktoken_pattern or special_tokens:
        option = f"--tiktoken-pattern {tiktoken_pattern}" if tiktoken_pattern else "--special-tokens"
        raise ConfigError(99, option, f"is for tiktoken vocabularies, and {path} has its own", "leave it out")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


_BELOW = ("tokenizer", "hf")
"""Folders of a run, and of a checkpoint, that hold its tokenizer."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def find_file(path: Path) -> Path:
    """The file that a path means, which may be its folder."""
    if path.is_dir():
        vocabularies = sorted(path.glob("*.tiktoken"))
        candidates = [path / "tokenizer.model", path / "tokenizer.json", *vocabularies[: len(vocabularies) == 1]]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        remedy = "name a tokenizer file or its folder"
        if below := [path / name for name in _BELOW if (path / name / "tokenizer.model").is_file()]:
            remedy = f"did you mean {below[0]}?"
        raise DataError(11, str(path), "holds neither tokenizer.model nor tokenizer.json", remedy)
    if not path.exists():
        remedy = "name a sentencepiece .model, a tokenizer.json or a Hugging Face folder"
        if _HUB_NAME.fullmatch(str(path)) and neighbour_of(path) is None:
            remedy += f"; models of the Hub are fetched before: hf download {path} --local-dir {path.name}"
        raise DataError(10, str(path), "does not exist", missing_remedy(path, remedy))
    return path
