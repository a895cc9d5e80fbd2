"""English or Chinese: which of the two the user's system speaks, and what chooses a text. Needs no torch.

Whoever writes for people names both texts where they are used: ``say("loss", "损失")``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
Say = Callable[[str, str], str]
"""(English, Chinese) -> the one of the language in hand."""


def sayer(language: Language) -> Say:
    """What chooses between the two languages."""
    return (lambda english, chinese: chinese) if language == "zh" else (lambda english, chinese: english)


def user_language() -> Language:
    """``zh`` where the first set one of LC_ALL, LC_MESSAGES and LANG names Chinese, as ``zh_CN.UTF-8`` does."""
    spoken = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if spoken.startswith("zh") else "en"
