"""User-defined symbols: literal strings that a tokenizer always keeps as one piece, read from a file and checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_hammer.base.errors import ConfigError, os_remedy
from megatron_hammer.base.reading import read_regular
from megatron_hammer.tokenizer.pieces import SPACE

MAX_TEXT_BYTES = 2 * 2**20
"""Of a list of symbols: a hundred times the longest in use; its lines become strings."""
CONTROL_PIECES = ("<unk>", "<s>", "</s>")
"""The control pieces of the tokenizers that are trained here, by id."""


def read_symbols(path: str | Path) -> list[str]:
    """User-defined symbols from a file: one literal string a line (no escapes are decoded), empty lines left out.

    Raises:
        ConfigError: E261.
    """
    return [line for line in read_text_file(Path(path)).split("\n") if line]


def read_text_file(path: Path) -> str:
    """The content of a small text file that the user wrote.

    Raises:
        ConfigError: E261 it cannot be read or is not UTF-8.
    """
    try:
        return read_regular(path, MAX_TEXT_BYTES).decode("utf-8").replace("\r\n", "\n")
    except OSError as error:
        remedy = os_remedy(error)
        if isinstance(error, FileNotFoundError) and any(c in str(path) for c in "<>|,"):
            remedy = "name a file that holds them, one a line"
        raise ConfigError(61, str(path), f"cannot be read: {error.strerror}", remedy) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            61, str(path), f"is not valid UTF-8 at byte {error.start}", "save it as UTF-8, one entry a line"
        ) from None


def check_symbols(symbols: Sequence[str]) -> list[str]:
    """The symbols as pieces: spaces escaped as in every piece, so that they match where the text has a space."""
    pieces: list[str] = []
    for symbol in symbols:
        piece = symbol.replace(" ", SPACE)
        rule = None
        if not piece:
            rule = "is empty"
        elif "\0" in piece:
            rule = "holds NUL, which no piece may"
        elif piece in CONTROL_PIECES or re.fullmatch("<0x[0-9A-F]{2}>", piece):
            rule = "is the name of a control or byte piece"
        elif piece in pieces:
            rule = "occurs twice"
        if rule:
            raise ConfigError(61, f"user-defined symbol {symbol!r}", rule, "remove it from the list")
        pieces.append(piece)
    return pieces


def doubtful_symbols(symbols: Sequence[str]) -> dict[str, str]:
    """Symbols that look like a tag with a slip of the pen -> the tag; a published list has ``CLS>`` and ``</p >``."""
    doubtful = {}
    for symbol in symbols:
        meant = re.sub(r"\s+", "", symbol) if symbol.startswith("<") else f"<{symbol}"
        if re.fullmatch(r"<?/?[A-Za-z][A-Za-z0-9]*\s*/?>", symbol) and meant != symbol and meant not in symbols:
            doubtful[symbol] = meant
    return doubtful
