"""Reads lines that a person types, with a line editor that handles Chinese and other wide characters.

On a terminal this is prompt_toolkit where it is installed, else Python's ``input`` with readline: backspace and arrow
keys move by whole characters, and earlier lines come back. From a file or a pipe lines are read as they are, and no
prompt is shown. Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

ReadLine = Callable[[str], str]
"""Shows a prompt, returns a line without its end; raises ``EOFError`` at the end, ``KeyboardInterrupt`` at Ctrl-C."""


def line_reader() -> tuple[ReadLine, str]:
    """How lines are read here, and what it is called: "prompt_toolkit", "readline", "input" or "lines"."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _next_line, "lines"
    try:
        prompt_toolkit: Any = __import__("prompt_toolkit")
        session = prompt_toolkit.PromptSession()
        return lambda prompt: str(session.prompt(prompt)), "prompt_toolkit"
    except ImportError:
        pass
    try:
        __import__("readline")  # from here on ``input`` edits with it
    except ImportError:
        return input, "input"
    return input, "readline"


def _next_line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\r\n")
