"""Tells which of the two languages of our pages the user's system speaks. Needs no torch."""

from __future__ import annotations

import os
from typing import Literal

Language = Literal["en", "zh"]


def user_language() -> Language:
    """``zh`` where the first set one of LC_ALL, LC_MESSAGES and LANG names Chinese, as ``zh_CN.UTF-8`` does."""
    spoken = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if spoken.startswith("zh") else "en"
