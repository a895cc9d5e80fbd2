"""Vocabularies of tiktoken (``qwen.tiktoken``, ``cl100k_base.tiktoken``, Llama 3's ``tokenizer.model``), run exactly.

The file is one piece a line, its bytes in base64 and its rank, which is its id::

    IQ== 0
    Ig== 1

It lacks two things that a tokenizer has. The regular expression that cuts a text into words before anything is merged
is in the program that uses the file, so it is taken from ``PATTERNS`` by the file's name, or given; ``encoder`` says
which one it is. Special tokens are there too, so there are none unless they are given.

tiktoken joins, inside a word, the adjacent pair whose joined bytes have the lowest rank, the leftmost of equal ones; a
word that is a piece is that piece. The tokenizers library does the same with ``ignore_merges`` and one merge a piece:
the two parts that the piece's own bytes come to when only lower ranks are joined. No other pair can ever become the
piece: while the piece is next to be joined, nothing has been joined across its ends and nothing of a lower rank is left
inside, so inside stands what the piece alone comes to. A piece that comes to more than two parts is only ever a word.

Compared with tiktoken 0.14 on the 151,643 pieces of qwen.tiktoken and 120,210 texts: equal ids
(``tests/tokenizer/test_tiktoken.py`` says how to repeat it). Needs the tokenizers library, not tiktoken; 3 seconds for
Qwen's pieces on one core.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_hammer.base.errors import ConfigError, DataError
from megatron_hammer.base.files import replace_file
from megatron_hammer.tokenizer.huggingface_backend import HuggingFaceTokenizer
from megatron_hammer.tokenizer.pieces import BYTE_LEVEL_ALPHABET
from megatron_hammer.tokenizer.tokenizer_files import MAX_TIKTOKEN_BYTES, MAX_TIKTOKEN_WORK, read_tokenizer

_SHORT_FORMS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_BEHIND_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _BEHIND_WORDS,
    "qwen": _SHORT_FORMS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _BEHIND_WORDS,
    "o200k": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SHORT_FORMS}?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SHORT_FORMS}?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
"""How texts are cut into words, by the vocabulary that each was published with. Llama 3 and GLM-4 cut as cl100k."""
DEFAULT_PATTERN = "cl100k"
_BY_NAME = {"qwen": "qwen", "o200k": "o200k", "gpt2": "gpt2", "r50k": "gpt2", "p50k": "gpt2", "cl100k": "cl100k"}

_CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_LEVEL_ALPHABET.items()}


class TiktokenTokenizer(HuggingFaceTokenizer):
    """A tiktoken vocabulary, run by the tokenizers library.

    Args:
        pattern: a name of ``PATTERNS`` or a regular expression; None: by the file's name.
        special_tokens: their names; the first gets the id behind the last rank.
    """

    def __init__(self, path: Path, pattern: str | None = None, special_tokens: Sequence[str] = ()) -> None:
        self.pattern = pattern or assumed_pattern(path)
        expression = PATTERNS.get(self.pattern, self.pattern)
        _check_expression(expression)
        super().__init__(path, _definition(read_ranks(path), expression, special_tokens))
        shown = f"words cut as in {self.pattern}" if self.pattern in PATTERNS else "words cut by the pattern given"
        self.encoder = f"tokenizers (a .tiktoken vocabulary, {shown})"
        if pattern is None:
            why = "from its name" if _by_name(path) else "for want of a name that is known"
            self.assumption = (
                f"{path}: a .tiktoken vocabulary does not say how it cuts texts into words; assumed is "
                f"{self.pattern}'s way, {why} (tools/convert_tokenizer.py --tiktoken-pattern "
                f"{'|'.join(PATTERNS)} makes a folder that says it)"
            )

    def save_files(self, directory: Path) -> None:
        """A ``tokenizer.json`` of the same ids, and a ``tokenizer_config.json`` with the special tokens."""
        replace_file(Path(directory) / "tokenizer.json", json.dumps(self.definition, ensure_ascii=False).encode())
        self.save_config(directory)


def add_tiktoken_pattern(parser: argparse.ArgumentParser) -> None:
    """The option of all programs that read a tokenizer to look at it or to convert it."""
    parser.add_argument(
        "--tiktoken-pattern", metavar="P", help="how a .tiktoken vocabulary cuts texts into words: "
        f"{', '.join(PATTERNS)} or a regular expression (default: by the file's name, else {DEFAULT_PATTERN})",
    )  # fmt: skip


def assumed_pattern(path: Path) -> str:
    """The name of the pattern that is taken where none is given."""
    return _by_name(path) or DEFAULT_PATTERN


def _by_name(path: Path) -> str:
    name = path.stem.lower()
    return next((pattern for known, pattern in _BY_NAME.items() if known in name), "")


def _check_expression(expression: str) -> None:
    from tokenizers import Regex

    try:
        Regex(expression)
    except Exception as error:  # the Rust library raises bare Exception
        raise ConfigError(
            99, f"--tiktoken-pattern {expression!r}", f"is neither {', '.join(PATTERNS)} nor a regular expression "
            f"({error})", "give one of these names, or the pat_str of the program that reads the file",
        ) from None  # fmt: skip


def read_ranks(path: Path) -> dict[bytes, int]:
    """The pieces of the file, by their bytes, in order of rank.

    Raises:
        DataError: E312 a line that is something else, a piece or rank that comes twice, a byte without a piece.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_tokenizer(path, MAX_TIKTOKEN_BYTES).splitlines(), 1):
        if not line.strip():
            continue
        try:
            piece, rank = line.split()
            content, index = base64.b64decode(piece, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise _damaged(path, f"has a line {number} that is no piece in base64 and its rank") from None
        if content in ranks or index < 0:
            raise _damaged(path, f"has a line {number} whose piece came before or whose rank is negative")
        ranks[content] = index
    if sum(len(piece) ** 2 for piece in ranks) > MAX_TIKTOKEN_WORK:
        raise _damaged(path, "has longer pieces than any")
    if len(set(ranks.values())) < len(ranks):
        raise _damaged(path, "gives two pieces the same rank")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _damaged(path, f"has no piece for {len(missing)} of the 256 bytes, 0x{missing[0]:02X} the first")
    return dict(sorted(ranks.items(), key=lambda entry: entry[1]))


def _damaged(path: Path, rule: str) -> DataError:
    return DataError(
        12, str(path), f"is a tiktoken vocabulary that {rule}", "fetch the file again, or name the model's "
        "tokenizer.json",
    )  # fmt: skip


def _definition(ranks: Mapping[bytes, int], expression: str, special_tokens: Sequence[str]) -> dict[str, Any]:
    """The ``tokenizer.json`` that gives the same ids."""
    spelt = {piece: "".join(_CHARACTER_OF_BYTE[byte] for byte in piece) for piece in ranks}
    pairs = (_parts(piece, rank, ranks) for piece, rank in ranks.items() if len(piece) > 1)
    behind = max(ranks.values()) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": behind + n, "content": token, **flags} for n, token in enumerate(special_tokens)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spelt[piece]: rank for piece, rank in ranks.items()},
            "merges": [[spelt[pair[0]], spelt[pair[1]]] for pair in pairs if len(pair) == 2],
        },
    }


def _parts(piece: bytes, rank: int, ranks: Mapping[bytes, int]) -> list[bytes]:
    """What the bytes of a piece come to when only ranks below its own are joined."""
    parts = [piece[at : at + 1] for at in range(len(piece))]
    joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
    while len(parts) > 2 and (lowest := min(joined)) < rank:
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        for pair in range(max(at - 1, 0), min(at + 1, len(joined))):
            joined[pair] = ranks.get(parts[pair] + parts[pair + 1], rank)
    return parts
