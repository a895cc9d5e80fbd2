"""English or Chinese: which of the two the user's system speaks, what chooses a text, times in words. Needs no torch.

Whoever writes for people names both texts where they are used: ``say("loss", "损失")``.
"""

from __future__ import annotations

import math
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


def span(seconds: float, say: Say) -> str:
    """A length of time for people, in its two largest units."""
    if not math.isfinite(seconds) or seconds >= 1000 * 86400:
        return say("years", "数年")
    days, hours, minutes = int(seconds // 86400), int(seconds // 3600) % 24, int(seconds // 60) % 60
    if days:
        return say(f"{days} d {hours} h", f"{days} 天 {hours} 小时")
    if hours:
        return say(f"{hours} h {minutes} min", f"{hours} 小时 {minutes} 分")
    return say(f"{minutes} min", f"{minutes} 分") if minutes else say(f"{int(seconds)} s", f"{int(seconds)} 秒")
