"""Translates full-width letters, curly quotes, ``1k`` and ``1万`` into the plain characters and numbers that they mean.

Error lines use this to suggest a remedy. Nothing is corrected in silence: a setting that is written so is refused.
Needs no torch.
"""

from __future__ import annotations

import math
import re
import unicodedata

DOUBLE_QUOTES = "“”„«»「」『』"
SINGLE_QUOTES = "‘’‚"
TYPOGRAPHIC_QUOTES = DOUBLE_QUOTES + SINGLE_QUOTES
"""Which a shell takes for letters: it splits at the blanks between them."""
_TYPOGRAPHIC = str.maketrans({
    **dict.fromkeys(DOUBLE_QUOTES, '"'), **dict.fromkeys(SINGLE_QUOTES, "'"),
    **dict.fromkeys("—–‒‐‑−－", "-"), "、": ",", "。": ".", "×": "x", "\u3000": " ",
})  # fmt: skip
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
          "%": 0.01, "千": 1e3, "万": 1e4, "百万": 1e6, "亿": 1e8}  # fmt: skip
_COUNTED = r"(?:steps?|tokens?|iters?|samples?|步|个|层|条|维|头)?"
_NUMBER = re.compile(rf"([+-]?[0-9.,_ ]*[0-9](?:e[+-]?[0-9]+)?)\s*({'|'.join(map(re.escape, _UNITS))})?\s*{_COUNTED}")
_POWER = re.compile(r"(?:([0-9.]+)\s*[x*]\s*)?10\s*(?:\^|\*\*)?\s*\(?(-[0-9]+)\)?")
_RATIO = re.compile(r"([0-9.]+)\s*/\s*([0-9.]+)")
_THOUSANDS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]*)?")


def is_quoted(text: str) -> bool:
    """Whether a text begins with a quote that no shell takes for one."""
    return text.startswith(tuple(TYPOGRAPHIC_QUOTES))


def in_ascii(text: str) -> str:
    """The text with the ASCII form of full-width letters and digits, and of punctuation, quotes and dashes."""
    return unicodedata.normalize("NFKC", text.translate(_TYPOGRAPHIC))


def number_meant(text: str, whole: bool, unit: str = "") -> str:
    """The plain number that a text such as ``1k``, ``1,000``, ``4e-4%``, ``1万`` or ``10^-4`` means, or "".

    Args:
        whole: the number must be a whole one.
        unit: what the number is counted in where it stands (``mb``), so that ``2MB`` there means 2.
    """
    plain = in_ascii(text).strip().strip("'\"").lower()
    plain = re.sub(r"(?<=[kmgt])ib$", "b", plain)  # GiB where GB is meant, and the other way: within 7 %
    if unit and plain.endswith(unit.lower()):
        plain = plain[: -len(unit)].strip()
    counted = re.fullmatch(r"[kmgt]b", unit.lower()) and re.search(r"[kmgt]b?$", plain)
    value = _value_of(plain, whole and not counted)
    if counted and value is not None:  # 1GB where megabytes are counted
        value /= _UNITS[unit.lower()]
    if value is None or not math.isfinite(value) or (whole and not value.is_integer()):
        return ""
    return str(int(value)) if whole or (value.is_integer() and abs(value) < 1e15) else f"{value:.12g}"


def share_meant(value: float, example: str) -> str:
    """The remedy for a number that is no share of 1: what it is if it was meant in percent, else an example."""
    return (
        f"write {value / 100:g}: it is a share, no percentage" if 1 < value <= 100 else f"give a share like {example}"
    )


def _value_of(plain: str, whole: bool) -> float | None:
    if match := _POWER.fullmatch(plain):
        return float(f"{match[1] or 1}e{match[2]}") if is_number(match[1] or "1") else None
    if match := _RATIO.fullmatch(plain):
        over = float(match[2]) if is_number(match[2]) else 0.0
        return float(match[1]) / over if over and is_number(match[1]) else None
    match = _NUMBER.fullmatch(plain)
    if match is None:
        return None
    digits, times = match[1].replace("_", "").replace(" ", ""), _UNITS.get(match[2] or "", 1.0)
    if _THOUSANDS.fullmatch(digits):
        digits = digits.replace(",", "")
    elif digits.count(",") == 1 and "." not in digits and not whole:  # a decimal comma
        digits = digits.replace(",", ".")
    if not is_number(digits):
        return None
    return float(digits) / 100 if match[2] == "%" else float(digits) * times


def is_number(text: str) -> bool:
    """Whether Python reads it as one."""
    try:
        float(text)
    except ValueError:
        return False
    return True
