"""Reads the files of tokenizers with limits on their size, on the number of their values and on their largest id.

Such files may come from anywhere. The largest that are published (262,000 pieces) have 34 MB of JSON with two million
values, some 16 bytes each, so a file that owes its size to long strings is not a tokenizer. Ids are bounded because
arrays have a place for each id up to the largest, and four bytes of a file can say four billion.

Imports neither sentencepiece nor tokenizers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import DataError, UnfitFile
from megatron_hammer.base.reading import parse_json, read_regular

MAX_TOKENIZER_BYTES = 48 * 2**20
MAX_TOKENIZER_VALUES = 3_000_000
VALUE_BYTES = 32
"""For each value of a large file, with the spaces around it."""
MAX_IDS = 2**22
"""Four million: four times any vocabulary, and the mark of a file that is damaged or means harm."""
MAX_MODEL_BYTES = 12 * 2**20
"""Of a sentencepiece model: 700,000 pieces. The largest published has 5 MB."""
MAX_TIKTOKEN_BYTES = 8 * 2**20
"""400,000 pieces; the largest published has 3.6 MB. Its merges are found anew at each load."""
MAX_TIKTOKEN_WORK = 2**26
"""Squares of its pieces' lengths, added up: what finding the merges takes. 200,000 published pieces come to some 12
million (an estimate from their mean length)."""


def read_tokenizer(path: Path, limit: int = MAX_TOKENIZER_BYTES) -> bytes:
    """The content of a tokenizer's file.

    Raises:
        DataError: E312 it is no regular file, or larger than any.
    """
    try:
        return read_regular(path, limit)
    except UnfitFile as error:
        raise DataError(12, str(path), f"is no tokenizer ({error.strerror})", error.remedy) from None


def read_tokenizer_json(path: Path) -> Any:
    """The value of a ``tokenizer.json``; ``OSError`` or ``ValueError`` with the reason."""
    return parse_json(read_regular(path, MAX_TOKENIZER_BYTES), MAX_TOKENIZER_VALUES, value_bytes=VALUE_BYTES)


def check_largest_id(path: Path, largest: int) -> None:
    """Refuse ids that are too large for any memory: E313."""
    if not 0 <= largest < MAX_IDS:
        raise DataError(13, f"{path}: id {largest}", f"must be below {MAX_IDS:,}", "fetch the tokenizer again")
