"""Which script the characters of a text belong to: Han, Latin, digits, punctuation and so on.

By Unicode's name and general category of each character, as Python's own database has them. Pieces of vocabularies and
the characters of datasets are counted by it.
"""

from __future__ import annotations

import functools
import unicodedata

SCRIPTS = ("Han", "Latin", "Kana", "Hangul", "Cyrillic", "Greek", "Arabic", "other script", "mixed scripts", "digits",
           "symbols", "punctuation", "white space", "bytes", "control")  # fmt: skip
_SCRIPT_OF_NAME = {
    "CJK": "Han", "IDEOGRAPHIC": "Han", "LATIN": "Latin", "HIRAGANA": "Kana", "KATAKANA": "Kana",
    "KATAKANA-HIRAGANA": "Kana", "HANGUL": "Hangul", "CYRILLIC": "Cyrillic", "GREEK": "Greek", "ARABIC": "Arabic",
}  # fmt: skip


def script_of(text: str) -> str:
    """The one of ``SCRIPTS`` that a piece belongs to.

    Letters decide; a piece without any goes by its digits, then symbols, then punctuation, then white space.
    """
    kinds = {_kind_of(character) for character in text}
    letters = kinds - {"digits", "symbols", "punctuation", "white space"}
    if len(letters) > 1:
        return "mixed scripts"
    if letters:
        return letters.pop()
    return next((kind for kind in ("digits", "symbols", "punctuation") if kind in kinds), "white space")


@functools.cache
def _kind_of(character: str) -> str:
    category = unicodedata.category(character)
    word = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split(" ")[0]
    if category[0] == "L" or (word == "IDEOGRAPHIC" and category == "Nl"):
        return _SCRIPT_OF_NAME.get(word, "other script")
    if category[0] == "M":  # a combining mark takes no side, unless it belongs to one script alone
        return "symbols" if word in ("COMBINING", "VARIATION") else _SCRIPT_OF_NAME.get(word, "other script")
    if category[0] == "N":
        return "digits"
    if category[0] == "P":
        return "punctuation"
    if category[0] == "Z" or character in "\t\n\r\v\f":
        return "white space"
    return "symbols"  # controls, private and unassigned characters among them
