"""Ids as text for people to read: what the pieces of the ids spell, byte for byte.

A decoder would strip, join and mend pieces; here nothing is. Bytes that are no character are written
``\\xe4``, and ids that stand for no text are shown by name, as ``<eos>``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_hammer.tokenizer.interface import Tokenizer

_MARK = "\u2502"  # between two pieces: a vertical line that texts hardly use


class Speller:
    """Writes ids of one tokenizer as text.

    Args:
        tokenizer: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.pieces = tokenizer.read_pieces()
        self.names = special_names(tokenizer)

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids; those that stand for no text by name, as ``<eos>``."""
        parts: list[str] = []
        waiting = b""
        for token in ids:
            content = self._content(token)
            if content:
                waiting += content
                continue
            parts += [waiting.decode(errors="backslashreplace"), self._name(token)]
            waiting = b""
        return "".join(parts) + waiting.decode(errors="backslashreplace")

    def marked(self, ids: Sequence[int]) -> str:
        """The pieces of some ids, a mark between them; line ends and other controls as JSON escapes, bytes as hex."""
        return _MARK.join(self._piece(token) for token in ids)

    def _piece(self, token: int) -> str:
        content = self._content(token)
        if not content:
            return self._name(token)
        if self.pieces.is_byte[token]:
            return "".join(f"<0x{byte:02X}>" for byte in content)
        return json.dumps(content.decode(errors="backslashreplace"), ensure_ascii=False)[1:-1]

    def _content(self, token: int) -> bytes:
        return self.pieces.content[token] if 0 <= token < len(self.pieces.content) else b""

    def _name(self, token: int) -> str:
        return f"<{self.names.get(token, f'id {token}')}>"


def special_names(owner: Any) -> dict[int, str]:
    """id -> "bos", "eos", "pad" or "unk" of a tokenizer, or of the record that a dataset keeps of one."""
    names: dict[int, str] = {}
    for name in ("unk", "pad", "eos", "bos"):
        token = getattr(owner, f"{name}_id")
        if token is not None:
            names[token] = name if token not in names else f"{name}/{names[token]}"  # one id may be two
    return names
