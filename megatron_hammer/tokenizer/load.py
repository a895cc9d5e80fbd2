"""Loads a tokenizer from a file or folder, of whichever of the two kinds it is.

    tokenizer.model   --> SentencePieceTokenizer   (the ids that sentencepiece gives)
    tokenizer.json    --> HuggingFaceTokenizer     (the file's own rules, never rebuilt by a transformers class)
    folder            --> the tokenizer.model in it, else the tokenizer.json

Imports neither sentencepiece nor tokenizers before a file needs it; never torch, never transformers.
"""

from __future__ import annotations

from pathlib import Path

from megatron_hammer.base.errors import DataError
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.interface import Tokenizer
from megatron_hammer.tokenizer.sentencepiece_backend import SentencePieceTokenizer


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
    if path.suffix == ".tiktoken":
        raise DataError(
            12, str(path), "is a .tiktoken vocabulary, which lacks the rule that cuts text into words and the special "
            "tokens", "name the model's tokenizer.json, which is the same tokenizer with both",
        )  # fmt: skip
    return SentencePieceTokenizer(path)
